"""GaLore: what it computes, what it keeps, and that plans and runs know of it."""

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toolkit
from toolkit.budget import auto_checkpoint, plan
from toolkit.budget.fakes import on_fake_tensors
from toolkit.budget.memory import TensorMemory
from toolkit.errors import InputError
from toolkit.forecast.forecasts import forecast
from toolkit.measure.memory import memory_of_step
from toolkit.methods import METHODS, Hooks
from toolkit.methods.galore import GaLore
from toolkit.methods.optimizer import ADAM_FLOPS, optimizer_flops
from toolkit.training.step import Steps, held_bytes

pytestmark = pytest.mark.numerical

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions (the second depthwise), a batch norm, and a classifier that is wider than high."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2)
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.head = nn.Linear(24, 10)
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.norm, self.conv = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.relu(self.norm(self.depthwise(x))))


def net():
    torch.manual_seed(0)
    return Net()


def small_batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 10


def backward(model, x, y, share=1.0):
    (share * F.cross_entropy(model(x), y)).backward()


def train(model, optimizer, steps, seed=0):
    for number in range(steps):
        backward(model, *small_batch(seed=seed + number))
        optimizer.step()
        optimizer.zero_grad()


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items())
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def experiment(**parameters):
    usual = {"method": "galore", "rank": 6, "gap": 2, "epochs": 2, "batch_size": 32}
    usual |= {"budget": "1GB", "device": "cpu", "checkpointing": "none", "lr": 1e-3}
    return toolkit.Experiment.flat(**usual | parameters)


def optimizer_for(model, method, *, lr, weight_decay, **options):
    chosen = METHODS[method]
    return chosen.make_optimizer(model, chosen.options(**options), lr=lr, weight_decay=weight_decay)


def test_with_nothing_to_project_it_is_adamw():
    first, second = net(), net()
    options = {"lr": 3e-3, "weight_decay": 0.1}
    train(first, torch.optim.AdamW(first.parameters(), fused=True, **options), 5)
    train(second, GaLore(second.parameters(), rank=512, gap=1, **options), 5)
    assert same(first, second)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 3, 3, 3), (40, 5, 2, 2)])
def test_finds_the_subspace_of_a_gradient_of_rank_2(shape):
    """W starts off a target by a matrix of rank 2: rank 2 is enough to get there."""
    torch.manual_seed(0)
    m, n = shape[0], torch.Size(shape[1:]).numel()
    away = torch.randn(m, 2) @ torch.randn(2, n)
    target = torch.randn(shape)
    weight = nn.Parameter(target + away.view(shape))
    optimizer = GaLore([weight], weight_decay=0.0, rank=2, gap=1000)
    losses = []
    for number in range(100):
        optimizer.param_groups[0]["lr"] = 0.8 * (1 - number / 100)
        loss = (weight - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        assert weight.grad is None and optimizer.gradients[weight].numel() == 2 * max(m, n)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 1e-3 * losses[0]
    moved = (weight.detach() - target - away.view(shape)).reshape(m, n)
    u, _, vh = torch.linalg.svd(away)
    assert torch.linalg.matrix_rank(moved, rtol=1e-3) == 2
    projector = optimizer.state[weight]["projector"]
    span = u[:, :2] if m <= n else vh[:2].T
    assert torch.allclose(projector @ (projector.T @ span), span, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 3, 3, 3), (40, 5, 2, 2)])
