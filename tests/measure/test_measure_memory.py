"""Memory over a step by phase and block, and by category."""

import timm
import torch
from torch import nn

from toolkit.budget import Checkpointing, TensorMemory, device_memory
from toolkit.budget.fakes import on_fake_tensors
from toolkit.budget.optimizers import optimizer_like
from toolkit.budget.step import run_step
from toolkit.measure.memory import MemoryTrace, memory_of_step
from toolkit.methods.galore import GaLore

CPU = torch.device("cpu")


def trace_step(model, batch):
    """Trace of one AdamW step, and its memory counter."""
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), *batch])
    trace = MemoryTrace(memory, model)
    run_step(model, batch, None, optimizer_like("adamw", model)(model), "fp32", memory, trace)
    return trace.segments, memory


def test_trace_follows_the_counter():
    memory = TensorMemory(CPU)
    weight = torch.ones(1024, requires_grad=True)
    with memory, MemoryTrace(memory, nn.Linear(1, 1)) as trace:
        loss = (weight * 2).sum()
        loss.backward()
        trace.start_optimizer()
        weight.grad.mul_(2)
    phases = [(segment["phase"], segment["block"]) for segment in trace.segments]
    assert phases == [("forward", None), ("backward", None), ("optimizer", None)]
    assert trace.segments[0]["bytes"][:2] == [4096, 4096 + 512], "the product, and its sum"
    assert trace.segments[-1]["bytes"] == [memory.allocated_bytes]


def test_blocks_in_the_order_of_a_step_with_frozen_parameters(demo_model, batch):
    """LoRA: most parameters are frozen, so torch's own tracker could not hook them."""
    segments, memory = trace_step(demo_model("lora"), batch)
    order = [(segment["phase"], segment["block"]) for segment in segments]
    blocks = [f"base_model.model.blocks.{i}" for i in range(4)]
    assert [block for phase, block in order if phase == "forward" and block] == blocks
    assert [block for phase, block in order if phase == "backward" and block] == blocks[::-1]
    assert not [phase for phase, _ in order if phase == "recompute"]
    assert order[-1] == ("optimizer", None)
    assert max(max(segment["bytes"]) for segment in segments) == memory.peak_bytes


def test_recomputation_belongs_to_its_block(demo_model, batch):
    model = demo_model("bitfit")
    with Checkpointing(model, "static", memory=device_memory(CPU), budget_bytes=1):
        segments, _ = trace_step(model, batch)
    order = [(segment["phase"], segment["block"]) for segment in segments]
    recomputed = [block for phase, block in order if phase == "recompute"]
    assert recomputed == [f"blocks.{i}" for i in (3, 2, 1, 0)]
    for block in recomputed:
        assert order.index(("recompute", block)) < len(order) - 1 - order[::-1].index(("backward", block))


def test_tracing_leaves_no_hooks(demo_model, batch):
    model = demo_model("full")
    trace_step(model, batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def adam_step(model, images):
    """Memory of an AdamW step on the sum of the outputs."""

    def make_optimizer(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    return memory_of_step(model, images, None, make_optimizer)


def test_categories_partition_the_memory(demo_model, batch):
    model = demo_model("full")
    memory = adam_step(model, batch[0])
    assert sum(memory.category_bytes.values()) == memory.allocated_bytes
    parameters = sum(-(-p.numel() * 4 // 512) * 512 for p in model.parameters())
    assert memory.category_bytes["parameters"] == memory.category_peaks["gradients"] == parameters
    assert 2 * parameters <= memory.category_peaks["optimizer"] < 2.2 * parameters
    assert sum(memory.category_peaks.values()) > memory.peak_bytes, "the maxima do not coincide"


def test_frozen_parameters_have_no_gradients(demo_model, batch):
    memory = adam_step(demo_model("lora"), batch[0])
    assert 0 < memory.category_peaks["gradients"] < memory.category_peaks["parameters"] / 4


def test_gradients_of_a_fused_optimizer_are_counted_whole_and_projected():
    """One layer's whole gradient at a time, and the projected ones; the projectors are the optimizer's."""
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
    x, size, projected = torch.randn(4, 128), 4 * 128 * 128, 4 * 4 * 128
    memory = memory_of_step(model, x, None, lambda m: GaLore(m.parameters(), rank=4, gap=1))
    assert memory.category_peaks["gradients"] == size + 7 * projected
    assert memory.category_bytes["gradients"] == 0, "none is left"
    assert memory.category_bytes["optimizer"] == 8 * (3 * projected + 512), "projector, moments, step"


def test_fake_tensors_take_the_bytes_of_real_ones():
    images = torch.randn(2, 3, 64, 64)
    real = adam_step(timm.create_model("resnet18"), images)
    model = timm.create_model("resnet18")
    with on_fake_tensors(model, images) as fake_images:
        fake = adam_step(model, fake_images)
    assert (fake.peak_bytes, fake.category_peaks) == (real.peak_bytes, real.category_peaks)
