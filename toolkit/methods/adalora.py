"""AdaLoRA: low-rank updates whose ranks move between layers (Zhang et al. 2023, arXiv 2303.10512).

peft has the arithmetic (`update_and_allocate`), but a training loop has to call it in every step, tell it the
number of steps, and add the orthogonality penalty; otherwise AdaLoRA is LoRA with 1.5 times the ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from toolkit.budget.memory import rounded
from toolkit.errors import InputError
from toolkit.methods.low_rank import LoraOptions, attach
from toolkit.methods.registry import SCRIPTS, Hooks, rates, register, searched
from toolkit.methods.targets import narrow_layers, targets_of

# AdaLoRA starts with 1.5 times the ranks that it ends with, as peft's defaults do (12 and 8).
INITIAL_RANK_FACTOR = 1.5
# Shares of all steps before the first rank is removed, and after the last one (t_i and t_f in the paper;
# these values are ours).
WARMUP, FINAL = 0.1, 0.3
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's allocator, each by parameter


def adalora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Low-rank updates that end with a mean rank of `rank`.

    peft has one initial rank for all layers.  With `clip_rank` narrow layers start with fewer here: save such
    adapters by `toolkit.save_adapted`, as plain peft would build them too large.
    """
    rank, initial_rank = options.rank, _initial_rank(options.rank)
    targets = targets_of(model, "adalora", options.targets, options.depthwise)
    narrow = narrow_layers(model, targets, rank, options.clip_rank, start=_initial_rank)
    limits = [narrow.get(layer, initial_rank) for layer in targets.adapted]
    target = sum(min(rank, limit) for limit in limits)
    if target == sum(limits):
        raise InputError(
            f"at rank {rank} every layer has all ranks that it allows, {max(limits)} at most, so adalora has "
            "none to move; choose a lower rank, or method 'lora'."
        )
    wrapped = attach(
        model,
        targets,
        "AdaLoraConfig",
        target_r=rank,
        init_r=initial_rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        total_step=1,  # unknown yet: see RankAllocation.begin
    )
    if narrow:
        tuner = wrapped.base_model
        name = tuner.trainable_adapter_name
        config = tuner.peft_config[name]
        for layer, most in narrow.items():
            alpha = options.alpha * most / initial_rank
            tuner.model.get_submodule(layer).update_layer(name, most, alpha, config=config)
        tuner.rankallocator = type(tuner.rankallocator)(tuner.model, config, name)
        tuner.rankallocator.target_bgt = target
    return wrapped


def _initial_rank(rank: int) -> int:
    return max(rank + 1, int(INITIAL_RANK_FACTOR * rank))


class RankAllocation(Hooks):
    """Move the ranks of an AdaLoRA model during training, until they add up to the target."""

    def __init__(self, model: nn.Module):
        self.tuner = model.base_model
        self.name = self.tuner.trainable_adapter_name
        self.config = self.tuner.peft_config[self.name]
        self.allocator = self.tuner.rankallocator

    def begin(self, total_steps: int) -> None:
        """Set the schedule for `total_steps` optimizer steps.  Raises `InputError` below 2."""
        if total_steps < 2:
            raise InputError(
                f"adalora cannot move ranks in {total_steps} training step(s): train for at least 2, by "
                "more epochs or a smaller batch_size."
            )
        self.config.tinit = int(WARMUP * total_steps)
        self.config.tfinal = int(FINAL * total_steps)
        self.config.deltaT = max(1, total_steps // 100)
        self.allocator.set_total_step(total_steps)

    def penalty(self) -> torch.Tensor:
        """The term that keeps P and Q orthogonal: gamma times the mean of ||P'P - I|| and ||QQ' - I||
        (Frobenius) over the adapted layers, as peft computes it for models that return their loss; eq. 4."""
        terms = []
        for name, p in self.tuner.named_parameters():
            if f"lora_A.{self.name}" in name or f"lora_B.{self.name}" in name:
                with torch.autocast(p.device.type, enabled=False):  # a difference of nearly equal numbers
                    product = p @ p.T if "lora_A" in name else p.T @ p  # (rank, rank)
                    terms.append(torch.linalg.norm(product - torch.eye(len(product), device=p.device)))
        return self.config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, step: int, *, finite: bool = True) -> None:
        """Update scores and move ranks; gradients that are not finite would spoil the scores for good."""
        if finite or step >= self.config.total_step - self.config.tfinal:  # no score is read from then on
            self.tuner.update_and_allocate(step)

    @property
    def ranks(self) -> dict[str, int]:
        """Current rank of each adapted layer; empty before the first allocation."""
        pattern = self.config.rank_pattern or {}
        return {name.split(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    @property
    def held_bytes(self) -> int:
        """Bytes of the scores: three numbers for each number of the adapters."""
        adapters = (p for name, p in self.tuner.named_parameters() if "lora_" in name and self.name in name)
        return sum(len(_SCORES) * rounded(p.nbytes) for p in adapters)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The scores so far."""
        return [score for name in _SCORES for score in getattr(self.allocator, name).values()]

    def state(self) -> dict:
        """Scores and ranks, which an interrupted run needs to continue."""
        scores = {name: getattr(self.allocator, name) for name in _SCORES}
        return {**scores, "rank_pattern": self.config.rank_pattern}

    def load_state(self, state: dict) -> None:
        """Continue from `state()`, on the devices of the parameters."""
        self.config.rank_pattern = state["rank_pattern"]
        parameters = dict(self.tuner.model.named_parameters())
        for name in _SCORES:
            scores = {key: score.to(parameters[key].device) for key, score in state[name].items()}
            setattr(self.allocator, name, scores)


register(
    "adalora",
    adalora,
    searched(demo_vit=2e-2, demo_cnn_digits=2e-2, demo_cnn_textures=1e-2)
    | rates(SCRIPTS, vim_small=1e-3, default=5e-4),
    LoraOptions,
    convolutions=("plain", "dilated"),
    hooks=RankAllocation,
)
