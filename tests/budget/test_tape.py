"""A tape chooses what is kept: nothing that comes out of a step may depend on it, and nothing may be left."""

import contextlib
import gc
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.budget import TensorMemory
from toolkit.budget.step import autocast
from toolkit.budget.tape import CACHE, DROP, KEEP, Tape, recomputing

pytestmark = pytest.mark.numerical

CPU = torch.device("cpu")
aten = torch.ops.aten


def everything(decision):
    """A `decide` that always returns one answer."""
    return lambda op, contents: [decision] * len(contents)


def taped(decide):
    if decide is None or isinstance(decide, Tape):
        return decide or contextlib.nullcontext()
    return Tape(decide)


def step(build, x, decide=None, precision="fp32"):
    """One step of a fresh model: loss, output, gradients of input and parameters, buffers, random state."""
    torch.manual_seed(0)
    model = build().train()
    x = x.clone().requires_grad_(x.is_floating_point())
    with autocast(CPU, precision):
        with taped(decide):
            out = model(x)
        loss = out.float().square().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return {"loss": loss.detach(), "out": out.detach(), "x": x.grad, "rng": torch.get_rng_state(), **found}


def differing(one, other):
    """Names of what is not equal bit for bit."""
    assert one.keys() == other.keys()
    return [
        name
        for name, a in one.items()
        if (a is None) != (other[name] is None) or (a is not None and not torch.equal(a, other[name]))
    ]


def memory_of(model, x):
    """The model and its input are counted from the start, so a view of a parameter adds nothing."""
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), x])
    return memory


class Counted(TorchDispatchMode):
    """Operators that run, and those that run again, by name and shapes of their first tensors."""

    def __init__(self):
        super().__init__()
        self.all, self.again = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            key = func.overloadpacket.__name__, *shapes[:3]
            (self.again if recomputing() else self.all).update([key])
        return func(*args, **(kwargs or {}))


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5, **options)


def noisy_vit():
    return vit(drop_rate=0.2, attn_drop_rate=0.1, proj_drop_rate=0.3, pos_drop_rate=0.1, drop_path_rate=0.4)


def resnet():
    return timm.create_model("resnet18", num_classes=5)


def frozen_vit():
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.1" in name or name.endswith("head.bias"))
    return model


class InPlaceOnViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = self.first(x)
        y[:, :4].mul_(2)
        y.t()[2:6].add_(x.t()[2:6])
        y[:, 4:].relu_()
        z = self.second(y).view(-1)
        z[::3] = 0.5
        z.view(-1, 12).sigmoid_()
        mask = torch.zeros_like(z).masked_fill_(z > 0.6, 1.0)
        return z.mul(mask).view(-1, 12) + torch.empty_like(y).copy_(y).clamp_(-1, 1)


class ScaledExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        y = torch.exp(x * scale)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, scale = ctx.saved_tensors
        return grad * y * scale, (grad * y * x).sum()


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(12, 12), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.linear(ScaledExp.apply(self.linear(x), self.scale).tanh())


class ManyOperators(nn.Module):
    """Random numbers of every kind, several outputs, complex numbers, indices, recurrence, pooling."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(12, momentum=None)
        self.recurrent = nn.GRU(4, 6, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.3, batch_first=True)
        self.instance = nn.InstanceNorm1d(3, affine=True)

    def forward(self, x):
        y = self.norm(self.linear(x)) + 0.1 * torch.rand(x.shape) * torch.randn_like(x)
        y = y.sin() * torch.bernoulli(torch.full_like(x, 0.8))
        y = F.alpha_dropout(y, 0.2, training=True)
        z, _ = self.recurrent(self.instance(y.view(-1, 3, 4)))
        z, weights = self.attention(z, z, z)
        turned = torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2).contiguous())
        turned = turned * torch.polar(torch.ones(6), torch.arange(6.0))
        z = z + torch.view_as_real(turned).flatten(-2)
        pooled, indices = F.max_pool1d(z, 2, return_indices=True)
        top, _ = torch.topk(z.flatten(1), 5)
        picked = z.flatten(1)[:, indices.flatten(1).argmax(1)]
        return torch.cat([top, picked, pooled.flatten(1), weights.flatten(1)], 1).cumsum(1)


class Recurrent(nn.Module):
    """Its operator returns an empty workspace if gradients are disabled."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.lstm(x.view(-1, 3, 4))[0].sigmoid()


