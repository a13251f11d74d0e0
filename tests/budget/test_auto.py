"""auto_checkpoint in loops that know nothing of it, and the guard."""

import copy
import functools
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import toolkit
from toolkit import auto_checkpoint
from toolkit.budget import Planner, TensorMemory, format_bytes
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


@pytest.mark.filterwarnings("ignore:.* between the steps")  # by the gradients that are compared
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
        del before, statistics  # which the loop would hold
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


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm, self.a, self.b = (
            nn.LayerNorm(width),
            nn.Linear(width, 8 * width),
            nn.Linear(8 * width, width),
        )

    def forward(self, x):  # (B, T, width), same shape out
        return x + self.b(F.gelu(self.a(self.norm(x))))


def small_net(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Sequential(*[Block() for _ in range(depth)]), nn.Linear(32, 5))


def tokens(count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 12, 8, generator=generator), torch.arange(count * 12).view(count, 12) % 5


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@functools.cache
def tight_budget(share=0.3):
    """Bytes at a share of the way from the smallest peak of `small_net` to the stock one."""
    planner = Planner(small_net(), tokens(), loss=token_loss)
    least = planner.smallest_bytes()
    return int(least + share * (planner.plan(1 << 40).unplanned_peak_bytes - least)) + 1


def step_of(model, count=16, called=None):
    """Loss and gradients of one step; `called`: the model as the loop calls it."""
    x, y = tokens(count)
    model.zero_grad()
    loss = token_loss((called or model)(x), y)
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters()]


def measured(model):
    """A counter of memory, to be entered, that knows the model and the batch."""
    memory = TensorMemory(torch.device("cpu"))
    memory.track([*model.parameters(), *tokens()])
    return memory


def scaled(block):
    """A forward that people set on a module."""
    return lambda x: x + 0.1 * block.b(F.gelu(block.a(block.norm(x))))


class Encoder(nn.Module):
    """A model whose loop may call a part of its forward."""

    def __init__(self):
        super().__init__()
        self.body = small_net()

    def features(self, x):
        return self.body[1](self.body[0](x))

    def forward(self, x):
        return self.body[2](self.features(x))


def test_calls_past_the_forward_are_recomputed_block_by_block_and_told_once():
    model = Encoder()

    def step(parts):
        x, y = tokens()
        outputs = parts.body[2](parts.features(x))
        token_loss(outputs, y).backward()

    step(model)
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with auto_checkpoint(model, tight_budget(), tokens(), loss=token_loss) as handle:
        with pytest.warns(
            UserWarning, match="Encoder.features runs blocks of Encoder outside of its forward"
        ):
            step(model)
        assert equal([p.grad for p in model.parameters()], expected)
        model.zero_grad()
        with measured(model) as memory:
            step(model)
        assert memory.peak_bytes <= tight_budget() and handle.departures == 0
        with torch.no_grad():
            model.features(tokens()[0])
        assert "6 blocks, run by Encoder.features" in handle.report()
    model.zero_grad()
    with auto_checkpoint(model, "1GB", tokens(), loss=token_loss):
        step(model)  # all is kept, as planned
    assert equal([p.grad for p in model.parameters()], expected)


def test_a_report_shows_the_peaks_of_the_steps_that_it_was_asked_to_measure():
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with auto_checkpoint(model, tight_budget(), tokens(), loss=token_loss, optimizer=optimizer) as handle:
        for step in range(4):
            if step == 1:
                handle.measure(steps=2)
            with measured(model) as memory:
                memory.track(value for state in optimizer.state.values() for value in state.values())
                token_loss(model(tokens()[0]), tokens()[1]).backward()
                other.step()
                optimizer.step()
            optimizer.zero_grad()
        report = handle.report()
    peak = format_bytes(memory.peak_bytes)
    assert f"measured    {peak}, {peak}; 0 steps over the budget" in report
    assert "ran         4 forward passes, 0 changes of the plan" in report
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []


def test_nothing_watches_between_steps_and_after_the_last_one():
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with auto_checkpoint(model, tight_budget(), tokens(), loss=token_loss, optimizer=optimizer):
        step_of(model)
        optimizer.step()
        step_of(model)  # it began with what the first has left, and was the last to be looked at
        assert modes() == []
        with torch.no_grad():  # an evaluation
            model(tokens()[0])
        step_of(model)
        optimizer.step()
        assert modes() == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["model", "blocks"])
def test_forwards_that_others_set_run_before_and_after_a_plan(when, where):
    def change(model):
        for block in model[1] if where == "blocks" else [model]:
            forward = block.forward
            block.forward = scaled(block) if where == "blocks" else lambda x, forward=forward: 2 * forward(x)

    model, plain = small_net(), small_net()
    change(plain)
    expected = step_of(plain)
    if when == "before":
        change(model)
    handle = auto_checkpoint(model, tight_budget(), tokens(), loss=token_loss)
    if when == "after":
        change(model)
    for _ in range(3):
        assert equal(step_of(model), expected)
    handle.remove()
    assert equal(step_of(model), expected)


