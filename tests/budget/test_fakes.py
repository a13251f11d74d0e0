"""A run on fake tensors leaves nothing behind, and says what it cannot run."""

import functools
import gc
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrizations import spectral_norm

from toolkit.budget import Planner, auto_checkpoint, plan
from toolkit.budget.fakes import Others, on_fake_tensors
from toolkit.budget.flops import flops
from toolkit.budget.found import SHARED
from toolkit.errors import InputError

BATCH = torch.randn(4, 8), torch.tensor([0, 1, 2, 1])


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def network(block=Block, depth=2):
    torch.manual_seed(0)
    blocks = nn.Sequential(*[block() for _ in range(depth)])
    return nn.Sequential(nn.Linear(8, 16), blocks, nn.Linear(16, 5)).train()


@functools.cache
def ones(size):
    return torch.ones(size, size)


@functools.lru_cache(maxsize=8)
def twos(size):
    return torch.full((size, size), 2.0)


SEEN: list = []
KNOWN: dict = {}
calls = 0


class Caching(Block):
    def forward(self, x):
        global calls
        calls += 1
        SEEN.append(x.mean())
        if "mask" not in KNOWN:
            KNOWN["mask"] = torch.ones(len(x), len(x))
        return super().forward(x) + (ones(len(x)) + twos(len(x)) + KNOWN["mask"]) @ x


class Settings:
    def __init__(self):
        self.inputs, self.last = [], None


class Counting(Block):
    calls_of_all = 0

    def __init__(self):
        super().__init__()
        self.calls, self.settings, self.mean = 0, Settings(), torch.zeros(16)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        Counting.calls_of_all += 1
        self.settings.inputs.append(x)
        self.settings.last = x.sum()
        self.steps += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.loss = x.square().mean()
        return super().forward(x) * (1 if random.random() < 2 and np.random.rand() < 2 else 0)


class Spectral(Block):
    def __init__(self):
        super().__init__()
        self.up = spectral_norm(self.up)
        self.down = nn.utils.spectral_norm(self.down)


class LockedDict(dict):
    def __setitem__(self, *item):
        raise TypeError("this dict does not change")

    clear = update = pop = __delitem__ = __setitem__


class Locked(Block):
    def __init__(self):
        super().__init__()
        self.config = LockedDict(width=16)


class Listed(nn.Module):
    """Uses a weight through a list, and a module that is not registered."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.weights, self.others = [self.first.weight], [nn.BatchNorm1d(16)]

    def forward(self, x):
        return self.head(self.others[0](F.linear(x, self.weights[0])))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer(x[:, None])[0][:, -1])


def hooked():
    model, outputs, by_place = network(), [], {}

    def note(place, module, args, output):
        outputs.append(output)
        by_place[place] = output

    for place, block in enumerate(model[1]):
        block.register_forward_hook(functools.partial(note, place))
    model[2].weight.register_hook(lambda grad: outputs.append(grad))
    return model


def scripted_inside():
    return nn.Sequential(
        torch.jit.script(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))), nn.Linear(16, 5)
    )


NETWORKS = {
    "caches": lambda: network(Caching),
    "counters": lambda: network(Counting),
    "spectral norms": lambda: network(Spectral),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)),
    "a dict that does not change": lambda: network(Locked),
    "lists": Listed,
    "recurrent": Recurrent,
    "hooks": hooked,
    "scripted": lambda: torch.jit.script(network()),
    "a scripted part": scripted_inside,
    "traced": lambda: torch.jit.trace(network(), BATCH[0]),
}


def described(value, seen):
    """`value` and what hangs on it, tensors by identity, version and gradient."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.requires_grad, value.grad is None, value.sum().item()
    if isinstance(value, int | float | str | torch.dtype | torch.device | None):
        return repr(value)
    if id(value) in seen:
        return "seen"
    seen[id(value)] = value
    if isinstance(value, dict):
        return [(str(key), described(item, seen)) for key, item in dict.items(value)]
    if isinstance(value, list | tuple | set):
        return [described(item, seen) for item in value]
    if isinstance(value, nn.Module) or hasattr(value, "to_dict") or type(value).__module__ == __name__:
        return described(vars(value), seen)
    return type(value).__name__


def everything(model):
    torchs, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    outside = calls, len(SEEN), list(KNOWN), ones.cache_info().currsize, twos.cache_info().currsize
    tensors = {name: tensor.clone().tolist() for name, tensor in model.state_dict().items()}
    return (
        described(model, {}),
        torchs.tolist(),
        pythons,
        numpys.tolist(),
        outside,
        Counting.calls_of_all,
        tensors,
    )


def fakes():
    gc.collect()
    return {id(o) for o in gc.get_objects() if issubclass(type(o), FakeTensor)}


def assert_no_trace(model, batch):
    others = fakes()  # of torch.compile, which keeps some
    before = everything(model)
    planner = Planner(model, batch)
    planner.plan(planner.smallest_bytes())
    plan(model, "10GB", batch, strategy="none")
    flops(model, batch)
    assert everything(model) == before
    assert fakes() <= others


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("name", NETWORKS)
def test_planning_leaves_no_trace(name):
    model = NETWORKS[name]().train()
    assert_no_trace(model, BATCH)
    assert model(BATCH[0]).sum().isfinite()  # no fake tensor comes back out of a cache