class RandomSlope(nn.Sequential):
    """Autograd saves the noise of its ReLU before the operator has written it."""

    def __init__(self):
        super().__init__(nn.Linear(12, 12), nn.RReLU(), nn.Linear(12, 3))


class SameBlockTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.block = nn.Sequential(nn.Linear(12, 12), self.norm, nn.ReLU(inplace=True), nn.Dropout(0.3))

    def forward(self, x):
        return self.block(self.block(x)) + self.block(x.detach())


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
MODELS = {
    "vit": (noisy_vit, IMAGES),
    "resnet": (resnet, IMAGES[:2]),
    "frozen": (frozen_vit, IMAGES),
    "in place": (InPlaceOnViews, ROWS),
    "function": (CustomFunction, ROWS),
    "operators": (ManyOperators, ROWS),
    "lstm": (Recurrent, ROWS),
    "rrelu": (RandomSlope, ROWS),
    "twice": (SameBlockTwice, ROWS),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_results_do_not_depend_on_the_kept_tensors(name, precision):
    """Loss, output, all gradients, running statistics and the random numbers that follow, to the bit."""
    build, x = MODELS[name]
    try:
        plain = step(build, x, precision=precision)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip(f"oneDNN has no {precision} form of {name} on this processor")
    assert differing(plain, step(build, x, precision=precision)) == [], "the test has to be deterministic"
    for decision in (DROP, CACHE, KEEP):
        assert differing(plain, step(build, x, everything(decision), precision)) == [], decision
    assert differing(plain, step(build, x, lambda op, contents: None, precision)) == []


@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.sampled_from(["function", "twice", "operators"]))
def test_any_mixture_of_decisions_gives_the_same_step(random, name):
    build, x = MODELS[name]
    overwritten = find_overwritten(build, x)
    count = iter(range(10**6))

    def decide(op, contents):
        choices = [DROP, CACHE] if next(count) in overwritten else [DROP, CACHE, KEEP]
        return [random.choice(choices) for _ in contents]

    assert differing(step(build, x), step(build, x, decide)) == []


@settings(max_examples=12)
@given(st.randoms(use_true_random=False), st.sampled_from(["vit", "function", "twice"]))
def test_a_tape_that_pauses_between_modules_gives_the_same_step(random, name):
    build, x = MODELS[name]
    tape = Tape(lambda op, contents: [random.choice([DROP, CACHE]) for _ in contents])

    def turn(*_):
        random.choice([tape.pause, tape.resume])()

    def turning():
        model = build()
        for module in model.modules():
            module.register_forward_hook(turn)
        return model

    assert differing(step(build, x), step(turning, x, tape)) == []


@pytest.mark.parametrize("name", ["function", "twice"])
def test_operators_that_pass_are_left_to_autograd(name):
    build, x = MODELS[name]
    recorded, kept = [], iter(range(10**6))

    def decide(op, contents):
        recorded.append(op.func)
        return [DROP] * len(contents)

    tape = Tape(decide, passes=lambda func: next(kept) % 3 > 0)
    assert differing(step(build, x), step(build, x, tape)) == []
    assert 0 < len(recorded) <= next(kept) / 2


