"""Full fine-tuning: everything trains."""

from __future__ import annotations

from torch import nn

from toolkit.errors import Options
from toolkit.methods.registry import NOT_TRIED, SCRIPTS, TUNED_ON, rates, register, searched


def full(model: nn.Module, options: Options | None = None) -> nn.Module:
    """Train all parameters."""
    return model.requires_grad_(True)


# The published scripts train everything and adapters alike at 5e-4, where full fine-tuning ends 6 points
# below LoRA; hence the lower default.
register(
    "full",
    full,
    searched(demo_vit=1e-3, demo_swin=2e-3, demo_cnn_digits=5e-3)
    | rates(TUNED_ON.format("digits and textures"), demo_cnn=5e-3)
    | rates(f"{TUNED_ON.format('textures-c:mixed:3')}; 5e-2 was not tried", demo_cnn_textures=2e-2)
    | rates(SCRIPTS, vim_small=1e-4)
    | rates(f"{NOT_TRIED}; 5e-4 in the {SCRIPTS}", default=1e-4),
    batch_norm="updated",
)
