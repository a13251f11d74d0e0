"""Memory estimates: architectures, the bytes of every form, and choices within a budget."""

from __future__ import annotations

import copy
import functools

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_contrastive, tiny_generative, tiny_mobilevlm
from torch import nn

from toolkit import InputError
from toolkit.baselines.architectures import architecture
from toolkit.baselines.contrastive import PROMPTS_AT_ONCE
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.generative import load, packed_layers, prune_vocabulary
from toolkit.baselines.memory_estimate import (
    contrastive_estimate,
    estimate,
    estimate_table,
    form_and_batch,
    generative_estimate,
    nf4_bytes,
    weights_bytes,
)
from toolkit.baselines.trie import Trie, score_trie
from toolkit.budget import TensorMemory, tensors_of
from toolkit.methods.lean import is_packed
from toolkit.methods.qlora import quantise

CPU = torch.device("cpu")
NAMES = ["can", "candle", "maple tree", "cat"]
QUESTION = "What type of object is in this photo?"
IMAGES = [Image.fromarray(np.full((40, 30, 3), 10 * i, np.uint8)) for i in range(3)]


def allocated(tensors) -> int:
    memory = TensorMemory(CPU)
    memory.track(tensors)
    return memory.allocated_bytes


def peak_of(model: nn.Module, inputs, run) -> int:
    """Counted bytes of a real run at its highest moment, weights included.

    Not in inference mode, where the counter does not see into composite operators.
    """
    memory = TensorMemory(CPU)
    memory.track([*tensors_of(model), *inputs])
    with torch.no_grad(), memory:
        run()
    return memory.peak_bytes


def on_meta(model: nn.Module) -> nn.Module:
    """The architecture of a model of transformers; moving it there would part tied weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------
# Architectures


@pytest.mark.parametrize(
    ("name", "millions", "vision_millions"),
    [
        ("smolvlm_256m", 256, 86),
        ("smolvlm2_500m", 507, 86),
        ("smolvlm", 2246, 413),
        ("paligemma", 2923, 412),
        ("paligemma2", 3032, 412),
        # 3.37 GB and 6.07 GB of two-byte numbers are the sizes of the published files.
        ("mobilevlm_1.7b", 1687, 304),
        ("mobilevlm_3b", 3034, 304),
        ("mobilevlm_v2_1.7b", 1674, 304),
        ("mobilevlm_v2_3b", 3014, 304),
        ("clip_b32", 151, 88),
        ("siglip_b16", 203, 93),
        ("dinov2_s", 22, None),
        ("dinov2_b", 86, None),
    ],
)
def test_architectures_have_the_published_number_of_parameters(name, millions, vision_millions):
    model = architecture(name)
    assert round(parameters(model) / 1e6) == millions
    assert {tensor.device.type for tensor in tensors_of(model)} == {"meta"}
    if vision_millions:
        inner = getattr(model, "model", model)
        tower = next(
            getattr(inner, name)
            for name in ("vision_model", "vision_tower", "visual")
            if hasattr(inner, name)
        )
        assert round(parameters(tower) / 1e6) == vision_millions


def test_paligemma_is_exact():
    # The published preset has no padding of the vocabulary; the checkpoint of transformers has 64 rows.
    assert parameters(architecture("paligemma")) - 64 * 2048 == 2_923_335_408


def test_unknown_baselines_are_refused():
    with pytest.raises(InputError, match="Did you mean 'dinov2_s'"):
        architecture("dinov2_z")


# ---------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (96, 40), (512, 33), (128, 1)])
def test_packed_weights_take_what_bitsandbytes_makes_of_them(inputs, outputs):
    layer = nn.Sequential(nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16))
    predicted = nf4_bytes(layer[0].weight)
    quantise(layer, ["0"], double_quantisation=True)
    assert allocated(tensors_of(layer)) == predicted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind)`: of a tiny random generative model."""

    @functools.cache
    def write(kind: str):
        writer = tiny_mobilevlm if kind.startswith("mobilevlm") else tiny_generative
        return writer(kind, tmp_path_factory.mktemp(kind), NAMES)

    return write


@pytest.mark.parametrize("kind", ["idefics3", "paligemma"])  # free and tied embeddings
def test_weights_are_predicted_to_the_byte(folder, kind):
    plain = load(folder(kind), kind, dtype=torch.float32)
    packed = load(folder(kind), kind, dtype=torch.bfloat16, four_bit=True)
    meta = on_meta(plain.model)
    assert allocated(tensors_of(plain.model)) == weights_bytes(meta, "fp32")
    assert allocated(tensors_of(packed.model)) == weights_bytes(meta, "nf4")
    assert len(packed_layers(meta)) == sum(map(is_packed, packed.model.modules())) > 0

    tokens = packed.used_tokens(QUESTION, NAMES)
    prune_vocabulary(packed, tokens)
    assert allocated(tensors_of(packed.model)) == weights_bytes(meta, "nf4_pruned", len(tokens))


