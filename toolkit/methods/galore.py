"""GaLore: AdamW in a low-rank subspace of the gradients (Zhao et al. 2024, arXiv 2403.03507).

All weights train, as under `full`, but the optimizer's state of a weight matrix (m, n) has rank r: the
gradient G is projected on the top singular vectors of an earlier gradient, P' G (r, n) with P (m, r) where
m <= n and G P (m, r) with P (n, r) otherwise; Adam runs there, and its update is projected back.
Convolutions are matrices (out, in / groups * height * width).  Parameters that are 1-D, depthwise, or no
wider than the rank are left to AdamW itself.

Each gradient is projected as soon as backward has computed it (as in LOMO, Lv et al. 2023, arXiv 2306.09782),
so the gradients of all layers never exist together.

With a rank that leaves nothing to project this is `torch.optim.AdamW`, bit for bit.  A full-rank P would
not be: Adam works on single numbers, and in rotated axes its first step differs (on Gaussian gradients of
64 x 128 by 0.89 of the norm of AdamW's).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw

from toolkit.errors import InputError, Options, option
from toolkit.methods.optimizer import ADAM_FLOPS, DECAY_FLOPS, OptimizerFlops, decay_groups
from toolkit.methods.registry import NOT_TRIED, Hooks, rates, register, searched


@dataclass(frozen=True)
class GaLoreOptions(Options):
    """Options of GaLore."""

    rank: int = option(32, "rank of the subspace that holds the optimizer's state", between=(1, 65536))
    gap: int = option(50, "steps from one choice of the subspace to the next", between=(1, 1_000_000))
    scale: float = option(1.0, "factor of the projected updates (alpha in the paper)", between=(0, 1000))


class GaLore(torch.optim.Optimizer):
    """AdamW whose moments, and gradients between backward and step, are of rank `rank` at most.

    `gap`: steps from one choice of the subspace to the next; the moments are kept, as in the authors' code.
    `scale`: of the projected updates (alpha in the paper).  Weight decay is AdamW's, on the weights.

    Projected parameters have no `.grad` after backward.  Gradients of several backward passes add up until
    `zero_grad()` of this optimizer (the model's does not reach them); clipping and `GradScaler` do not see
    them.  A gradient that was set by hand is used in `step()`.  A later `GaLore` of the same parameters
    takes over; call `close()` before any other optimizer does while this one is alive.  Raises `InputError`
    for values out of range.

    On fake tensors the subspace is chosen in every step, so that a plan holds for all of them.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rank: int = 32,
        gap: int = 50,
        scale: float = 1.0,
    ):
        if rank < 1 or gap < 1 or not scale > 0:
            raise InputError(
                f"GaLore needs rank >= 1, gap >= 1 and scale > 0, got {rank}, {gap} and {scale}."
            )
        # Projected parameter -> its gradient in the subspace, (r, n) or (m, r), since `zero_grad()`.
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        self._group_of: dict[torch.Tensor, int] = {}
        self._hooks: list = []
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings |= {"rank": rank, "gap": gap, "scale": scale}
        # `fused` makes torch put a loaded "step" on the parameter's device.  `steps`: done so far.
        super().__init__(params, settings | {"fused": True, "steps": 0})

    def add_param_group(self, group: dict) -> None:
        """Add parameters; projected ones lose their gradients as soon as these are computed."""
        super().add_param_group(group)
        project = _WeakMethod(self._project)
        for parameter in self.param_groups[-1]["params"]:
            self._group_of[parameter] = len(self.param_groups) - 1
            if is_projected(parameter, self.param_groups[-1]["rank"]) and parameter.requires_grad:
                if hasattr(parameter, "galore_hook"):  # of an older one, which a traceback may hold
                    parameter.galore_hook.remove()
                parameter.galore_hook = parameter.register_post_accumulate_grad_hook(project)
                self._hooks.append(parameter.galore_hook)

    def close(self) -> None:
        """Stop collecting gradients, and drop the collected ones."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.gradients.clear()

    @property
    def refreshes(self) -> bool:
        """Whether the next step chooses the subspaces again."""
        return any(group["steps"] % group["gap"] == 0 for group in self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, the projected ones too."""
        super().zero_grad(set_to_none)
        self.gradients.clear()

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            whole = []
            for parameter in group["params"]:
                if is_projected(parameter, group["rank"]):
                    self._project(parameter)  # set by hand
                    if parameter in self.gradients:
                        self._step_projected(parameter, group)
                elif parameter.grad is not None:
                    whole.append(parameter)
            self._adam(whole, [p.grad for p in whole], [self._state(p, p) for p in whole], group)
            group["steps"] += 1
        return loss

    def _project(self, parameter: torch.Tensor) -> None:
        """Add the gradient to its sum in the subspace, and release it."""
        if parameter.grad is None:  # another hook took it
            return
        with torch.no_grad():
            gradient = parameter.grad.permute(_order(parameter)).reshape(len(parameter), -1)
            wide = gradient.shape[0] <= gradient.shape[1]
            if parameter not in self.gradients:
                self._choose_subspace(parameter, gradient, wide)
                rank = self.state[parameter]["projector"].shape[1]
                shape = (rank, gradient.shape[1]) if wide else (gradient.shape[0], rank)
                self.gradients[parameter] = gradient.new_zeros(shape)
            projector = self.state[parameter]["projector"]
            factors = (projector.mT, gradient) if wide else (gradient, projector)
            _add_product(self.gradients[parameter], *factors)
        parameter.grad = None

    def _choose_subspace(self, parameter: torch.Tensor, gradient: torch.Tensor, wide: bool) -> None:
        """Set the projector (smaller side, rank) if that is due.

        Called at the first gradient of a step.  Only a later choice reads what is written here before the
        step is made, so an abandoned step can be repeated.
        """
        state, group = self.state[parameter], self.param_groups[self._group_of[parameter]]
        fake = isinstance(parameter, FakeTensor)
        if "projector" in state and group["steps"] % group["gap"] and not fake:
            return
        kind = torch.promote_types(gradient.dtype, torch.float32)
        try:
            left, _, right = torch.linalg.svd(gradient.to(kind), full_matrices=False)
        except torch.linalg.LinAlgError:  # not finite: the training loop sees that in the loss
            left = right = torch.eye(min(gradient.shape), dtype=kind, device=gradient.device)
        vectors = left if wide else right.mT
        if "exp_avg" in state:
            state["projector"].copy_(vectors[:, : group["rank"]])
            return
        chosen = vectors[:, : group["rank"]].to(gradient.dtype)
        state["projector"] = chosen.clone(memory_format=torch.contiguous_format)

    def _step_projected(self, parameter: torch.Tensor, group: dict) -> None:
        """AdamW's step of a weight (m, n) with the update of rank r."""
        gradient = self.gradients[parameter]
        state = self._state(parameter, gradient)
        update = torch.zeros_like(gradient)  # Adam turns a weight of zeros into its update
        self._adam([update], [gradient], [state], group | {"weight_decay": 0.0})
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        weight = parameter.permute(_order(parameter)).view(len(parameter), -1)  # the same memory
        projector = state["projector"]
        wide = weight.shape[0] <= weight.shape[1]
        factors = (projector, update) if wide else (update, projector.mT)
        _add_product(weight, *factors, alpha=group["scale"])

    def _state(self, parameter: torch.Tensor, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of `parameter`, with moments of the shape of `like`."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        return state

    def step_flops(self) -> OptimizerFlops:
        """Count a step by the shapes of the parameters.

        Two per multiply-add of a projection; 6 m n^2 + 20 n^3 for the singular vectors of (m, n), m >= n
        (Golub and Van Loan, Matrix Computations, 4th ed., fig. 8.6.1, R-SVD).
        """
        adam = projection = svd = 0
        for group in self.param_groups:
            decay = DECAY_FLOPS if group["weight_decay"] else 0
            for parameter in group["params"]:
                count = parameter.numel()
                if is_projected(parameter, group["rank"]):
                    n, m = sorted(matrix_shape(parameter))
                    projection += 2 * 2 * group["rank"] * count
                    svd += 6 * m * n**2 + 20 * n**3
                    count = group["rank"] * m
                adam += ADAM_FLOPS * count + decay * parameter.numel()
        return OptimizerFlops(adam, projection, svd, self.param_groups[0]["gap"])

    @staticmethod
    def _adam(weights: list, gradients: list, states: list[dict], group: dict) -> None:
        """torch's own AdamW, in place."""
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        adamw(
            weights, gradients, *moments, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def matrix_shape(parameter: torch.Tensor) -> tuple[int, int]:
    """(m, n) of a parameter of two or more dimensions, seen as a matrix."""
    return len(parameter), parameter[0].numel()


def is_projected(parameter: torch.Tensor, rank: int) -> bool:
    """Whether `parameter` is a matrix wider than `rank`; depthwise convolutions do not count as matrices."""
    if parameter.dim() < 2 or (parameter.dim() > 2 and parameter.shape[1] == 1):
        return False
    return min(matrix_shape(parameter)) > rank


def _order(parameter: torch.Tensor) -> list[int]:
    """Dimensions in memory order after the first, so that channels-last weights are matrices too."""
    return [0, *sorted(range(1, parameter.dim()), key=parameter.stride, reverse=True)]


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, alpha: float = 1.0) -> None:
    """total += alpha * first @ second, in place.

    Hidden from dispatch modes: it allocates nothing, and FLOP counters leave optimizers out.
    """
    if isinstance(total, FakeTensor):
        return
    with torch._C._DisableTorchDispatch():
        total.addmm_(first, second, alpha=alpha)


class _WeakMethod:
    """A bound method that does nothing once its object is gone.

    A parameter's hook must not keep an optimizer alive, nor be copied or saved with the model.
    """

    def __init__(self, method: Callable | None = None):
        self._reference = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args) -> None:
        alive = self._reference and self._reference()
        if alive:
            alive(*args)

    def __reduce__(self) -> tuple:
        return _WeakMethod, ()


class GaLoreHooks(Hooks):
    """Tell the training loop which steps choose subspaces, and release the gradients' hooks at the end."""

    def step_kind(self, optimizer: GaLore) -> bool:
        return optimizer.refreshes

    def end(self, optimizer: GaLore) -> None:
        optimizer.close()


def galore(model: nn.Module, options: GaLoreOptions) -> nn.Module:
    """Train all parameters, by an optimizer that works in subspaces of the gradients."""
    return model.requires_grad_(True)


def _make_optimizer(model: nn.Module, options: GaLoreOptions, *, lr: float, weight_decay: float) -> GaLore:
    groups = decay_groups(model, weight_decay)
    return GaLore(groups, lr=lr, rank=options.rank, gap=options.gap, scale=options.scale)


register(
    "galore",
    galore,
    searched(demo_cnn_digits=5e-3, demo_cnn_textures=1e-2)
    | rates(f"as full; {NOT_TRIED}", demo_vit=1e-3, default=1e-4),
    GaLoreOptions,
    batch_norm="updated",
    scales_gradients=False,  # they are projected before a GradScaler sees them
    make_optimizer=_make_optimizer,
    hooks=GaLoreHooks,
)
