"""GaLore: AdamW in a low-rank subspace of the gradients (Zhao et al. 2024, arXiv 2403.03507).

All weights train, as under `full`, but what the optimizer keeps of a weight matrix (m, n) is of rank r: its
gradient G is projected on the top singular vectors of an earlier gradient, P' G (r, n) with P (m, r) where
m <= n and G P (m, r) with P (n, r) otherwise; Adam runs there, and its update is projected back.
Convolutions are matrices (out, in / groups * height * width).  What is 1-D, depthwise, or no wider than the
rank is left to AdamW itself.

Each gradient is projected as soon as backward has made it (as in LOMO, Lv et al. 2023, arXiv 2306.09782),
so the gradients of all layers are never there together.

With a rank that leaves nothing to project this is `torch.optim.AdamW`, bit for bit.  A full-rank P would
not be: Adam works on single numbers, and in rotated axes its first step is another one (on Gaussian
gradients of 64 x 128 it differs from AdamW's by 0.89 of its norm).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw

from toolkit.errors import InputError


class GaLore(torch.optim.Optimizer):
    """AdamW whose moments, and gradients between backward and step, are of rank `rank` at most.

    `gap`: steps from one choice of the subspace to the next; the moments stay what they are then, as in the
    authors' code.  `scale`: of the projected updates (alpha in the paper).  `spectrum`: the share of a
    gradient's squared singular values that the subspace holds, with `rank` as the most; decided once, by the
    first gradient; 0: always `rank`.  Weight decay is AdamW's, on the weights themselves.

    Projected parameters have no `.grad` after backward.  Gradients of several backward passes add up until
    `zero_grad()` of this optimizer (that of the model does not reach them); clipping and `GradScaler` do not
    see them.  A gradient that is set by hand is taken in `step()`.  A later `GaLore` of the same parameters
    takes over; call `close()` before any other optimizer does while this one is alive.  Raises `InputError`
    for options that mean nothing.

    On fake tensors the subspace is chosen anew in every step, so that what is planned holds in all of them.
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
        spectrum: float = 0.0,
    ):
        if rank < 1 or gap < 1 or not scale > 0 or not 0 <= spectrum <= 1:
            raise InputError(
                "GaLore needs rank >= 1, gap >= 1, scale > 0 and a spectrum between 0 and 1, "
                f"got {rank}, {gap}, {scale} and {spectrum}."
            )
        self._gradients: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> sum of projected gradients
        self._group_of: dict[torch.Tensor, int] = {}
        self._hooks: list = []
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings |= {"rank": rank, "gap": gap, "scale": scale, "spectrum": spectrum}
        # `fused`: torch then puts a loaded "step" on the parameter's device.  `steps`: done so far.
        super().__init__(params, settings | {"fused": True, "steps": 0})

    def add_param_group(self, group: dict) -> None:
        """Add parameters; those that are projected give up their gradients from now on."""
        super().add_param_group(group)
        project = _Weakly(self._project)
        for parameter in self.param_groups[-1]["params"]:
            self._group_of[parameter] = len(self.param_groups) - 1
            if is_projected(parameter, self.param_groups[-1]["rank"]) and parameter.requires_grad:
                if hasattr(parameter, "galore_hook"):  # of an older one, that a traceback may keep alive
                    parameter.galore_hook.remove()
                parameter.galore_hook = parameter.register_post_accumulate_grad_hook(project)
                self._hooks.append(parameter.galore_hook)

    def close(self) -> None:
        """Take no gradients any more, and forget those that are there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._gradients.clear()

    @property
    def gradients(self) -> dict[torch.Tensor, torch.Tensor]:
        """Projected parameter -> its gradient in the subspace, (r, n) or (m, r); since `zero_grad()`."""
        return dict(self._gradients)

    @property
    def refreshes(self) -> bool:
        """Whether the next step chooses the subspaces anew."""
        return any(group["steps"] % group["gap"] == 0 for group in self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, the projected ones too."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

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
                    if parameter in self._gradients:
                        self._step_projected(parameter, group)
                elif parameter.grad is not None:
                    whole.append(parameter)
            self._adam(whole, [p.grad for p in whole], [self._state(p, p) for p in whole], group)
            group["steps"] += 1
        return loss

    def _project(self, parameter: torch.Tensor) -> None:
        """Add the gradient to its sum in the subspace, and let go of it."""
        if parameter.grad is None:  # another hook has taken it
            return
        with torch.no_grad():
            gradient = parameter.grad.permute(_order(parameter)).reshape(len(parameter), -1)
            wide = gradient.shape[0] <= gradient.shape[1]
            if parameter not in self._gradients:
                self._choose_subspace(parameter, gradient, wide)
                rank = self.state[parameter]["projector"].shape[1]
                shape = (rank, gradient.shape[1]) if wide else (gradient.shape[0], rank)
                self._gradients[parameter] = gradient.new_zeros(shape)
            projector = self.state[parameter]["projector"]
            factors = (projector.mT, gradient) if wide else (gradient, projector)
            _add_product(self._gradients[parameter], *factors)
        parameter.grad = None

    def _choose_subspace(self, parameter: torch.Tensor, gradient: torch.Tensor, wide: bool) -> None:
        """Set the projector (smaller side, rank) if that is due.

        Called at the first gradient of a step.  Until the step is made, nothing but a later choice reads
        what is written here: so a step that was given up can be repeated.
        """
        state, group = self.state[parameter], self.param_groups[self._group_of[parameter]]
        fake = isinstance(parameter, FakeTensor)
        if "projector" in state and group["steps"] % group["gap"] and not fake:
            return
        kind = torch.promote_types(gradient.dtype, torch.float32)
        try:
            left, values, right = torch.linalg.svd(gradient.to(kind), full_matrices=False)
        except torch.linalg.LinAlgError:  # not finite: the loss is lost anyway, and its owner shall see that
            side = min(gradient.shape)
            left = right = torch.eye(side, dtype=kind, device=gradient.device)
            values = left.new_ones(side)
        vectors = left if wide else right.mT
        if "exp_avg" in state:  # the rank has been decided
            state["projector"].copy_(vectors[:, : state["projector"].shape[1]])
            return
        rank = group["rank"]
        if group["spectrum"] and not fake:
            rank = min(rank, _rank_of_spectrum(values, group["spectrum"]))
        chosen = vectors[:, :rank].to(gradient.dtype)
        state["projector"] = chosen.clone(memory_format=torch.contiguous_format)

    def _step_projected(self, parameter: torch.Tensor, group: dict) -> None:
        """AdamW's step of a weight (m, n) with the update of rank r."""
        gradient = self._gradients[parameter]
        state = self._state(parameter, gradient)
        update = torch.zeros_like(gradient)  # what Adam makes of a weight of zeros is its update
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
    """(m, n) of the matrix that a parameter of two dimensions or more is."""
    return len(parameter), parameter[0].numel()