def test_memory_format_does_not_matter(shape):
    torch.manual_seed(0)
    start, gradients = (torch.randn(size, dtype=torch.float64) for size in (shape, (3, *shape)))
    plain = nn.Parameter(start.clone())
    channels_last = nn.Parameter(start.contiguous(memory_format=torch.channels_last))
    for weight in (plain, channels_last):
        optimizer = GaLore([weight], lr=0.1, rank=4)
        for gradient in gradients:
            (weight * gradient).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain, channels_last)


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 1000))
def test_an_update_lies_in_the_subspace(m, n, rank, seed):
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(m, n, dtype=torch.float64))
    before = weight.detach().clone()
    optimizer = GaLore([weight], lr=0.1, weight_decay=0.0, rank=rank, scale=0.5)
    (weight * torch.randn(m, n, dtype=torch.float64)).sum().backward()
    optimizer.step()
    state, moved = optimizer.state[weight], weight.detach() - before
    if rank >= min(m, n):
        assert "projector" not in state and state["exp_avg"].shape == (m, n)
        return
    assert state["exp_avg"].shape == ((rank, n) if m <= n else (m, rank))
    p = state["projector"]
    assert torch.allclose(p.T @ p, torch.eye(rank, dtype=torch.float64))
    inside = p @ (p.T @ moved) if m <= n else moved @ p @ p.T
    assert torch.allclose(inside, moved)
    # Adam's first step is the learning rate in each number, here of the subspace.
    assert moved.norm() == pytest.approx(0.5 * 0.1 * (rank * max(m, n)) ** 0.5, rel=1e-3)


def test_only_matrices_wider_than_the_rank_are_projected():
    model = net()
    optimizer = GaLore(model.parameters(), rank=6)
    train(model, optimizer, 1)
    projected = {name for name, p in model.named_parameters() if "projector" in optimizer.state[p]}
    assert projected == {"stem.weight", "head.weight", "blocks.0.conv.weight", "blocks.1.conv.weight"}


