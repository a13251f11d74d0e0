"""A recorded step: what the loop computes does not change, and its profile is that of fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from toolkit.budget import TensorMemory, tensors_of
from toolkit.budget.checkpointing import find_segments
from toolkit.budget.profile import profile
from toolkit.budget.recording import Recording
from toolkit.budget.step import segmented

X, Y = torch.randn(8, 6, 16), torch.randint(0, 5, (8, 6))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):  # (B, N, 16)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


class InPlaceBlock(Block):
    def forward(self, x):
        return F.relu(super().forward(x).mul_(2), inplace=True)


class SpectralBlock(Block):
    """Its buffers change in the forward pass after they were read."""

    def __init__(self):
        super().__init__()
        self.up = spectral_norm(self.up)


class ValueDependentBlock(Block):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum().item() > 0 else 0.5)


def network(block=Block):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*[block() for _ in range(3)]), nn.Linear(16, 5))


def loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def one_forward(model):
    loss(model(X), Y).backward()


def two_forwards(model):
    (loss(model(X), Y) + loss(model(X[:3].flip(1)), Y[:3])).backward()


def two_backwards(model):
    outputs = model(X)
    loss(outputs, Y).backward(retain_graph=True)
    outputs.square().mean().backward()


def gradient_penalty(model):
    x = X.clone().requires_grad_()
    outputs = model(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    (loss(outputs, Y) + slope.square().mean()).backward()


def recorded(model, step):
    """Run `step` while it is recorded."""
    recording = Recording(model)
    forward = model.forward
    model.forward = lambda *args: recording.run(forward, *args)
    try:
        with segmented(find_segments(model), recording.tape.block_ended):
            step(model)
    finally:
        del model.forward
    return recording


def result(model, run):
    torch.manual_seed(1)
    made = run(model)
    gradients = [p.grad for p in model.parameters()]
    return made, [*gradients, *(b.clone() for b in model.buffers()), torch.get_rng_state()]


@pytest.mark.parametrize("step", [one_forward, two_forwards, two_backwards, gradient_penalty])
@pytest.mark.parametrize("block", [Block, InPlaceBlock, SpectralBlock, ValueDependentBlock])
def test_recording_changes_nothing(block, step):
    _, plain = result(network(block), step)
    recording, seen = result(network(block), lambda model: recorded(model, step))
    recording.stop()
    assert len(plain) == len(seen) and all(map(torch.equal, plain, seen))
    assert not recording.waits_for_backward
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_recorded_profile_is_that_of_fake_tensors():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    recording = recorded(model, one_forward)
    optimizer.step()
    optimizer.zero_grad()
    seen = recording.profile()
    fakes = profile(model, (X, Y), find_segments(model), loss=loss, optimizer=optimizer)
    assert (seen.segments, seen.entered, seen.forward_end) == (
        fakes.segments,
        fakes.entered,
        fakes.forward_end,
    )
    assert seen.ops == fakes.ops
    scalars = 4 * 512  # of the loss
    assert abs(seen.start_bytes - fakes.start_bytes) <= scalars
    assert abs(int(seen.base.max()) - int(fakes.base.max())) <= scalars


def test_modes_entered_around_and_inside_the_step_are_left_in_any_order():
    model = network()
    with TensorMemory(torch.device("cpu")) as outer:
        recording = Recording(model)
        blocks = segmented(find_segments(model), recording.tape.block_ended)
        with TensorMemory(torch.device("cpu")) as inner, blocks:
            out = recording.run(model, X)
        loss(out, Y).backward()
        recording.stop()
        assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == [outer]
    assert outer.peak_bytes >= inner.peak_bytes > 0


def test_what_the_loop_holds_is_found_when_the_step_reads_it():
    model, teacher = network(), network()
    held = sum(-(-t.nbytes // 512) * 512 for t in tensors_of(teacher))

    recording = Recording(model)
    with segmented(find_segments(model), recording.tape.block_ended):
        out = recording.run(model, X)
    with torch.no_grad():
        target = teacher(X)
    F.mse_loss(out, target).backward()
    del out, target
    assert recording.profile().fixed["other"] == held
