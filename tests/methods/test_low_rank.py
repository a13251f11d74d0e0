"""LoRA, DoRA, AdaLoRA and QLoRA: what they train, how ranks move, what is saved and merged."""

import copy
import re
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.backbones import small_instance
from toolkit.errors import InputError
from toolkit.methods import Hooks, merge, set_train_mode
from toolkit.methods.adalora import RankAllocation
from toolkit.methods.lean import is_packed, unpacked_weight
from toolkit.methods.qlora import quantise
from toolkit.methods.targets import targets_of

LOW_RANK = ("lora", "dora", "adalora", "qlora")
ADAPTERS = (*LOW_RANK, "ia3", "lokr")


def four_bit_layers(model):
    """Packed layers by name; not peft's, which wrap them."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def trained(model, batch, steps=4, lr=1e-2):
    """`model` after some steps, ranks moved where the method moves them."""
    set_train_mode(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    hooks = RankAllocation(model) if hasattr(model.base_model, "rankallocator") else Hooks()
    hooks.begin(steps)
    for step in range(steps):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        (loss + (hooks.penalty() or 0)).backward()
        optimizer.step()
        hooks.after_step(step + 1)
        optimizer.zero_grad()
    return model.eval()


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("method", ADAPTERS)
def test_all_adapt_the_same_layers(demo_model, method):
    plain, adapted = demo_model("linear"), demo_model(method)
    names = {
        n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "base_layer")
    }
    assert names == set(targets_of(plain, method).adapted) and len(names) == 16


# peft says this of every AdaLoRA adapter that it saved itself, and loads it rightly.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(demo_model, batch, tmp_path, method):
    model = trained(demo_model(method), batch)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    base = demo_model("full")
    if method == "qlora":
        quantise(base, targets_of(base, method).adapted, double_quantisation=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert relative(loaded(batch[0]), model(batch[0])) < 1e-5


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_merged_model_gives_the_same_logits(demo_model, batch, method):
    model = trained(demo_model(method), batch)
    with torch.no_grad():
        expected = model(batch[0])
        plain = merge(model)
        assert relative(plain(batch[0]), expected) < 1e-5
    assert not hasattr(plain, "peft_config") and not four_bit_layers(plain)
    assert plain.state_dict().keys() == demo_model("full").state_dict().keys()


def test_adapters_on_adapters(demo_model):
    with pytest.raises(InputError, match="carries adapters already"):
        toolkit.adapt(demo_model("lora"), "linear")


class HeadsAlike(nn.Module):
    """Its head is named as the end of two other modules, and its `base_layer` is no adapter's."""

    lora_targets = "base_layer"

    def __init__(self):
        super().__init__()
        self.base_layer, self.aux_head, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential()
        self.head.add_module("head", nn.Linear(8, 2))

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.aux_head(self.base_layer(x)))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "lokr"])
def test_a_head_that_other_modules_are_named_like(method, tmp_path):
    model = HeadsAlike()
    weights = copy.deepcopy(model.state_dict())
    model = toolkit.adapt(model, method, **({} if method == "ia3" else {"rank": 2}))
    names = {name.removeprefix("base_model.model.") for name in toolkit.summarize(model).names}
    assert {name for name in names if not name.startswith("base_layer")} == {
        "head.head.modules_to_save.default.weight", "head.head.modules_to_save.default.bias"
    }  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    x = torch.randn(4, 8)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    base = HeadsAlike()
    base.load_state_dict(weights)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapted_layers_that_the_head_is_named_like(method):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.abc, self.c = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return x + self.c(self.abc(x).relu())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.c = nn.Sequential(Block(), Block()), nn.Linear(32, 2)

        def get_classifier(self):
            return self.c

        def forward(self, x):
            return self.c(self.blocks(x))

    model = toolkit.adapt(Net(), method)
    assert sum(hasattr(module, "base_layer") for module in model.modules()) == 4
    others = [n for n in toolkit.summarize(model).names if not re.search("lora_|ia3_|lokr_", n)]
    assert others == [f"base_model.model.c.modules_to_save.default.{part}" for part in ("weight", "bias")]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    x = torch.randn(4, 32)
    expected = model.eval()(x)
    torch.testing.assert_close(merge(model)(x), expected)


def test_merging_what_has_no_adapters(demo_model):
    with pytest.raises(InputError, match="no adapters to merge"):
        merge(demo_model("bitfit"))