def test_halves_add_up_to_the_whole_batch():
    model = net().eval()  # batch norms by fixed statistics, which halves share
    optimizer = GaLore(model.parameters(), rank=6, gap=50)
    train(model, optimizer, 1)
    x, y = small_batch(8, seed=3)
    backward(model, x, y)
    whole = optimizer.gradients | {p: p.grad for p in model.parameters() if p.grad is not None}
    optimizer.zero_grad()
    assert not optimizer.gradients
    for part in (slice(0, 4), slice(4, 8)):
        backward(model, x[part], y[part], 0.5)
    halves = optimizer.gradients | {p: p.grad for p in model.parameters() if p.grad is not None}
    assert whole.keys() == halves.keys() and len(whole) == len(list(model.parameters()))
    for parameter, gradient in whole.items():
        assert (halves[parameter] - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_a_step_that_is_given_up_leaves_no_trace():
    first, second = net(), net()
    optimizers = [GaLore(m.parameters(), rank=6, gap=2) for m in (first, second)]
    for number in range(4):
        backward(second, *small_batch(seed=100 + number))
        optimizers[1].zero_grad()
        second.load_state_dict(first.state_dict())  # the running statistics
        for model, optimizer in zip((first, second), optimizers):
            train(model, optimizer, 1, seed=number)
    assert same(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_resumes_exactly(dtype):
    reference = net().to(dtype)
    optimizer = GaLore(reference.parameters(), rank=6, gap=3)

    def steps(model, optimizer, numbers):
        for number in numbers:
            x, y = small_batch(seed=number)
            backward(model, x.to(dtype), y)
            optimizer.step()
            optimizer.zero_grad()

    steps(reference, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": reference.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(reference, optimizer, range(4, 9))
    model = net().to(dtype)
    resumed = GaLore(model.parameters(), rank=1)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    steps(model, resumed, range(4, 9))
    assert same(model, reference)


def test_gradients_set_by_hand_are_taken():
    first, second = net(), net()
    hooked, by_hand = GaLore(first.parameters(), rank=6), GaLore(second.parameters(), rank=6)
    x, y = small_batch()
    backward(first, x, y)
    plain = net()
    backward(plain, x, y)
    second.load_state_dict(plain.state_dict())
    for parameter, other in zip(second.parameters(), plain.parameters()):
        parameter.grad = other.grad
    hooked.step()
    by_hand.step()
    assert same(first, second)


def test_a_gradient_that_is_not_finite_is_no_error_of_its_own():
    weight = nn.Parameter(torch.zeros(20, 30))
    optimizer = GaLore([weight], rank=4)
    (weight * float("nan")).sum().backward()
    assert optimizer.gradients[weight].isnan().all()


def test_it_lets_go_of_the_model():
    model = net()
    closed = GaLore(model.parameters(), rank=6)
    closed.close()
    dead = GaLore(model.parameters(), rank=6)
    backward(model, *small_batch())
    assert model.head.weight.grad is None and dead.gradients
    newer = GaLore(model.parameters(), rank=6)
    dead.zero_grad()
    backward(model, *small_batch())
    assert newer.gradients and not dead.gradients
    newer.zero_grad()
    del dead, newer
    gc.collect()
    backward(model, *small_batch())
    assert model.head.weight.grad is not None and not closed.gradients


def test_settings_that_mean_nothing_are_refused():
    for wrong in ({"rank": 0}, {"gap": 0}, {"scale": 0.0}):
        with pytest.raises(InputError, match="GaLore needs"):
            GaLore(net().parameters(), **wrong)


def memory_of(method):
    """Memory of the second step of a ResNet-18 on 64 px."""
    model = toolkit.build_backbone("resnet18", 10, pretrained=False)
    batch = torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)
    with on_fake_tensors(model, batch) as fakes:
        return memory_of_step(
            model, fakes, None, lambda model: optimizer_for(model, method, lr=1e-3, weight_decay=0.05)
        )


def test_gradients_are_never_there_together(record_property):
    full, galore = memory_of("full"), memory_of("galore")
    share = galore.category_peaks["gradients"] / full.category_peaks["gradients"]
    record_property("gradients of ResNet-18 under GaLore of rank 32, of full's", f"{100 * share:.0f} %")
    assert share < 0.4 and galore.peak_bytes < 0.6 * full.peak_bytes


class FusedSgd(torch.optim.Optimizer):
    """Steps in the hook of each gradient."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    def step(self, closure=None):
        pass


def test_any_optimizer_in_hooks_is_planned_right():
    (x, y), model = small_batch(32), net()
    optimizer = FusedSgd(model.parameters())
    budget = int(0.8 * plan(model, "1GB", (x, y), optimizer=optimizer).peak_bytes)
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), x, y])
    with auto_checkpoint(model, budget, (x, y), optimizer=optimizer) as planned, memory:
        for _ in range(2):
            memory.reset_peak()
            outputs = model(x)
            F.cross_entropy(outputs, y).backward()
            del outputs
    assert planned.plan.peak_bytes == memory.peak_bytes <= budget


def test_a_refresh_in_the_first_micro_batch_is_planned_for():
    """Singular vectors take more there than the gradients that later micro-batches find."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(200, 200), nn.ReLU()) for _ in range(3))
    model = nn.Sequential(nn.Linear(8, 200), nn.Sequential(*layers), nn.Linear(200, 10))
    x, y = torch.randn(4, 8), torch.arange(4)
    optimizer = GaLore(model.parameters(), rank=6, gap=2)
    predicted = plan(model, "1GB", (x, y), optimizer=optimizer, micro_batches=2).peak_bytes
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), x, y])
    peaks = []
    with memory:
        for _ in range(4):
            memory.reset_peak()
            for part in (slice(0, 2), slice(2, 4)):
                outputs = model(x[part])
                F.cross_entropy(outputs, y[part]).backward()
                del outputs
            optimizer.step()
            optimizer.zero_grad()
            peaks.append(memory.peak_bytes)
    assert predicted == peaks[2] > peaks[3], "the third step chooses the subspaces again"