def test_modes_and_hooks_of_others_stay_where_they_were_entered():
    """A tape neither leaves nor enters across them; what runs then is left to autograd."""

    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen, x = [], torch.randn(3, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    tape = Tape(lambda op, contents: seen.append(op.func) or [DROP] * len(contents))
    with tape:
        for other in (Other(), hooks):
            with other:
                tape.pause()
                y = x.exp()
                assert seen.pop() is aten.exp.default, "it was not left"
            tape.pause()
            with other:
                assert not tape.resume()
                y = x.exp()
            assert tape.resume() and not seen
        y = y.exp()
    assert seen == [aten.exp.default]
    y.sum().backward()
    assert torch.equal(x.grad, x.detach().exp().exp() * x.detach().exp())


def find_overwritten(build, x):
    """Numbers of the operators whose output is changed in place later: these cannot be kept."""
    makers, overwritten = {}, set()

    def decide(op, contents):
        overwritten.update(makers[key] for key in contents if key in makers and op.writes)
        makers.update(dict.fromkeys(contents, len(numbers)))
        numbers.append(op)  # alive, so that no storage is reused
        held.extend(contents.values())
        return [DROP] * len(contents)

    numbers, held = [], []
    step(build, x, decide)
    return overwritten


def test_a_tape_may_hold_a_part_of_the_model():
    """Tensors of one tape are from outside for the next one."""

    class Parts(nn.Module):
        def __init__(self, decide):
            super().__init__()
            self.parts, self.decide = nn.ModuleList(CustomFunction() for _ in range(3)), decide

        def forward(self, x):
            for part in self.parts:
                with taped(self.decide):
                    x = part(x)
                x = x + 1
            return x

    plain = step(lambda: Parts(None), ROWS)
    assert differing(plain, step(lambda: Parts(everything(DROP)), ROWS)) == []


def test_dropout_masks_are_drawn_once():
    """The same mask in both passes: where the output is zero, so is the gradient, and nowhere else."""
    x = torch.ones(1000, requires_grad=True)
    with Tape(everything(DROP)):
        y = F.dropout(x.sigmoid(), 0.5)
        z = F.dropout(y * y, 0.5)
    z.sum().backward()
    assert torch.equal(x.grad == 0, z == 0)
    assert 0.2 < (z == 0).float().mean() < 0.95


def test_attention_runs_again_once_for_both_of_its_outputs():
    model = vit().train()
    with Counted() as counted:
        with Tape(everything(CACHE)):
            loss = model(IMAGES).sum()
        loss.backward()
    attention = {name: n for (name, *_), n in counted.again.items() if "attention" in name}
    assert attention and set(attention.values()) == {3}


def test_cached_tensors_are_recomputed_once():
    for build, x in (MODELS["vit"], MODELS["resnet"], MODELS["twice"]):
        torch.manual_seed(0)
        model = build().train()
        with Counted() as forward, Tape(everything(CACHE)):
            loss = model(x).sum()
        with Counted() as backward:
            loss.backward()
        again = {key: n for key, n in backward.again.items() if key[0] not in ("clone", "empty_strided")}
        assert again and {key: n for key, n in again.items() if n > forward.all[key]} == {}


def test_tensors_that_backward_does_not_need_are_not_recomputed():
    """The backward pass of x + fc2(gelu(fc1(norm(x)))) needs neither fc2's product nor the sum."""
    norm, fc1, fc2 = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
    for decision, gelus in ((DROP, 1), (CACHE, 1)):
        with Counted() as counted:
            with Tape(everything(decision)):
                loss = (ROWS + fc2(F.gelu(fc1(norm(ROWS))))).sum()
            loss.backward()
        again = Counter()
        for (name, *shapes), n in counted.again.items():
            again[name] += n
            assert (20,) in shapes or name != "addmm", "fc2 ran again"
        assert again["gelu"] == gelus and again["add"] == again["sum"] == 0
        assert 1 <= again["addmm"] <= 2


def test_kept_tensors_are_not_recomputed():
    torch.manual_seed(0)
    model = noisy_vit().train()
    with Counted() as counted:
        with Tape(everything(KEEP)):
            loss = model(IMAGES).sum()
        loss.backward()
    assert counted.again == {}


def test_nothing_is_held_without_gradients():
    model = vit().eval()
    memory = memory_of(model, IMAGES)
    start = memory.allocated_bytes
    with memory, torch.no_grad(), Tape(everything(DROP)):
        out = model(IMAGES)
        assert memory.allocated_bytes - start == -(-out.nbytes // 512) * 512


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("decision", [DROP, CACHE, KEEP])
@pytest.mark.parametrize("name", ["vit", "in place", "function", "twice"])
def test_memory_is_freed_without_the_garbage_collector(no_collector, name, decision, backward):
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build().train()
    memory = memory_of(model, x)
    with memory:
        for _ in range(2):
            start = memory.allocated_bytes
            with Tape(everything(decision)):
                loss = model(x).sum()
            if backward:
                loss.backward()
            del loss
            model.zero_grad(set_to_none=True)
            assert memory.allocated_bytes == start


@pytest.mark.parametrize("decision", [DROP, CACHE])
def test_an_interrupted_forward_pass_frees_everything(no_collector, decision):
    torch.manual_seed(0)
    model = vit().train()
    memory = memory_of(model, IMAGES)
    with memory:
        model(IMAGES).sum().backward()  # whatever is made once
        model.zero_grad(set_to_none=True)
        start = memory.allocated_bytes
        with contextlib.suppress(ZeroDivisionError), Tape(everything(decision)):
            hidden = model.forward_features(IMAGES)
            raise ZeroDivisionError
        del hidden
        assert memory.allocated_bytes == start
        assert differing(step(vit, IMAGES), step(vit, IMAGES)) == []


def test_dropping_takes_less_memory_and_keeping_no_more_than_the_plain_model():
    def held(decide):
        """Bytes between the passes."""
        torch.manual_seed(0)
        model, x = vit().train(), IMAGES.repeat(4, 1, 1, 1)
        memory = memory_of(model, x)
        start = memory.allocated_bytes
        with memory:
            with taped(decide):
                loss = model(x).sum()
            return memory.allocated_bytes - start + 0 * loss.dim()

    plain = held(None)
    assert held(everything(DROP)) < plain / 50
    assert held(lambda op, contents: None) == plain
    assert held(everything(KEEP)) <= plain


@pytest.mark.parametrize("decision", [DROP, CACHE, KEEP])
def test_a_second_backward_of_a_retained_graph_gives_the_same_gradients(decision):
    torch.manual_seed(0)
    model = noisy_vit().train()
    with Tape(everything(decision)):
        loss = model(IMAGES).square().sum()
    gradients = []
    for retain in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=retain)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert differing(*gradients) == []


@pytest.mark.parametrize("decision", [DROP, CACHE, KEEP])
def test_gradients_of_gradients_are_exact(decision):
    def penalty(decide):
        torch.manual_seed(0)
        model, x = CustomTwice(), ROWS.clone().requires_grad_()
        with taped(decide):
            loss = model(x).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}

    assert differing(penalty(None), penalty(everything(decision))) == []


