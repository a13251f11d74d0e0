"""AdaLoRA's part in a training loop: its orthogonality term, and ranks that move to where they matter.

peft has the arithmetic (`update_and_allocate`), but a loop has to call it in every step, tell it how many
steps there are, and add the penalty, or AdaLoRA silently is LoRA with 1.5 times the ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from toolkit.budget.memory import rounded
from toolkit.errors import InputError

# Shares of all steps before the first rank is taken away, and after the last one (t_i and t_f of Zhang et
# al. 2023, arXiv 2303.10512; these values are ours).
WARMUP, FINAL = 0.1, 0.3
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's allocator, each by parameter


class RankAllocation:
    """Moves the ranks of an AdaLoRA model during training, until they add up to the target."""

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
        (Frobenius) over the adapted layers, as peft has it for models that return their loss; eq. 4."""
        terms = []
        for name, p in self.tuner.named_parameters():
            if f"lora_A.{self.name}" in name or f"lora_B.{self.name}" in name:
                with torch.autocast(p.device.type, enabled=False):  # a difference of nearly equal numbers
                    product = p @ p.T if "lora_A" in name else p.T @ p  # (rank, rank)
                    terms.append(torch.linalg.norm(product - torch.eye(len(product), device=p.device)))
        return self.config.orth_reg_weight * torch.stack(terms).mean()

    def update(self, step: int, finite: bool = True) -> None:
        """After optimizer step `step` (from 1), while the gradients are there.

        `finite`: whether they are all numbers; others, for which a GradScaler skips the step, would spoil
        the scores for good.
        """
        if finite or step >= self.config.total_step - self.config.tfinal:  # from there on no score is read
            self.tuner.update_and_allocate(step)

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank of each adapted layer; empty before the first allocation."""
        pattern = self.config.rank_pattern or {}
        return {name.split(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    @property
    def state_bytes(self) -> int:
        """What the scores take: three numbers for each of the adapters'."""
        adapters = (p for name, p in self.tuner.named_parameters() if "lora_" in name and self.name in name)
        return sum(len(_SCORES) * rounded(p.nbytes) for p in adapters)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The scores so far."""
        return [score for name in _SCORES for score in getattr(self.allocator, name).values()]

    def state(self) -> dict:
        """What an interrupted run needs to go on."""
        scores = {name: getattr(self.allocator, name) for name in _SCORES}
        return {**scores, "rank_pattern": self.config.rank_pattern}

    def load_state(self, state: dict) -> None:
        """Go on from `state()`, on the devices of the parameters."""
        self.config.rank_pattern = state["rank_pattern"]
        parameters = dict(self.tuner.model.named_parameters())
        for name in _SCORES:
            scores = {key: score.to(parameters[key].device) for key, score in state[name].items()}
            setattr(self.allocator, name, scores)


def allocation_of(model: nn.Module) -> RankAllocation | None:
    """How the ranks of `model` are to be moved; None if its method has no such thing."""
    return RankAllocation(model) if hasattr(getattr(model, "base_model", None), "rankallocator") else None
