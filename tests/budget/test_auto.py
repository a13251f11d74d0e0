"""auto_checkpoint in loops that know nothing of it, and the guard."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import toolkit
from toolkit.budget import TensorMemory
from toolkit.errors import InputError


def peak_of_steps(model, optimizer, forward, steps=2):
    """Peak bytes of the last of some training steps; `forward()` returns the loss and held tensors."""
    memory = TensorMemory(torch.device("cpu"))
    memory.track([*model.parameters(), *model.buffers()])
    memory.track(value for state in optimizer.state.values() for value in state.values())
    for _ in range(steps):
        memory.reset_peak()
        with memory:
            loss, held = forward(memory)
            loss.backward()
            del held
            optimizer.step()
            optimizer.zero_grad()
            del loss
    return memory.peak_bytes


def image_loop(model, x, y):
    def forward(memory):
        memory.track([x, y])
        outputs = model(x)
        return F.cross_entropy(outputs, y), outputs

    return forward


def gradients(model, x, y):
    model.zero_grad()
    torch.manual_seed(0)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_plain_loop_on_a_torchvision_resnet50_keeps_its_budget():
    model = torchvision.models.resnet50(num_classes=10).train()
    x, y = torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    stock = peak_of_steps(model, optimizer, image_loop(model, x, y))
    statistics = [b.clone() for b in model.buffers()]
    before = gradients(model, x, y)
    model.load_state_dict(model.state_dict() | dict(zip([n for n, _ in model.named_buffers()], statistics)))
    with toolkit.auto_checkpoint(model, int(0.93 * stock), (x, y), optimizer=optimizer) as handle:
        assert equal(gradients(model, x, y), before)
        model.zero_grad()
        peak = peak_of_steps(model, optimizer, image_loop(model, x, y))
    assert peak == handle.plan.peak_bytes <= 0.93 * stock
    assert handle.departures == handle.replans == 0
    assert "forward" not in vars(model)


def test_a_plain_loop_on_a_transformers_vit_keeps_its_budget():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=64,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    batch = {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 2, (8,))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def forward(memory):
        memory.track(batch.values())
        outputs = model(**batch)
        return outputs.loss, outputs

    stock = peak_of_steps(model, optimizer, forward)
    with toolkit.auto_checkpoint(model, int(0.8 * stock), batch, optimizer=optimizer) as handle:
        peak = peak_of_steps(model, optimizer, forward)
    assert peak <= handle.plan.peak_bytes <= 0.8 * stock
    assert handle.departures == handle.replans == 0


def test_gradients_accumulate_over_two_passes(demo_model, batch):
    model, plain = demo_model("full"), demo_model("full")
    x, y = batch
    with toolkit.auto_checkpoint(model, "14MB", batch) as handle:
        for m in (model, plain):
            for _ in range(2):
                F.cross_entropy(m(x), y).backward()
    assert handle.plan.recompute_flops > 0
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters()))


def test_evaluation_is_not_changed_and_fewer_samples_need_no_new_plan(demo_model, batch):
    model = demo_model("full")
    x, y = batch
    with toolkit.auto_checkpoint(model, "14MB", batch) as handle:
        with torch.no_grad():
            model(torch.cat([x, x, x]))
        assert equal(
            gradients(model, x[:5], y[:5]), gradients(copy.deepcopy(demo_model("full")), x[:5], y[:5])
        )
        assert handle.replans == 0


def test_another_shape_mode_or_precision_gets_a_new_plan(demo_model, batch):
    model = demo_model("full")
    x, _ = batch
    with toolkit.auto_checkpoint(model, "40MB", batch) as handle:
        model(torch.cat([x, x]))
        assert (handle.replans, handle.plan.batch_size) == (1, 64)
        model.eval()
        model(x)
        assert handle.replans == 2
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert handle.replans == 3 and handle.departures == 0


def test_a_peak_above_the_prediction_makes_the_plan_tighter(demo_model, batch):
    model = demo_model("full")
    with toolkit.auto_checkpoint(model, "14MB", batch) as handle:
        before = handle.plan.peak_bytes
        handle.check(before)
        assert handle.replans == 0
        with pytest.warns(UserWarning, match="more than predicted"):
            handle.check(14_000_000 + 10**6)
        assert handle.plan.peak_bytes <= 14_000_000 - (15_000_000 - before)
        assert equal(gradients(model, *batch), gradients(demo_model("full"), *batch))
        with pytest.raises(InputError, match="cannot be held"):
            handle.tighten(10**6)


def test_an_infeasible_budget_leaves_the_model_unchanged(demo_model, batch):
    model = demo_model("lora")
    with pytest.raises(InputError, match=r"smallest peak for batch 32 is .* MiB"):
        toolkit.auto_checkpoint(model, "1MB", batch)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_compiled_model_and_one_under_ddp_train_the_same(demo_model, batch):
    plain = gradients(demo_model("full"), *batch)
    model = demo_model("full")
    with toolkit.auto_checkpoint(model, "14MB", batch):
        assert equal(gradients(torch.compile(model, backend="eager"), *batch), plain)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(demo_model("full"))
        with toolkit.auto_checkpoint(wrapped, "14MB", batch) as handle:
            assert equal(gradients(wrapped, *batch), plain)
        assert handle.plan.recompute_flops > 0
    finally:
        torch.distributed.destroy_process_group()


def test_a_plan_does_not_keep_the_batch_alive():
    """On a GPU it would take memory in addition to the loop's own batch."""
    model, memory = (
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        TensorMemory(torch.device("cpu")),
    )
    images, wider = torch.randn(4, 8), torch.randn(9, 8)
    memory.track([images, wider])
    with toolkit.auto_checkpoint(model, "1MB", images) as handle:
        del images
        model(wider).sum().backward()
        del wider
        assert handle.replans == 1 and handle.plan.batch_size == 9
        assert memory.allocated_bytes == 0


class Concatenation(nn.Module):
    """A block that takes one list, as those of DenseNet do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, parts):  # of (B, 4)
        return self.layer(torch.cat(parts, dim=1)).relu()


class ListNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Concatenation() for _ in range(3))

    def forward(self, x):  # (B, 8)
        for block in self.blocks:
            x = block(list(x.split(4, dim=1)))
        return x


def test_blocks_that_take_one_list_are_planned():
    batch = torch.randn(16, 8), torch.arange(16) % 8
    with toolkit.auto_checkpoint(ListNet(), "1GB", batch) as handle:
        assert list(handle.plan.levels) == ["blocks.0", "blocks.1", "blocks.2"]
