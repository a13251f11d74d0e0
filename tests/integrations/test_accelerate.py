"""Budgets in loops of accelerate."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from programs import Run, Watch, held

from toolkit.integrations.accelerate import keep_budget


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("prepared_first", [True, False])
def test_accelerate_keeps_its_budget(precision, prepared_first):
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32, generator=draw), torch.randint(0, 10, (16,), generator=draw)

    def program(budget):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        network = VisionTransformer(
            img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, num_classes=10
        )
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
        handle = None
        if budget is not None and not prepared_first:
            handle = keep_budget(accelerator, network, budget, optimizer=optimizer)
        model, optimizer = accelerator.prepare(network, optimizer)
        if budget is not None and prepared_first:
            handle = keep_budget(accelerator, model, budget, optimizer=optimizer)
        watch = Watch()
        for _ in range(4):
            watch.step_begins(network, images, labels)
            outputs = model(images)
            accelerator.backward(F.cross_entropy(outputs, labels))
            optimizer.step()
            optimizer.zero_grad()
            assert outputs.dtype == torch.float32  # accelerate converts what autocast makes
            del outputs
        return Run(network, watch.training_ends(), handle)

    held(program, share=0.75)
