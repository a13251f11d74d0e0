"""Lean forms of frozen convolutions and batch norms are torch's: the same function in less memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_step import assert_close, fill, net, step
from timm.layers import BatchNormAct2d
from torch import nn

from toolkit.budget import LeanForms

pytestmark = pytest.mark.numerical

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=30)
@given(
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    bias_trains=st.booleans(),
    channels_last=st.booleans(),
    size=st.tuples(st.integers(1, 3), st.integers(5, 8), st.integers(5, 8)),
)
def test_a_frozen_convolution_gives_the_same_gradients_and_keeps_nothing(
    groups, per_group, kernel, stride, padding, dilation, bias, bias_trains, channels_last, size
):
    torch.manual_seed(0)
    inside, outside = (groups * count for count in per_group)
    layer = nn.Conv2d(inside, outside, kernel, stride, padding, dilation, groups, bias)
    layer.requires_grad_(False)
    if bias:
        layer.bias.requires_grad_(bias_trains)
    model = nn.Sequential(nn.Sigmoid(), layer)
    x = torch.randn(size[0], inside, *size[1:])
    if channels_last:
        x, model = x.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    lean, stock = (step(model, x, form)[0] for form in (True, False))
    assert_close(lean, stock, 1e-6 if channels_last else 0)
    forms = LeanForms(model)
    y = x.clone().requires_grad_()
    assert {tuple(t.shape) for t in saved_by(layer(y))} <= {tuple(layer.weight.shape), (outside,)}
    forms.remove()


def saved_by(y):
    return [t for t in y.grad_fn.saved_tensors if t is not None]


@pytest.mark.parametrize("trained", ["", "bias"])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.BatchNorm1d(6), (4, 6)),
        (lambda: nn.BatchNorm1d(6), (4, 6, 3)),
        (lambda: nn.BatchNorm2d(6, eps=1e-3), (2, 6, 3, 3)),
        (lambda: nn.BatchNorm2d(6, affine=False), (2, 6, 3, 3)),
        (lambda: nn.BatchNorm3d(6), (2, 6, 2, 2, 2)),
        (lambda: BatchNormAct2d(6), (2, 6, 3, 3)),
        (lambda: BatchNormAct2d(6, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.5)), (2, 6, 3, 3)),
    ],
)
def test_a_frozen_norm_gives_the_same_bits_and_keeps_no_input(make, shape, trained):
    torch.manual_seed(0)
    norm = make().requires_grad_(False).eval()
    fill(norm)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        norm.bias.requires_grad_(trained == "bias")
    model = nn.Sequential(norm, nn.Tanh())
    x = torch.randn(shape)
    (lean, kept_bytes), (stock, stock_kept_bytes) = (step(model, x, form) for form in (True, False))
    assert_close(lean, stock, 0)
    assert kept_bytes <= stock_kept_bytes
    inside = nn.Sequential(nn.Tanh(), norm)
    inputs = [t.shape for t in saved_tensors(inside, x, lean=True)]
    assert inputs.count(x.shape) < len([t for t in saved_tensors(inside, x, False) if t.shape == x.shape])


def saved_tensors(model, x, lean):
    """The tensors that autograd saves in a forward pass."""
    packed = []
    forms = LeanForms(model) if lean else None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        model(x.clone().requires_grad_())
    if forms is not None:
        forms.remove()
    return packed


def test_a_norm_that_trains_or_uses_the_batch_runs_as_in_torch():
    x = torch.randn(4, 3, 5, 5)
    training, weighted, none = (
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    for norm, mode in ((training, True), (weighted, False), (none, False)):
        norm.requires_grad_(norm is weighted).train(mode)
        (lean, kept_bytes), (stock, stock_kept_bytes) = (
            step(copy.deepcopy(norm), x, form) for form in (True, False)
        )
        assert_close(lean, stock, 0)
        assert kept_bytes == stock_kept_bytes
    assert training.num_batches_tracked == 0  # of the copies it is 1
    forms = LeanForms(training)
    training(x)
    forms.remove()
    assert training.num_batches_tracked == 1


@pytest.mark.parametrize("bias_trains", [True, False])
def test_frozen_layers_give_the_same_bits_under_autocast(bias_trains):
    model, x = net().requires_grad_(False).eval(), torch.randn(4, 3, 8, 8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bias_trains and name.endswith("bias"))
    lean, stock = (step(model, x, form, "bf16")[0] for form in (True, False))
    assert_close(lean, stock, 0)


def test_layers_may_be_called_by_keyword():
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]).requires_grad_(False).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model[1](model[0](x))
    lean = LeanForms(model)
    assert model[1](input=model[0](input=x)).equal(expected)
    lean.remove()