@pytest.mark.parametrize("micro", [0, 8])
@pytest.mark.parametrize("backbone", ["net", pytest.param("demo_vit", marks=pytest.mark.long)])
def test_training_takes_what_was_predicted(demo_model, few_digits, backbone, micro):
    e = experiment(micro_batch_size=micro, epochs=1)

    def build():
        return demo_model() if backbone == "demo_vit" else net()

    plain = toolkit.fit(build(), few_digits, e)
    wide = toolkit.fit(build(), few_digits, experiment(**vars(e) | {"checkpointing": "planned"}))
    assert wide.predicted_peak_bytes == wide.peak_bytes and wide.step_flops["recompute"] == 0
    copies = held_bytes(build().train(), Hooks(), plans=True)
    assert wide.peak_bytes == plain.peak_bytes + copies
    budget = int(0.85 * wide.peak_bytes)
    tight = toolkit.fit(
        build(), few_digits, experiment(**vars(e) | {"checkpointing": "planned", "budget": str(budget)})
    )
    assert tight.status == "ok" and tight.out_of_memory_retries == 0
    assert tight.predicted_peak_bytes == tight.peak_bytes <= budget


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["none", "static", "threshold"])
def test_forecasts_know_it(demo_model, few_digits, tmp_path, strategy):
    e = experiment(checkpointing=strategy, budget="9MB", tau=0.6, epochs=1, gap=1)
    measured = toolkit.fit(demo_model(), few_digits, e).peak_bytes
    found = forecast(e, 10, tmp_path)
    assert 0.999 * measured < found.peak_bytes < 1.002 * measured
    other = forecast(e.variant(rank=2), 10, tmp_path)
    assert other.peak_bytes < found.peak_bytes


class Stop(Exception):
    pass


@pytest.mark.parametrize("killed_at", [2, *(pytest.param(at, marks=pytest.mark.long) for at in (1, 3, 5))])
def test_resume_after_a_kill_is_bit_identical(few_digits, monkeypatch, tmp_path, killed_at):
    e = experiment(epochs=3, gap=2)
    reference = net()
    expected = toolkit.fit(reference, few_digits, e)
    original = Steps.run

    def step(self, images, targets, result):
        if result.steps == killed_at:
            raise Stop
        return original(self, images, targets, result)

    killed = net()
    with monkeypatch.context() as patch, pytest.raises(Stop) as holds_the_run:
        patch.setattr(Steps, "run", step)
        toolkit.fit(killed, few_digits, e, folder=tmp_path, snapshot_seconds=0)
    assert holds_the_run
    backward(killed, *small_batch())
    assert killed.head.weight.grad is not None, "a dead run takes no gradients"
    model = net()
    result = toolkit.fit(model, few_digits, e, folder=tmp_path, snapshot_seconds=0)
    assert result.resumes == 1 and result.history == expected.history
    assert result.peak_bytes == expected.peak_bytes and same(model, reference)


def test_training_learns_and_counts_no_optimizer(few_digits):
    model = net()
    counted = toolkit.flops(copy.deepcopy(model), torch.zeros(32, 3, 32, 32))
    result = toolkit.fit(model, few_digits, experiment(epochs=8, gap=10, lr=3e-2))
    assert result.status == "ok" and result.history[-1]["train_loss"] < 0.85 * result.history[0]["train_loss"]
    assert result.step_flops["forward"] == counted.forward / 32
    assert result.step_flops["backward"] == counted.backward / 32


def test_flops_of_the_optimizer():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50))
    numbers = sum(p.numel() for p in model.parameters())
    adamw = optimizer_flops(optimizer_for(model, "full", lr=1e-3, weight_decay=0.0))
    assert adamw.per_step == adamw.adam == ADAM_FLOPS * numbers
    galore = optimizer_for(model, "galore", lr=1e-3, weight_decay=0.1, rank=4, gap=10)
    count = optimizer_flops(galore)
    assert count.projection == 4 * 4 * 5000, "there and back, two per multiply-add"
    assert count.svd_per_refresh == 6 * 100 * 50**2 + 20 * 50**3 and count.gap == 10
    assert count.adam == ADAM_FLOPS * (4 * 100 + 150) + 5000, "decay is on the whole weight"
    assert count.per_step == count.adam + count.projection + count.svd_per_refresh / 10
    with pytest.raises(InputError, match="SGD"):
        optimizer_flops(torch.optim.SGD(model.parameters()))


def test_a_model_can_be_saved_and_copied_while_its_optimizer_is_alive():
    model = nn.Linear(64, 48)
    optimizer = GaLore(model.parameters(), rank=4)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(torch.ones(1, 64)).sum().backward()
    assert model.weight.grad is None and optimizer.gradients  # of its own model alone
    assert pickle.loads(pickle.dumps(model)).weight.equal(model.weight)
