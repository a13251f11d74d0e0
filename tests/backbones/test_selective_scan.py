"""The scan operators against the recurrence written step by step in float64, differentiated by autograd."""

import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from toolkit.backbones import scan_torch
from toolkit.backbones import selective_scan as module
from toolkit.backbones.selective_scan import backend, selective_scan
from toolkit.budget import TensorMemory
from toolkit.budget.tape import DROP, Tape
from toolkit.errors import InputError

pytestmark = pytest.mark.numerical

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "delta_bias")
OPERATORS = torch.ops.toolkit
CPU = torch.device("cpu")


def reference(u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, reverse=False):
    """The recurrence, step by step, in the inputs' type."""
    delta = dt if delta_bias is None else dt + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    h, outputs = u.new_zeros(u.shape[0], *A.shape), {}
    per_step = [x.unbind(2) for x in (u, delta, B, C)]
    times = range(u.shape[2])
    for t in reversed(times) if reverse else times:
        x, step, b, c = (tensor[t] for tensor in per_step)
        h = torch.exp(step[..., None] * A) * h + (step * x)[..., None] * b[:, None]
        outputs[t] = (h * c[:, None]).sum(2)
    y = torch.stack([outputs[t] for t in times], 2)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def tensors(batch, channels, length, states, *, without=(), dtype=torch.float32, decay=4.0):
    """Inputs by name; |A| up to `decay`."""
    generator = torch.Generator().manual_seed(length)
    over_time, of_states = (batch, channels, length), (batch, states, length)
    shapes = dict.fromkeys(("u", "dt", "z"), over_time) | dict.fromkeys(("B", "C"), of_states)
    shapes |= {"A": (channels, states), "D": (channels,), "delta_bias": (channels,)}
    made = {name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in NAMES}
    made["A"] = -decay * torch.rand(shapes["A"], generator=generator, dtype=torch.float64)
    return {name: None if name in without else made[name].to(dtype).requires_grad_() for name in NAMES}


def gradients(function, inputs, grad, **flags):
    """y and the gradients of the inputs that require one."""
    y = function(**inputs, **flags)
    asked = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    return {"y": y.detach()} | dict(
        zip(asked, torch.autograd.grad(y, list(asked.values()), grad.to(y.dtype)))
    )


def double(inputs):
    return {
        name: None if x is None else x.detach().double().requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }


def assert_as_reference(inputs, tolerance=1e-5, **flags):
    """Compare with differences relative to the largest element of each tensor."""
    grad = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1))
    got = gradients(selective_scan, inputs, grad, **flags)
    expected = gradients(reference, double(inputs), grad, **flags)
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].isfinite().all(), name
        scale = expected[name].abs().max().clamp(min=1e-3)
        assert (got[name] - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 15, 197])
def test_outputs_and_gradients_at_lengths(length, reverse):
    assert_as_reference(tensors(3, 5, length, 4), reverse=reverse)


def test_a_long_sequence():
    assert_as_reference(tensors(1, 3, 4096, 2))


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_absent_inputs_match_the_recurrence(without):
    assert_as_reference(tensors(2, 4, 11, 3, without=without))


def test_without_softplus():
    inputs = tensors(2, 4, 11, 3)
    inputs["dt"] = inputs["dt"].detach().abs().requires_grad_()
    inputs["delta_bias"] = inputs["delta_bias"].detach().abs().requires_grad_()
    assert_as_reference(inputs, delta_softplus=False)


@pytest.mark.parametrize("frozen", [("A", "D", "delta_bias"), ("A",), ("D",), ("u", "B", "z")])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = tensors(2, 4, 11, 3)
    for name in frozen:
        inputs[name].requires_grad_(False)
    assert_as_reference(inputs)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_of_one_slice_and_of_several(batch, monkeypatch):
    inputs = tensors(batch, 6, 10, 3)
    monkeypatch.setattr(scan_torch, "_CPU_BUFFER_BYTES", 3 * scan_torch.chunk_length(10) * 6 * 3 * 4)
    assert_as_reference(inputs)


