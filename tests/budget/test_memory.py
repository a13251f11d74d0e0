"""The CPU's memory counter against sums done by hand.  float32, so a tensor of n elements has 4n bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.budget import TensorMemory, format_bytes, parse_bytes
from toolkit.errors import InputError

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
def test_law_allocated_bytes_are_the_sum_of_live_tensors(actions):
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("800 MB", 800_000_000),
        ("28 mib", 28 * 2**20),
        ("  64kib ", 65536),
        (".5 GiB", 2**29),
        ("123", 123),
        (123, 123),
    ],
)
def test_sizes_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "two GB", "-1GB", "-5", "0", "0 GB", "1e9", "2 GX", "GB", "1 2GB", "nan", None]
)
def test_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)


@given(st.integers(1, 2**50))
def test_plain_bytes_are_exact(count):
    assert parse_bytes(count) == parse_bytes(str(count)) == parse_bytes(f"{count} B") == count


@given(st.integers(1, 2**40), st.sampled_from(["kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_whole_units_are_exact(number, unit):
    factor = (1024 if "i" in unit else 1000) ** ("kmg".index(unit[0].lower()) + 1)
    assert parse_bytes(f"{number} {unit}") == number * factor


def test_sizes_are_shown_in_the_largest_unit_that_they_reach():
    assert format_bytes(512) == "512 bytes"
    assert format_bytes(3 * 2**9) == "1.5 KiB"
    assert format_bytes(28 * 2**20) == "28.0 MiB"
    assert format_bytes(3 * 2**29) == "1.50 GiB"