# ---------------------------------------------------------------------------------------------------
# Activations, against real runs


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [("idefics3", 3), ("smolvlm", 1), ("paligemma", 3), ("paligemma2", 3), ("mobilevlm_v2", 3)],
)
def test_generative_peaks_are_those_of_real_runs(folder, kind, batch_size):
    vlm = load(folder(kind), kind, dtype=torch.float32)
    deeper = copy.deepcopy(vlm.model.config)  # than the two blocks that run on fake tensors
    deeper.text_config.num_hidden_layers = 5
    if kind == "smolvlm":
        deeper.text_config.vocab_size = 20_000  # logits are the highest moment; elsewhere a tower or a pass
    if kind == "paligemma2":
        deeper.text_config.layer_types = (["sliding_attention", "full_attention"] * 3)[:5]
    vlm.model = type(vlm.model)(deeper).eval().requires_grad_(False)
    inputs = vlm.inputs(IMAGES[:batch_size], QUESTION)
    trie = Trie(vlm.candidates(QUESTION, NAMES))
    real = peak_of(vlm.model, inputs.values(), lambda: score_trie(vlm, inputs, trie))

    image_id = vlm.model.config.image_token_id
    text_tokens = int((inputs["input_ids"][0] != image_id).sum())
    predicted = generative_estimate(on_meta(vlm.model), "fp32", batch_size, text_tokens, len(trie.inner) - 1)
    beside = real - predicted.weights_bytes
    assert predicted.total_bytes - predicted.weights_bytes == pytest.approx(beside, rel=0.1)


@pytest.mark.parametrize(("kind", "batch_size"), [("clip", 1), ("clip", 512), ("siglip", 1), ("siglip", 32)])
def test_contrastive_peaks_are_those_of_real_runs(tmp_path, kind, batch_size):
    folder = tiny_contrastive(tmp_path, NAMES, kind)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    predicted = contrastive_estimate(copy.deepcopy(model).to("meta"), "fp32", batch_size, classes=10)

    images = torch.rand(batch_size, 3, *model.visual.image_size)
    classifying = peak_of(model.visual, [images], lambda: model.visual(images))
    model.visual = nn.Identity()
    tokens = torch.zeros(PROMPTS_AT_ONCE, model.context_length, dtype=torch.long)
    writing = peak_of(model, [tokens], lambda: model.encode_text(tokens))
    assert predicted.total_bytes == pytest.approx(max(classifying, writing), rel=0.1)


def test_feature_peaks_are_those_of_real_runs(demo_model):
    backbone = demo_model().eval()
    backbone.reset_classifier(0)
    images = torch.rand(16, 3, 32, 32)
    real = peak_of(backbone, [images], lambda: backbone(images))
    assert estimate("demo_vit", "fp32", batch_size=16).total_bytes == pytest.approx(real, rel=0.02)


# ---------------------------------------------------------------------------------------------------
# Choices


def choice(name: str, budget: str | int, **parameters) -> tuple[str, int]:
    experiment = BaselineExperiment(baseline=name, budget=budget, device="cpu", **parameters)
    return form_and_batch(experiment, [f"class {number}" for number in range(100)])[:2]


def test_the_first_form_that_fits_is_chosen():
    assert choice("smolvlm_256m", "2GB", batch_size=1) == ("fp32", 1)
    assert choice("smolvlm_256m", "800MB", batch_size=1) == ("bf16", 1)
    assert choice("paligemma", "2GB", batch_size=1) == ("nf4_pruned", 1)
    with pytest.raises(InputError, match="weights in nf4,"):  # answers need every token
        choice("paligemma", "2GB", protocol="generate")


def test_models_that_do_not_fit_are_refused_with_their_estimate():
    with pytest.raises(InputError, match=r"'smolvlm_256m' needs .* nf4_pruned, above the budget of 47.7 MiB"):
        choice("smolvlm_256m", "50MB")
    with pytest.raises(InputError, match=r"'demo_vit' needs .* MiB .* fp32, above the budget of 1.0 MiB"):
        choice("demo_vit", "1MiB", form="fp32")


@settings(max_examples=20)
@given(st.lists(st.integers(2_100_000, 6_000_000), min_size=2, max_size=5).map(sorted))
def test_more_memory_never_means_a_smaller_batch(budgets):
    batches = [choice("demo_vit", budget, form="fp32", batch_size=36)[1] for budget in budgets]
    assert batches == sorted(batches)
    for budget, batch in zip(budgets, batches):
        assert estimate("demo_vit", "fp32", batch_size=batch).total_bytes <= budget
        larger = {1: 2, 2: 4, 4: 9, 9: 18, 18: 36}.get(batch)
        assert larger is None or estimate("demo_vit", "fp32", batch_size=larger).total_bytes > budget


def test_sizes_count():
    assert estimate("dinov2_s", "bf16", image_size=448).total_bytes > estimate("dinov2_s", "bf16").total_bytes
    few = estimate("smolvlm_256m", "bf16", classes=10)
    assert few.cache_bytes < estimate("smolvlm_256m", "bf16").cache_bytes
    assert few == estimate("smolvlm_256m", "bf16", class_tokens=20)


def test_the_table_has_every_form_and_adds_up():
    table = estimate_table("100MB", ["demo_vit", "smolvlm_256m"])
    assert [*table.form] == ["fp32", "bf16", "fp16", "fp32", "bf16", "fp16", "nf4", "nf4_pruned"]
    np.testing.assert_allclose(table.weights_GB + table.cache_GB + table.activations_GB, table.total_GB)
    assert [*table.fits] == [*(table.total_GB <= 0.1)]
    assert table.fits.nunique() == 2
