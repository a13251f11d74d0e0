"""Every method on every backbone under every strategy: it trains, and trains what it says.

Small instances of the real architectures, 30 steps on 16 digits.  `pytest -m "not faults"
tests/test_grid.py` runs all 176 cells; without, each method but AdaLoRA (in `test_low_rank.py`) meets one
backbone, the strategies taking turns.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import toolkit
from toolkit.backbones import data_config, small_instance
from toolkit.budget import STRATEGIES
from toolkit.datasets import in_memory
from toolkit.methods import METHODS, set_train_mode

BACKBONES = ("vit_small", "tiny_vit", "vim_small", "mambavision_t")
STEPS = 30
# The small MambaVision has few activations: only with more images are they what a budget is about.
BATCH_SIZES = {"vit_small": 16, "tiny_vit": 16, "vim_small": 16, "mambavision_t": 48}
LR = {"full": 2e-3, "galore": 2e-3, "linear": 0.1, "bitfit": 0.1, "norm": 5e-2}  # of the others 1e-2
LR_OF_CELL = {("vit_small", "bitfit"): 5e-3}


def cells():
    methods = [name for name, method in METHODS.items() if "classification" in method.tasks]
    for (b, backbone), (m, method) in itertools.product(enumerate(BACKBONES), enumerate(methods)):
        for s, strategy in enumerate(STRATEGIES):
            slow = backbone == "tiny_vit" and method == "adalora"
            usual = (
                not slow and b == m % len(BACKBONES) and s == (b + m // len(BACKBONES) + 1) % len(STRATEGIES)
            )
            marks = [] if usual else [pytest.mark.long]
            yield pytest.param(backbone, method, strategy, marks=marks)


def few(digits, batch_size):
    """One batch, and four digits to validate on."""
    parts = {
        split: (getattr(digits, split).images[:size], getattr(digits, split).labels[:size])
        for split, size in {"train": batch_size, "val": 4, "test": 4}.items()
    }
    return in_memory("digits", parts, digits.classes, digits.policy)


def as_if_pretrained(model, images):
    """Batch norms that let something through: timm begins some of TinyViT's at 0."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.ones_(norm.weight)
        norm.momentum = None  # an average
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1


@pytest.mark.parametrize("backbone, method, strategy", cells())
def test_it_trains(digits, backbone, method, strategy):
    toolkit.seed_everything(0)
    options = {"rank": 4} if "depthwise" in METHODS[method].options.names() or method == "qlora" else {}
    model = small_instance(backbone, 10)
    size = data_config(model)["input_size"]
    batch_size = BATCH_SIZES[backbone]
    batch = torch.randn(batch_size, *size), torch.zeros(batch_size, dtype=torch.long)
    as_if_pretrained(model, batch[0])
    model = toolkit.adapt(model, method, **options)
    set_train_mode(model)
    stock = toolkit.plan(model, "1GB", batch, strategy="none").peak_bytes
    # A frozen backbone keeps nothing, and weights and batch are most of what so small a one takes.
    share = 0.8 if method == "linear" else 0.6
    lr = LR_OF_CELL.get((backbone, method), LR.get(method, 1e-2))
    experiment = toolkit.Experiment(
        dataset="digits", backbone=backbone, pretrained=False, method=method, checkpointing=strategy,
        budget=int(share * stock), epochs=STEPS, batch_size=batch_size, lr=lr, device="cpu",
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved: set[str] = set()

    def is_real(tensor):  # planning runs hooks, too, on tensors without values
        return not isinstance(tensor, FakeTensor)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: moved.add(name) if is_real(p.grad) and p.grad.any() else None
            )
    result = toolkit.fit(model, few(digits, batch_size), experiment)
    assert result.status == "ok", result.error
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.8 * losses[0]
    assert moved == trained
    statistics = {n for n, _ in model.named_buffers() if "running" in n or "batches" in n}
    allowed = trained | (statistics if METHODS[method].batch_norm == "updated" else set())
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed <= allowed and changed & trained
    if strategy == "planned":
        assert result.peak_bytes <= experiment.budget_bytes
        assert result.out_of_memory_retries == 0
