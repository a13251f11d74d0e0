"""The CPU's memory counter against sums done by hand.  float32, so a tensor of n elements has 4n bytes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.budget import TensorMemory

CPU = torch.device("cpu")


def test_tensors_are_counted_while_they_live():
    memory = TensorMemory(CPU)
    with memory:
        a = torch.zeros(1024)  # 4096 bytes
        b = torch.zeros(2048)  # 8192
        assert memory.allocated_bytes == 12288
        del a
        assert memory.allocated_bytes == 8192
        c = b * 2
        assert memory.allocated_bytes == 16384
    del b, c
    assert memory.allocated_bytes == 0, "tensors that die outside the mode are given back too"
    assert memory.peak_bytes == 16384


def test_views_and_in_place_operators_cost_nothing():
    memory = TensorMemory(CPU)
    with memory:
        a = torch.zeros(64, 16)
        b = a.view(16, 64).t()[3:]
        b.add_(1)
        del a
        assert memory.allocated_bytes == 4096, "the view keeps the storage"


def test_sizes_are_rounded_up_to_512():
    memory = TensorMemory(CPU)
    with memory:
        a = torch.zeros(1)
        b = torch.zeros(129)  # 516 bytes
        assert memory.allocated_bytes == 512 + 1024
        del a, b


def test_outside_tensors_count_once_tracked():
    memory = TensorMemory(CPU)
    weight = torch.nn.Parameter(torch.zeros(1024))
    memory.track([weight, weight, weight.data])
    assert memory.allocated_bytes == 4096


def test_other_devices_are_not_counted():
    memory = TensorMemory(CPU)
    with memory:
        a = torch.zeros(1024, device="meta")
    memory.track([a])
    assert memory.allocated_bytes == 0


def test_a_training_step_by_hand():
    """x (8, 256) through Linear(256, 512), sum, backward: 1.5 KiB rounding aside, every byte is known."""
    memory = TensorMemory(CPU)
    layer, x = torch.nn.Linear(256, 512), torch.randn(8, 256)
    memory.track([*layer.parameters(), x])
    weights = 512 * 256 * 4 + 512 * 4
    assert memory.allocated_bytes == weights + 8 * 256 * 4
    with memory:
        y = layer(x)  # (8, 512)
        assert memory.allocated_bytes == weights + 8 * 256 * 4 + 8 * 512 * 4
        loss = y.sum()
        loss.backward()
        del y, loss
    assert memory.allocated_bytes == 2 * weights + 8 * 256 * 4, "what stays is one gradient per weight"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3000)), max_size=30))
def test_law_allocated_is_the_sum_of_the_living(actions):
    """Allocate into and drop from six slots in any order."""
    memory, slots, peak = TensorMemory(CPU), {}, 0
    for slot, size in actions:
        slots.pop(slot, None)
        if size:
            with memory:
                slots[slot] = torch.empty(size)
        living = sum(-(-4 * t.numel() // 512) * 512 for t in slots.values())
        peak = max(peak, living)
        assert memory.allocated_bytes == living
    assert memory.peak_bytes == peak