def test_a_library_that_restores_the_forward_it_found_takes_nothing_away():
    model = small_net()
    expected = step_of(model)
    found = model.forward  # before the plan
    with auto_checkpoint(model, tight_budget(), tokens(), loss=token_loss) as handle:
        for restored in (found, model.forward):
            model.forward = lambda x, forward=model.forward: 2 * forward(x)
            assert not equal(step_of(model), expected)
            model.forward = restored
            assert equal(step_of(model), expected) and "forward" not in vars(model)
        assert handle.plan.recompute_flops > 0


def test_a_planned_model_looks_copies_and_pickles_like_the_model(tmp_path):
    model = ListNet()
    before, signature = set(vars(model)), inspect.signature(model.forward)
    with auto_checkpoint(model, "1GB", torch.randn(4, 8)):
        assert (
            inspect.signature(model.forward)
            == inspect.signature(type(model).forward.__get__(model))
            == signature
        )
        torch.save(model, tmp_path / "model")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model", weights_only=False)):
            assert type(other) is ListNet and set(vars(other)) == before
            assert all(type(block) is Concatenation for block in other.blocks)
    assert type(model) is ListNet and set(vars(model)) == before


def test_a_second_plan_replaces_the_first_and_overlapping_ones_are_refused():
    model, budget = small_net(), tight_budget()
    expected = step_of(model)
    first = auto_checkpoint(model, "1GB", tokens(), loss=token_loss)
    second = auto_checkpoint(model, budget, tokens(), loss=token_loss)
    first.remove()
    with measured(model) as memory:
        assert equal(step_of(model), expected)
    assert memory.peak_bytes <= budget and second.plan.recompute_flops > 0
    for other in (model[1], nn.Sequential(model)):
        with pytest.raises(InputError, match="shares modules with a Sequential that is under a plan"):
            auto_checkpoint(other, "1GB", torch.randn(16, 12, 32 if other is model[1] else 8))
    second.remove()
    auto_checkpoint(nn.Sequential(model), "1GB", tokens(), loss=token_loss).remove()
    assert type(model) is nn.Sequential


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by dynamo
@pytest.mark.parametrize("how", ["around", "around, before", "in place", "blocks", "blocks, recorded"])
def test_what_is_compiled_stays_compiled_where_a_plan_keeps_everything(how):
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(graph) or graph.forward(*args)

    expected = step_of(small_net())
    for budget, compiled in ((1 << 30, True), (tight_budget(), False)):
        torch._dynamo.reset()
        model, called = small_net(), None
        if "blocks" in how:
            for block in model[1]:
                block.compile(backend=backend)
        elif how == "in place":
            model.compile(backend=backend)
        else:
            called = torch.compile(model, backend=backend)
        if how == "around, before":
            called(tokens()[0])
        with auto_checkpoint(
            model if how != "around" else called,
            budget,
            None if "recorded" in how else tokens(),
            loss=token_loss,
        ) as handle:
            step_of(model, called=called)  # the first is watched or recorded
            runs.clear()
            assert equal(step_of(model, called=called), expected)
            assert bool(runs) == compiled == (handle.plan.recompute_flops == 0)
            with measured(model) as memory:
                step_of(model, called=called)
            assert memory.peak_bytes <= budget and handle.departures == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by dynamo
@pytest.mark.parametrize("how", ["around", "in place", "a function around"])
def test_no_step_of_a_compiled_model_is_recorded(how):
    """Modes that are entered in compiled code do not outlast it, so the recording would miss operators."""
    torch._dynamo.reset()
    model, plain = small_net(), small_net()
    if how == "in place":
        model.compile(backend="eager")
    called = {
        "around": lambda: torch.compile(model, backend="eager"),
        "in place": lambda: model,
        "a function around": lambda: torch.compile(lambda x: model(x), backend="eager"),
    }[how]()
    with auto_checkpoint(model, "1GB") as handle:
        handle.measure(steps=1)
        for _ in range(2):
            with pytest.raises(InputError, match="batch"):
                called(tokens()[0])
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
    assert equal(step_of(model, called=called), step_of(plain))


def test_threads_run_a_planned_model_while_one_of_them_plans():
    model = small_net()
    expected = {count: step_of(model, count)[0] for count in (8, 16, 24)}
    auto_checkpoint(model, tight_budget(0.9), tokens(), loss=token_loss)
    losses, errors = [], []

    def run(count):
        try:
            x, y = tokens(count)
            for _ in range(5):
                losses.append((count, token_loss(model(x), y).detach()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(count,)) for count in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(losses) == 15
    assert all(torch.equal(loss, expected[count]) for count, loss in losses)


def test_an_interrupted_forward_leaves_the_model_as_it_was():
    model = small_net()
    expected = step_of(model)
    with auto_checkpoint(model, tight_budget(), tokens(), loss=token_loss):
        for error in (KeyboardInterrupt, ValueError):

            def interrupt(*_, error=error):
                raise error

            hook = model[1][2].register_forward_pre_hook(interrupt)
            with pytest.raises(error):
                model(tokens()[0])
            hook.remove()
            assert equal(step_of(model), expected)