def test_adalora_moves_ranks_until_they_add_up_to_the_target(few_digits):
    experiment = toolkit.Experiment(
        method="adalora", epochs=6, batch_size=16, options={"rank": 4}, device="cpu"
    )
    toolkit.seed_everything(0)
    model = toolkit.adapt(toolkit.build_backbone("demo_vit", 10), "adalora", **experiment.method_options)
    assert all(
        p.shape == (6, 1) for n, p in model.named_parameters() if "lora_E" in n
    )  # 1.5 times the target
    result = toolkit.fit(model, few_digits, experiment)
    ranks = RankAllocation(model).ranks
    assert len(ranks) == 16 and sum(ranks.values()) == 4 * 16 and len(set(ranks.values())) > 1
    values = {n: p for n, p in model.named_parameters() if "lora_E" in n}
    assert sum(int(p.count_nonzero()) for p in values.values()) == 4 * 16  # the others are off
    assert result.peak_bytes == result.predicted_peak_bytes
    # Its penalty trains, and is not booked as loss: that of 10 classes begins near ln 10.
    assert result.history[0]["train_loss"] < 2.4


def test_the_schedule_follows_the_number_of_steps(demo_model):
    allocation = RankAllocation(demo_model("adalora"))
    allocation.begin(1000)
    config = allocation.config
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (100, 300, 10, 1000)
    with pytest.raises(InputError, match="at least 2"):
        allocation.begin(1)


def test_steps_that_overflow_do_not_spoil_the_scores(demo_model, batch):
    """A GradScaler skips them; a score that is no number once would be none for ever."""
    model = demo_model("adalora", rank=4)
    allocation = RankAllocation(model)
    allocation.begin(10)
    for step in range(1, 11):
        (F.cross_entropy(model(batch[0]), batch[1]) + allocation.penalty()).backward()
        finite = step % 3 != 1
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.grad.mul_(1 if finite else torch.inf)
                    p.sub_(0.05 * p.grad if finite else 0)
        allocation.after_step(step, finite=finite)
        assert all(torch.isfinite(score).all() for score in allocation.tensors)
        model.zero_grad()
    assert sum(allocation.ranks.values()) == 4 * 16


def test_ranks_move_down_to_one(demo_model, batch):
    model = trained(demo_model("adalora", rank=1), batch, steps=10)
    assert sum(RankAllocation(model).ranks.values()) == 16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_knows_of_penalty_and_scores(few_digits, precision):
    experiment = toolkit.Experiment(
        method="adalora", epochs=1, batch_size=2, precision=precision, device="cpu", budget="100MB"
    )
    toolkit.seed_everything(0)
    model = toolkit.adapt(toolkit.build_backbone("demo_vit", 10), "adalora")
    result = toolkit.fit(model, few_digits, experiment)
    assert result.peak_bytes == result.predicted_peak_bytes


def test_the_penalty_is_that_of_peft(demo_model, batch):
    """peft adds it for models that return their loss: so wrap one that does."""
    model = demo_model("adalora")
    inner = model.base_model.model

    class Output:
        loss = None

    original = inner.forward

    def with_loss(x):
        output = Output()
        output.loss = F.cross_entropy(original(x), batch[1])
        return output

    loss = F.cross_entropy(model(batch[0]), batch[1])
    inner.forward = with_loss
    try:
        total = model.base_model(batch[0]).loss
    finally:
        del inner.forward
    torch.testing.assert_close(total - loss, RankAllocation(model).penalty())