@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_decay_is_finite_and_exact(reverse):
    """Δ·|A| reaches 500: exp(-500) is zero, and nothing may be divided by it."""
    inputs = tensors(2, 4, 60, 8, decay=50.0)
    inputs["dt"] = (inputs["dt"].detach() * 5).clamp(max=9.0).requires_grad_()
    assert_as_reference(inputs, reverse=reverse)


def test_reverse_is_the_flipped_scan():
    inputs = tensors(2, 4, 11, 3)
    flipped = {name: x.flip(2) if x.dim() == 3 else x for name, x in inputs.items()}
    torch.testing.assert_close(selective_scan(**inputs, reverse=True), selective_scan(**flipped).flip(2))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    inputs = tensors(2, 3, 7, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, True, reverse), tuple(inputs.values()))


def test_transposed_slices_of_a_projection():
    """As in models: all inputs but A, D and the bias are views; gradients reach their base."""
    sizes, inputs = (5, 5, 3, 3, 5), tensors(2, 5, 13, 3)
    parts = [inputs[name] for name in ("u", "dt", "B", "C", "z")]
    projection = torch.cat(parts, 1).transpose(1, 2).detach()  # (batch, L, 21)

    def loss(function, projection, weights):
        u, dt, B, C, z = projection.transpose(1, 2).split(sizes, dim=1)
        weights = (weights["A"], B, C, weights["D"], z, weights["delta_bias"])
        return function(u, dt, *weights).square().sum()

    projection.requires_grad_()
    (got,) = torch.autograd.grad(loss(selective_scan, projection, inputs), projection)
    leaf = projection.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(loss(reference, leaf, double(inputs)), leaf)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_expanded_inputs_and_gradients():
    inputs = tensors(2, 4, 9, 3)
    inputs["B"] = inputs["B"][:1].detach().requires_grad_()
    expanded = {**inputs, "B": inputs["B"].expand(2, -1, -1)}
    (got,) = torch.autograd.grad(selective_scan(**expanded).sum(), inputs["B"])
    b = inputs["B"].detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(**double(inputs) | {"B": b.expand(2, -1, -1)}).sum(), b)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_half_precision_computes_in_float32_under_autocast():
    """Only inputs and results are rounded to bfloat16, not the state."""
    inputs = tensors(2, 8, 197, 4, dtype=torch.bfloat16)
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(**inputs)
    assert y.dtype == torch.bfloat16
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad)))
    assert {name: x.dtype for name, x in got.items()} == {name: x.dtype for name, x in inputs.items()}
    expected = gradients(reference, double(inputs), grad)
    assert (y - expected["y"]).abs().max() <= 2**-8 * expected["y"].abs().max()
    for name in NAMES:
        tolerance = 1e-5 if got[name].dtype == torch.float32 else 2**-8  # half a last digit
        assert (got[name] - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


def test_equal_runs_give_equal_bits():
    inputs, grad = tensors(3, 8, 30, 4), torch.ones(3, 8, 30)
    first, second = (gradients(selective_scan, inputs, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Operators.


def operator_arguments(inputs, *, reverse=False, trained=(True, True, True)):
    """Arguments of the two operators."""
    detached = [None if x is None else x.detach() for x in inputs.values()]
    forward = (*detached, True, reverse)
    y, states = OPERATORS.selective_scan(*forward)
    return forward, (y, *detached, states, True, reverse, list(trained))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("length", [1, 7])
def test_operators_pass_torchs_opcheck(length, without):
    inputs = tensors(2, 4, length, 3, without=without)
    forward, backward = operator_arguments(
        inputs, trained=[name not in without for name in ("A", "D", "bias")]
    )
    torch.library.opcheck(OPERATORS.selective_scan, (*inputs.values(), True, False))
    torch.library.opcheck(OPERATORS.selective_scan, forward)
    torch.library.opcheck(OPERATORS.selective_scan_backward, backward)


def test_fake_tensors_have_the_shapes_types_and_strides_of_real_ones():
    inputs = tensors(2, 4, 13, 3)
    inputs["u"] = inputs["u"].detach().bfloat16()
    inputs["B"] = inputs["B"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    forward, backward = operator_arguments(inputs, trained=(True, False, True))
    for operator, arguments in (
        (OPERATORS.selective_scan, forward),
        (OPERATORS.selective_scan_backward, backward),
    ):
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        for real, imagined in zip(operator(*arguments), fake):
            assert (real.shape, real.dtype, real.stride()) == (
                imagined.shape,
                imagined.dtype,
                imagined.stride(),
            )


def test_backward_keeps_inputs_and_chunk_states_only():
    inputs = tensors(2, 4, 197, 3)
    kept = []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(**inputs)
    assert len(kept) == 9
    known = {x.data_ptr() for x in inputs.values()}
    (states,) = [x for x in kept if x.data_ptr() not in known]
    assert states.shape == (13, 2, 3, 4), "197 steps are 14 chunks of up to 15"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("shape", [(2, 4, 1, 3), (9, 64, 197, 16), (5, 768, 60, 16), (1, 30, 1000, 4)])
def test_workspace_bounds_the_plain_forms_memory(shape, without, dtype):
    inputs = tensors(*shape, without=without, dtype=dtype)
    forward, backward = operator_arguments(inputs)
    for run, arguments, tell in (
        (scan_torch.forward, forward, module.forward_workspace_bytes),
        (scan_torch.backward, backward, module.backward_workspace_bytes),
    ):
        told = tell(*arguments)
        memory = TensorMemory(CPU)
        memory.track([x for x in arguments if isinstance(x, torch.Tensor)])
        with memory:
            results = run(*arguments)
        assert sum(x.numel() for x in results)
        taken = memory.peak_bytes - memory.allocated_bytes
        assert taken <= told <= 1.25 * taken + 4096
        with FakeTensorMode() as fake:
            imagined = [fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            assert tell(*imagined) == told


def test_the_memory_counter_sees_workspaces():
    """The backward operator's workspace alone exceeds all that is visible from outside."""
    inputs = tensors(1, 64, 100, 16)
    told = module.backward_workspace_bytes(None, *inputs.values(), None, True, False, [True] * 3)
    memory = TensorMemory(CPU)
    with memory:
        selective_scan(**inputs).sum().backward()
    assert memory.peak_bytes > told > memory.peak_bytes / 2


def test_a_tape_repeats_the_scan_bit_for_bit():
    inputs, grad = tensors(2, 4, 30, 3), torch.ones(2, 4, 30)

    def model(**scanned):
        return selective_scan(**{name: x * 2 for name, x in scanned.items()}).sin()

    def under_a_tape(**scanned):
        with Tape(lambda op, contents: [DROP] * len(contents)):
            return model(**scanned)

    expected, got = gradients(model, inputs, grad), gradients(under_a_tape, inputs, grad)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


BAD_SHAPES = {
    "u": ((4, 7), "u must be (batch, channels, L) with L of 1 or more; it is (4, 7)."),
    "dt": ((2, 5, 7), "dt must be (batch, channels, L) = (2, 4, 7); it is (2, 5, 7)."),
    "A": ((3, 4), "A must be (channels, states) with 4 channels; it is (3, 4)."),
    "B": ((2, 7, 3), "B must be (batch, states, L) = (2, 3, 7); it is (2, 7, 3)."),
    "C": ((1, 3, 7), "C must be (batch, states, L) = (2, 3, 7); it is (1, 3, 7)."),
    "D": ((4, 1), "D must be (channels,) = (4,); it is (4, 1)."),
    "z": ((2, 4, 6), "z must be (batch, channels, L) = (2, 4, 7); it is (2, 4, 6)."),
    "delta_bias": ((1,), "delta_bias must be (channels,) = (4,); it is (1,)."),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes_are_named(name):
    shape, message = BAD_SHAPES[name]
    with pytest.raises(InputError) as error:
        selective_scan(**tensors(2, 4, 7, 3) | {name: torch.zeros(shape)})
    assert str(error.value) == message


def test_an_empty_sequence_is_refused():
    with pytest.raises(InputError, match="L of 1 or more"):
        selective_scan(**{name: None if x is None else x[..., :0] for name, x in tensors(2, 4, 7, 3).items()})


# Back ends.


def test_the_cpu_runs_plain_torch_and_says_so_once(capsys):
    backend.cache_clear()
    assert [backend(CPU), backend(CPU)] == ["torch", "torch"]
    assert capsys.readouterr().out == "selective scan on cpu: plain torch, sequential in time\n"


def broken(**replaced):
    """The plain form of the scan, with some functions `replaced`."""
    return types.SimpleNamespace(
        **{"forward": scan_torch.forward, "backward": scan_torch.backward} | replaced
    )


def raises(*args):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def wrong_gradients(*args):
    du, ddt, *rest = scan_torch.backward(*args)
    return du, torch.zeros_like(ddt), *rest


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (broken(), None),
        (broken(forward=raises), "RuntimeError: no kernel image is available for execution on the device"),
        (broken(backward=raises), "RuntimeError: no kernel image is available for execution on the device"),
        (broken(backward=wrong_gradients), "wrong gradient of dt"),
        (None, "ModuleNotFoundError: import of toolkit.backbones.scan_triton halted; None in sys.modules"),
    ],
    ids=["works", "forward raises", "backward raises", "wrong gradients", "not installed"],
)
def test_triton_is_chosen_only_if_it_works(form, fault, monkeypatch, capsys):
    """The probe of a CUDA device runs on CPU tensors here."""
    monkeypatch.setitem(sys.modules, "toolkit.backbones.scan_triton", form)
    probe = module._probe
    monkeypatch.setattr(module, "_probe", lambda form, device: probe(form, CPU))
    backend.cache_clear()
    assert backend(torch.device("cuda", 0)) == ("torch" if fault else "triton")
    said = capsys.readouterr().out
    backend.cache_clear()
    if fault:
        slower = "plain torch, sequential in time; Triton, which is faster, does not work here"
        assert said == f"selective scan on cuda:0: {slower}: {fault}\n"
    else:
        assert said == "selective scan on cuda:0: Triton kernels\n"


TRITON = """
import torch
from test_selective_scan import operator_arguments, tensors
from toolkit.backbones import scan_torch, scan_triton
from toolkit.budget import TensorMemory

def close(got, expected):
    assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
    if got.numel():
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3)

scan_triton._TILE = 16  # few channels per program, so that there are several of everything
for shape, without, softplus, reverse, trained in (
    ((1, 5, 7, 3), (), True, False, (True, True, True)),  # one program for all groups of channels
    ((2, 4, 3, 2), ("z", "delta_bias"), True, True, (True, True, False)),  # two programs per sample
    ((1, 3, 5, 2), ("D",), False, True, (False, False, True)),
    ((1, 3, 1, 4), ("D", "z", "delta_bias"), True, False, (False, False, False)),
):
    inputs = tensors(*shape, without=without)
    inputs["dt"] = inputs["dt"].detach().abs()
    inputs["B"] = inputs["B"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    forward, backward = operator_arguments(inputs, reverse=reverse, trained=trained)
    forward, backward = list(forward), list(backward)
    forward[8] = backward[10] = softplus
    results = scan_triton.forward(*forward)
    for got, expected in zip(results, scan_torch.forward(*forward)):
        close(got, expected)
    backward[9] = results[1]
    memory = TensorMemory(torch.device("cpu"))
    with memory:
        results = scan_triton.backward(*backward)
    for got, expected in zip(results, scan_torch.backward(*backward)):
        close(got, expected)
    taken = memory.peak_bytes - memory.allocated_bytes
    told = scan_triton.workspace_bytes(inputs["u"], inputs["A"], inputs["z"] is not None, backward[-1])
    assert taken <= told <= 1.25 * taken + 4096, (taken, told)
print("equal")
"""


def test_triton_kernels_equal_the_plain_form():
    """Interpreted on the CPU: this checks arithmetic and addresses, not the compiled code."""
    pytest.importorskip("triton")
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", TRITON],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])},
        capture_output=True,
        text=True,
    )
    assert result.stdout.endswith("equal\n"), result.stderr
