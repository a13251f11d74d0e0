"""Functions around a module's forward."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from toolkit.budget.wrapping import Wrapping, own_class, wrappings_of


class Registering(nn.Module):
    """A base class that knows its subclasses and changes their forward, as the layers of transformers do."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls):
        cls.known.append(cls.__name__)
        forward = cls.forward
        cls.forward = lambda self, x: forward(self, x)


class Doubling(Registering):
    def forward(self, x):
        return 2 * x


def counting(calls, name):
    def around(forward, *args):
        calls.append(name)
        return forward(*args)

    return around


@pytest.mark.parametrize("kind", [Doubling, nn.Identity])
def test_wrappings_come_and_go_in_any_order(kind):
    module, calls, x = kind(), [], torch.ones(2)
    expected = kind()(x)
    first, second, third = (Wrapping(module, counting(calls, name)) for name in "abc")
    for removed, left in ((None, "cba"), (second, "ca"), (first, "c"), (first, "c"), (third, "")):
        if removed is not None:
            removed.remove()
        calls.clear()
        assert torch.equal(module(x), expected) and torch.equal(module.forward(x), expected)
        assert "".join(calls) == 2 * left
    assert type(module) is own_class(module) is kind and not wrappings_of(module)
    assert Registering.known == ["Doubling"]


def test_a_subclass_made_on_top_of_a_wrapped_module_survives_its_end():
    module, calls = Doubling(), []
    wrapping = Wrapping(module, counting(calls, "a"))
    module.__class__ = type("Sharded", (type(module),), {})  # as FSDP2 does
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0)) and calls == ["a"]
    wrapping.remove()
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0)) and calls == ["a"]
    assert type(module).__name__ == "Sharded"