def is_projected(parameter: torch.Tensor, rank: int) -> bool:
    """Whether `parameter` is a matrix wider than `rank`; depthwise convolutions are none."""
    if parameter.dim() < 2 or (parameter.dim() > 2 and parameter.shape[1] == 1):
        return False
    return min(matrix_shape(parameter)) > rank


def _order(parameter: torch.Tensor) -> list[int]:
    """Dimensions as they lie in memory after the first, so that channels-last weights are matrices too."""
    return [0, *sorted(range(1, parameter.dim()), key=parameter.stride, reverse=True)]


def _rank_of_spectrum(values: torch.Tensor, share: float) -> int:
    """How many of the sorted singular values have this share of the sum of their squares; of zeros, all."""
    sums = values.square().cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1 if sums[-1] > 0 else len(values)


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, alpha: float = 1.0) -> None:
    """total += alpha * first @ second, in place.

    Dispatch modes do not see it: it allocates nothing, and counters of a step's FLOPs leave optimizers out.
    """
    if isinstance(total, FakeTensor):
        return
    with torch._C._DisableTorchDispatch():
        total.addmm_(first, second, alpha=alpha)


class _Weakly:
    """`method` as long as its object lives: a hook of a parameter shall not keep an optimizer alive, nor go
    with a model that is copied or saved whole."""

    def __init__(self, method: Callable | None = None):
        self._reference = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args) -> None:
        alive = self._reference and self._reference()
        if alive:
            alive(*args)

    def __reduce__(self) -> tuple:
        return _Weakly, ()