class CustomTwice(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Softplus())


def test_gradients_of_some_parameters_are_exact():
    torch.manual_seed(0)
    model = vit().train()
    wanted = list(model.blocks[1].parameters())
    plain = torch.autograd.grad(model(IMAGES).square().sum(), wanted)
    with Tape(everything(DROP)):
        loss = model(IMAGES).square().sum()
    assert all(map(torch.equal, plain, torch.autograd.grad(loss, wanted)))


@pytest.mark.parametrize("changed", ["first.weight", "second.weight", "x"])
@pytest.mark.parametrize("decision", [DROP, CACHE])
def test_changing_a_needed_tensor_in_place_before_backward_is_an_error(decision, changed):
    """The plain model raises; so has the tape, and not give other gradients."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.second(self.first(x).tanh())

    for decide in (None, everything(decision)):
        model, x = Two(), (ROWS * 1).requires_grad_()
        with taped(decide):
            loss = model(x).square().sum()
        with torch.no_grad():
            (x if changed == "x" else model.get_parameter(changed)).mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("decision", [DROP, CACHE, KEEP])
def test_an_activation_changed_in_place_after_it_was_saved_never_causes_a_wrong_gradient(decision):
    """Autograd finds this mistake in a model, and the tape may not hide it: an error, or what is right."""

    def gradient(decide):
        x = ROWS.clone().requires_grad_()
        with taped(decide):
            y = x.exp()  # saved
            z = y * 2
            y.mul_(3)
            loss = (z + y).sum()
        loss.backward()
        return x.grad

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(None)
    with contextlib.suppress(RuntimeError):
        torch.testing.assert_close(gradient(everything(decision)), 5 * ROWS.exp())


def test_a_kept_tensor_that_is_overwritten_through_another_type_is_not_used_again():
    """y is kept, read, and then changed through a complex view: what was read before has other bytes."""

    def gradient(decide):
        x = ROWS.clone().requires_grad_()
        with taped(decide):
            y = x * 1.5
            z = (y + 1).sigmoid()  # of y as it is now
            with torch.no_grad():
                torch.view_as_complex(y.view(-1, 2)).mul_(3)
            loss = z.sum()
        loss.backward()
        return x.grad

    def keep_products(op, contents):
        return [KEEP if op.func is aten.mul.Tensor else DROP] * len(contents)

    plain = gradient(None)
    assert torch.equal(plain, gradient(everything(DROP)))
    with contextlib.suppress(RuntimeError):  # an error is right as well
        assert torch.equal(plain, gradient(keep_products))


def test_two_tapes_can_be_active_at_once():
    """Two forward passes before the first backward pass."""
    torch.manual_seed(0)
    model = vit().train()
    losses = []
    for images in (IMAGES, 2 * IMAGES):
        with Tape(everything(DROP)):
            losses.append(model(images).square().sum())
    sum(losses).backward()
    taped_gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    sum(model(images).square().sum() for images in (IMAGES, 2 * IMAGES)).backward()
    assert differing({n: p.grad for n, p in model.named_parameters()}, taped_gradients) == []
