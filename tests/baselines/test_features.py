"""Feature extraction: which token, at which size, and a cache that is never wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

from toolkit.backbones import build_backbone
from toolkit.baselines.features import Frozen, cache_key, extractor, features
from toolkit.baselines.probes import fit_probe
from toolkit.datasets import DATASETS, Policy, loader
from toolkit.errors import InputError
from toolkit.measure import Meter
from toolkit.training.evaluation import evaluate

CPU = torch.device("cpu")
TINY = {"embed_dim": 16, "depth": 5, "num_heads": 2}
# The classes of the real models; like those, larger than the requested size.
MODELS = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 70}),
    "dinov3": ("vit_small_patch16_dinov3", TINY | {"img_size": 80}),
    "shallow": ("vit_small_patch14_dinov2", TINY | {"img_size": 28, "depth": 2}),
    "convolutional": ("test_convnext", {}),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict[str, str]:
    """Small models with random weights as folders that timm wrote: `local-dir:` sources by name."""
    sources = {}
    for name, (architecture, sizes) in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=3, **sizes)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)  # initial weights would hide differences
        folder = tmp_path_factory.mktemp(name)
        save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
        sources[name] = f"local-dir:{folder}"
    return sources


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def of_demo(few_digits, folder: Path, split: str = "train", **options):
    demo = options.pop("demo", None) or extractor("demo_vit")
    options = {"batch_size": 32, "policy": few_digits.policy, **options}
    policy = options.pop("policy")
    return features(
        demo,
        getattr(few_digits, split),
        few_digits.hashes[split],
        policy,
        cache_folder=folder,
        **options,
    )


# ---------------------------------------------------------------------------------------------------
# The extractor


def test_demo_features_are_the_input_of_its_classifier():
    demo, model = extractor("demo_vit"), build_backbone("demo_vit", 10).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(demo(images), expected)
    assert demo.data_config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(("name", "size"), [("dinov2", 56), ("dinov3", 64)])
def test_the_normed_class_token_is_the_feature_even_where_timm_would_pool_patches(hub, name, size):
    extract = extractor(hub[name], image_size=size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    last = []
    handle = extract.model.blocks[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output)
    )
    feature = extract(images)
    handle.remove()
    torch.testing.assert_close(feature, extract.model.norm(last[0])[:, 0])
    pools_patches = not torch.allclose(extract.model(images), feature, atol=1e-3)
    assert pools_patches == (name == "dinov3")


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_layers_are_four_class_tokens_and_the_mean_patch(hub, name):
    extract = extractor(hub[name], image_size=112)
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    tokens = []
    for block in extract.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(extract.model.norm(output)))
    layers = extract.layers(images)
    assert layers.shape == (2, 5 * 16)
    for part, block in zip(layers.split(16, dim=1)[:4], tokens[1:5]):  # of five blocks
        torch.testing.assert_close(part, block[:, 0])
    torch.testing.assert_close(layers[:, 64:], tokens[4][:, 5:].mean(1))  # after class token and registers
    torch.testing.assert_close(layers[:, 48:64], extract(images))


def test_position_embeddings_are_resized_as_on_loading(hub, images):
    sizes = MODELS["dinov2"][1] | {"img_size": 56}
    loaded = timm.create_model(hub["dinov2"], pretrained=True, num_classes=0, **sizes).eval()
    extract = extractor(hub["dinov2"], image_size=56)
    torch.testing.assert_close(extract(images), loaded(images))
    assert extract.data_config["input_size"] == (3, 56, 56)


def test_a_model_of_fixed_size_keeps_it_and_returns_pooled_features(hub):
    extract = extractor(hub["convolutional"], image_size=56)
    side = extract.data_config["input_size"][-1]
    assert side == build_side("test_convnext")
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = extract.model.forward_head(extract.model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(extract(images), expected)
    assert extract(images).ndim == 2


def build_side(name: str) -> int:
    return timm.create_model(name).pretrained_cfg["input_size"][-1]


def test_half_precision_weights_give_single_precision_features(hub, images):
    single = extractor(hub["dinov2"], image_size=56)
    half = extractor(hub["dinov2"], dtype=torch.bfloat16, image_size=56)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for got, expected in ((half(images), single(images)), (half.layers(images), single.layers(images))):
        assert got.dtype == torch.float32
        assert 0 < F.mse_loss(got, expected) < 1e-2 * expected.square().mean()


@pytest.mark.parametrize("name", ["convolutional", "shallow"])
def test_layers_that_a_model_lacks_are_refused(hub, name):
    extract = extractor(hub[name], image_size=28)
    with pytest.raises(
        InputError, match=r"reads class tokens of 4 blocks, which 'local-dir:.*another protocol"
    ):
        extract.layers(torch.zeros(1, 3, 28, 28))


def test_sizes_that_do_not_divide_into_patches_are_refused(hub):
    for size in (60, 0):
        with pytest.raises(InputError, match=f"patches of 14 pixels: .* instead of {size}"):
            extractor(hub["dinov2"], image_size=size)


def test_unavailable_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"unknown backbone 'demo_vot'\. Did you mean 'demo_vit'"):
        extractor("demo_vot")
    with pytest.raises(InputError, match=r"local-dir:.*cannot be loaded .*name a folder"):
        extractor(f"local-dir:{tmp_path}")


def test_images_are_taken_whole_or_from_their_centre():
    demo = extractor("demo_vit")
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    image[:, :, :16] = 255  # a margin that the centre does not have
    squeezed, centre = (
        next(iter(loader([(image, 0)], demo.data_config, policy, batch_size=1, workers=0)))[0]
        for policy in (Policy(), Policy(crop_scale=(0.5, 1.0)))
    )
    assert squeezed[..., 0].mean() > 0.9
    torch.testing.assert_close(centre, torch.full_like(centre, -1.0))


# ---------------------------------------------------------------------------------------------------
# The cache


def test_features_are_those_of_the_images_in_order(few_digits, tmp_path):
    found = of_demo(few_digits, tmp_path)
    demo = extractor("demo_vit")
    [(images, labels)] = loader(few_digits.train, demo.data_config, few_digits.policy, batch_size=96)
    torch.testing.assert_close(found.x, demo(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.y, labels)
    assert not found.cached and found.window.seconds > 0
    assert found.peak_bytes > sum(4 * parameter.numel() for parameter in demo.parameters())


def test_a_second_run_reads_the_features_and_reports_the_cost_of_the_first(few_digits, tmp_path):
    first = of_demo(few_digits, tmp_path)
    again = of_demo(few_digits, tmp_path)
    assert again.cached and not first.cached
    assert torch.equal(again.x, first.x) and torch.equal(again.y, first.y)
    assert again.x.dtype == first.x.dtype == torch.float32
    assert again.window.to_dict() == first.window.to_dict()
    assert again.peak_bytes == first.peak_bytes


def test_a_given_meter_measures(few_digits, tmp_path):
    meter = Meter(CPU, gpu=None)
    with meter.window("prepare") as whole:
        found = of_demo(few_digits, tmp_path, meter=meter)
    assert [child.name for child in whole.children] == ["features"]
    assert found.window.to_dict() == whole.children[0].to_dict()


def test_half_precision_features_are_kept_as_such(few_digits, tmp_path):
    demo = extractor("demo_vit", dtype=torch.float16)
    first = of_demo(few_digits, tmp_path, "val", demo=demo)
    again = of_demo(few_digits, tmp_path, "val", demo=demo)
    assert first.x.dtype == again.x.dtype == torch.float16
    assert again.cached and torch.equal(first.x, again.x)


def test_the_key_holds_everything_that_features_depend_on(hub):
    policy = DATASETS["digits"].policy
    options = {"image_size": 56}

    def key(extract=None, split="a", policy=policy, batch_size=8, layers=False) -> str:
        extract = extract or extractor(hub["dinov2"], **options)
        return json.dumps(cache_key(extract, split, policy, batch_size, layers), sort_keys=True)

    assert key() == key()
    other_weights = extractor(hub["dinov2"], **options)
    other_weights.model.norm.bias[0] += 1
    others = [
        key(other_weights),
        key(extractor(hub["dinov2"], image_size=70)),
        key(extractor(hub["dinov2"], **options, dtype=torch.bfloat16)),
        key(extractor(hub["shallow"], **options)),
        key(split="b"),
        key(policy=Policy(crop_scale=(0.5, 1.0))),
        key(batch_size=4),
        key(layers=True),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key(policy=dataclasses.replace(policy, flip=True)) == key()  # is for training alone


@pytest.mark.parametrize("file", ["rows.npy", "meta.json"])
def test_damaged_features_are_computed_again(few_digits, tmp_path, file):
    first = of_demo(few_digits, tmp_path, "val")
    [path] = tmp_path.glob(f"*/{file}")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is made again"):
        again = of_demo(few_digits, tmp_path, "val")
    assert not again.cached
    assert torch.equal(again.x, first.x)
    assert of_demo(few_digits, tmp_path, "val").cached  # mended


# ---------------------------------------------------------------------------------------------------
# Together with probes


@pytest.fixture(scope="module")
def digit_features(digits, tmp_path_factory):
    demo, folder = extractor("demo_vit"), tmp_path_factory.mktemp("cache")

    def of(split: str, layers: bool = False):
        return features(
            demo,
            getattr(digits, split),
            digits.hashes[split],
            digits.policy,
            batch_size=128,
            layers=layers,
            cache_folder=folder,
        )

    return demo, of


# Test accuracies measured: 92.7, 86.0, 95.6, 95.1, 94.7 %, of ten classes.
@pytest.mark.parametrize(
    ("protocol", "least_pct"),
    [("knn", 89), ("centroid", 82), ("ridge", 92), ("lda", 92), ("logreg", 92)],
)
def test_probes_read_digits(digit_features, protocol, least_pct):
    _, of = digit_features
    train, val, test = of("train"), of("val"), of("test")
    probe = fit_probe(protocol, (train.x, train.y), (val.x, val.y), 10)
    scores = probe(test.x)
    assert 100 * (scores.argmax(1) == test.y).double().mean() > least_pct
    assert F.cross_entropy(scores, test.y) < 0.6


@pytest.mark.parametrize("protocol", ["knn", "linear_grid"])
def test_evaluating_images_is_probing_their_features(digit_features, few_digits, tmp_path, protocol):
    demo, _ = digit_features
    train, val, test = (
        of_demo(few_digits, tmp_path, split, demo=demo, layers=protocol == "linear_grid")
        for split in ("train", "val", "test")
    )
    probe = fit_probe(protocol, (train.x, train.y), (val.x, val.y), 10, iterations=30)
    batches = loader(few_digits.test, demo.data_config, few_digits.policy, batch_size=20)
    evaluation = evaluate(Frozen(demo, probe), batches)
    scores = probe(test.x)
    assert evaluation.predictions.tolist() == scores.argmax(1).tolist()
    assert evaluation.loss == pytest.approx(F.cross_entropy(scores, test.y).item(), rel=1e-3)
    assert evaluation.peak_bytes > 0