TIMM = (
    "test_vit",
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_byobnet",
    "test_nfnet",
    "test_vit4",
)
TORCHVISION = ("alexnet", "googlenet", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121")
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
IMAGE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
    patch_size=8, num_labels=3,
)  # fmt: skip
SWIN = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
T5 = dict(d_model=32, num_layers=2, num_heads=2, d_ff=64, vocab_size=100, d_kv=16, decoder_start_token_id=0)
SEGFORMER = dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2])
TRANSFORMERS = {
    "ViTForImageClassification": ("ViTConfig", IMAGE),
    "DINOv3ViTModel": ("DINOv3ViTConfig", IMAGE),
    "Dinov2ForImageClassification": ("Dinov2Config", IMAGE),
    "SwinForImageClassification": ("SwinConfig", SWIN),
    "SegformerForImageClassification": ("SegformerConfig", SEGFORMER),
    "BertForSequenceClassification": ("BertConfig", TEXT),
    "LlamaForCausalLM": ("LlamaConfig", TEXT | {"num_key_value_heads": 2}),
    "T5ForConditionalGeneration": ("T5Config", T5),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", [*TIMM, *TORCHVISION, *TRANSFORMERS])
def test_planning_leaves_no_trace_on_models_of_others(name):
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        assert_no_trace(timm.create_model(name, num_classes=3).train(), torch.randn(2, 3, 64, 64))
        return
    if name in TORCHVISION:
        import torchvision

        model = torchvision.models.get_model(name, num_classes=3).train()
        assert_no_trace(model, torch.randn(2, 3, 96, 96))
        return
    import transformers

    config, options = TRANSFORMERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).train()
    tokens = torch.randint(0, 100, (2, 12))
    if "vocab_size" not in options:
        batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        batch = {"input_ids": tokens, "labels": torch.tensor([0, 1]) if "Sequence" in name else tokens}
    assert_no_trace(model, batch)


class MixtureLoss(Block):
    def forward(self, x):
        self.loss = x.square().mean()
        return super().forward(x)


LOSSES: list = []


class OutsideLoss(Block):
    def forward(self, x):
        LOSSES.append(x.square().mean())
        return super().forward(x)


@pytest.mark.parametrize("block", [MixtureLoss, OutsideLoss, Counting, Spectral])
@pytest.mark.filterwarnings("ignore:.*spectral_norm")
def test_blocks_that_change_more_than_their_output_are_neither_sliced_nor_run(block):
    model = network(block, 3)
    batch = torch.randn(64, 8), torch.arange(64) % 5
    runs = []
    model[1][2].up.register_forward_hook(lambda *_: runs.append(isinstance(_[2], FakeTensor)))
    chain = Planner(model, batch).chain(64, True)
    assert {option.slices for options in chain.options for option in options} == {1}
    assert runs == []  # the runs on fakes are undone, and there is no other


def test_the_owner_of_an_effect_is_named():
    model = network(Counting)
    others = Others()
    with on_fake_tensors(model, BATCH[0], others) as x:
        model(x)
    assert {*model[1], SHARED} <= others.effects  # the blocks, and random numbers
    assert not {model, model[0], model[2]} & others.effects


class ToNumpy(Block):
    def forward(self, x):
        return super().forward(x) * float(x.detach().numpy().mean())


class Deciding(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Breaking(Block):
    def forward(self, x):
        self.started = True
        return super().forward(x.reshape(3, -1))


def lazy():
    return nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 5))


def sparse():
    return nn.Sequential(nn.Embedding(10, 16, sparse=True), nn.Flatten(), nn.Linear(16 * 8, 5))


class SparseFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 5))

    def forward(self, x):
        return F.embedding(x.long().abs() % 10, self.table, sparse=True).sum(1)


BAD = {
    "sparse gradients": (SparseFunction, "sparse tensors"),
    "numpy": (lambda: network(ToNumpy), "depends on values.*record a real step"),
    "values": (lambda: network(Deciding), "depends on values.*record a real step"),
    "a wrong shape": (lambda: network(Breaking), "fails on this batch.*reshape|fails on this batch.*shape"),
    "lazy": (lazy, "lazy.*on one batch first"),
    "sparse": (sparse, "sparse=False"),
    "frozen": (lambda: network().requires_grad_(False), "no parameter requires a gradient"),
    "nothing to train": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "no parameter requires a gradient"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("strategy", ["planned", "static", "auto"])
def test_what_cannot_be_planned_is_named_and_left_as_it_was(name, strategy):
    build, message = BAD[name]
    model = build()
    batch = (torch.ones(4, 8, dtype=torch.long), BATCH[1]) if name == "sparse" else BATCH
    attributes = {part: set(vars(module)) for part, module in model.named_modules()}
    with pytest.raises(InputError, match=message):
        if strategy == "auto":
            auto_checkpoint(model, "1GB", batch)
        else:
            plan(model, "1GB", batch, strategy=strategy)
    assert {part: set(vars(module)) for part, module in model.named_modules()} == attributes
    assert not any(isinstance(tensor, FakeTensor) for tensor in (*model.parameters(), *model.buffers()))


def test_planning_inside_a_function_transform_is_refused():
    model = network()
    with pytest.raises(InputError, match="before"):
        torch.func.grad(lambda x: plan(model, "1GB", BATCH) and x.sum())(torch.ones(2))


def test_planning_needs_no_gradients_enabled():
    with torch.no_grad():
        inside = plan(network(), "1GB", BATCH)
        assert not torch.is_grad_enabled()
    assert inside.peak_bytes == plan(network(), "1GB", BATCH).peak_bytes