def test_allocation_goes_on_from_its_state(demo_model, batch):
    def steps(model, allocation, numbers):
        allocation.begin(8)
        for step in numbers:
            (F.cross_entropy(model(batch[0]), batch[1]) + allocation.penalty()).backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p -= 0.05 * p.grad
            allocation.after_step(step)
            model.zero_grad()

    straight = demo_model("adalora").eval()
    steps(straight, RankAllocation(straight), range(1, 9))
    first = demo_model("adalora").eval()
    steps(first, RankAllocation(first), range(1, 5))
    second = demo_model("adalora").eval()
    second.load_state_dict(first.state_dict())
    allocation = RankAllocation(second)
    allocation.load_state(RankAllocation(first).state())
    steps(second, allocation, range(5, 9))
    assert allocation.ranks == RankAllocation(straight).ranks != {}
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("double_quantisation", [False, True])
def test_qlora_holds_weights_of_four_bits(demo_model, batch, double_quantisation):
    def build(method, **options):
        toolkit.seed_everything(0)
        return toolkit.adapt(small_instance("vit_small", 10), method, **options).eval()

    plain, model = build("linear"), build("qlora", double_quantisation=double_quantisation)
    layers = four_bit_layers(model)
    assert len(layers) == 12 and all(type(layer.weight).__name__ == "Params4bit" for layer in layers.values())
    count = sum(layer.in_features * layer.out_features for layer in layers.values())
    packed = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers.values())})
    biases = sum(layer.bias.nbytes for layer in layers.values())
    tables = 16 * 4 + double_quantisation * (256 * 4 + 4)  # of each layer
    held = sum(t.nbytes for t in toolkit.budget.tensors_of(packed)) - biases - 12 * tables
    assert (0.5 if double_quantisation else 0.55) < held / count <= 0.6
    assert not any(isinstance(m, type(next(iter(layers.values())))) for m in [model.get_classifier()])
    with torch.no_grad():
        assert 1e-3 < relative(model(batch[0]), plain(batch[0])) < 0.3  # NF4: some 9 % per layer
    summary = toolkit.summarize(model)
    assert summary.total == toolkit.summarize(build("lora")).total


def test_qlora_trains_and_evaluates_in_turns(demo_model, batch):
    model = demo_model("qlora")
    weights = {name: layer.weight.clone() for name, layer in four_bit_layers(model).items()}
    losses = []
    for _ in range(3):
        trained(model, batch, steps=3, lr=2e-3)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(batch[0]), batch[1])))
    assert losses[0] > losses[1] > losses[2]
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in four_bit_layers(model).items())


def test_unpacked_weights_are_near_the_original(demo_model):
    plain, model = demo_model("full"), demo_model("qlora")
    for name, layer in four_bit_layers(model).items():
        original = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
        error = unpacked_weight(layer) - original.weight.detach()
        assert 0.05 < error.norm() / original.weight.norm() < 0.12  # NF4 of Gaussian numbers: 9 %


def test_four_bits_without_bitsandbytes(demo_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="bitsandbytes"):
        demo_model("qlora")


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_rank_above_what_a_layer_allows(demo_model, method):
    with pytest.raises(InputError, match=r"rank 97 .*above the 96 that blocks\.0\.attn\.qkv"):
        demo_model(method, rank=97)


def test_targets_that_cannot_be_adapted():
    class Net(nn.Module):
        lora_targets = r"stem|body"

        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def get_classifier(self):
            return self.head

    with pytest.raises(InputError, match="stem is a convolution"):
        toolkit.adapt(Net(), "qlora")
    Net.lora_targets = r"body"
    with pytest.raises(InputError, match="only BatchNorm2d"):
        toolkit.adapt(Net(), "lora")
    with pytest.raises(InputError, match="only plain linear layers can be stored in 4 bits"):
        quantise(Net(), ["stem"], double_quantisation=False)
    odd = nn.Sequential(nn.Linear(40, 8))
    with pytest.raises(InputError, match="0 has 40 inputs"):
        quantise(odd, ["0"], double_quantisation=False)
    Net.lora_targets = r"nothing"
    with pytest.raises(InputError, match="targets 'nothing' matches no module"):
        toolkit.adapt(Net(), "lora")


@pytest.mark.parametrize("method", ["linear", "bitfit", "norm", "lora"])
def test_batch_norms_keep_their_statistics_unless_everything_trains(method):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return x + self.norm(self.fc(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 3)

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return self.head(self.blocks(x))

    toolkit.seed_everything(0)
    model = Net()
    for name, moves in ((method, False), ("full", True)):
        model = toolkit.adapt(merge(model) if hasattr(model, "merge_and_unload") else model, name)
        set_train_mode(model)
        before = {n: b.clone() for n, b in model.named_buffers()}
        model(torch.randn(8, 8)).sum().backward()
        assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers()) == moves


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_trained_is_saved_and_loaded(demo_model, batch, tmp_path, method):
    model = trained(demo_model(method), batch)
    other = demo_model(method).eval()
    toolkit.load_adapted(other, toolkit.save_adapted(model, tmp_path / "adapted.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(batch[0]), model(batch[0]))
    stored = (tmp_path / "adapted.safetensors").stat().st_size
    assert stored < 1.1 * toolkit.summarize(model).adapter_bytes + 20_000
