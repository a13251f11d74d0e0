"""Zero-shot classification through open_clip, on small random models in open_clip's own folders."""

from __future__ import annotations

import json
import shutil
import weakref

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import tiny_contrastive
from torch.utils.data import DataLoader

import toolkit
from toolkit.baselines.contrastive import ZeroShot, load, zero_shot
from toolkit.baselines.prompts import templates
from toolkit.baselines.registry import BASELINES
from toolkit.errors import InputError

CPU = torch.device("cpu")
NAMES = ["apple", "aquarium fish", "can", "candle", "polka-dotted"]
TEMPLATES = templates("dtd")[:3]


def build(source: str, names=NAMES, prompts=TEMPLATES, dtype=torch.float32) -> ZeroShot:
    return zero_shot(load(source, dtype=dtype), names, prompts, device=CPU)[0]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def source(request, tmp_path_factory) -> str:
    folder = tiny_contrastive(tmp_path_factory.mktemp(request.param), NAMES + TEMPLATES, request.param)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return f"local-dir:{tiny_contrastive(tmp_path_factory.mktemp('clip'), NAMES)}"


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    """For tests that do not depend on the kind: its tokenizer is built much faster than CLIP's."""
    folder = tmp_path_factory.mktemp("siglip")
    return f"local-dir:{tiny_contrastive(folder, [*NAMES, *TEMPLATES, 'number'], 'siglip')}"


@pytest.fixture(scope="module")
def model(source) -> ZeroShot:
    """Shared: tests must not modify it."""
    return build(source)


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(count)]


def prepared(model: ZeroShot, count: int = 3) -> torch.Tensor:
    return torch.stack([model.preprocess(picture) for picture in pictures(count)])


def test_classifier_equals_open_clips_one_class_at_a_time(model, source):
    tokenizer = open_clip.get_tokenizer(source)
    reference, _ = open_clip.create_model_from_pretrained(source)
    with torch.no_grad():
        for column, name in enumerate(NAMES):
            prompts = [
                F.normalize(reference.encode_text(tokenizer(t.format(name)))[0], dim=0) for t in TEMPLATES
            ]
            expected = F.normalize(sum(prompts) / len(prompts), dim=0)
            torch.testing.assert_close(model.classifier[:, column], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.classifier.norm(dim=0), torch.ones(len(NAMES)))


def test_scores_are_open_clips_for_one_prompt(source):
    model, tokenizer = build(source, prompts=TEMPLATES[:1]), open_clip.get_tokenizer(source)
    reference, preprocess = open_clip.create_model_from_pretrained(source)
    images = torch.stack([preprocess(picture) for picture in pictures(3)])
    with torch.no_grad():
        expected, _ = reference.eval().get_logits(images, tokenizer([TEMPLATES[0].format(n) for n in NAMES]))
        scores = model(images)
    assert scores.shape == (3, len(NAMES)) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert scores.std(dim=1).min() > 0.1  # the classes are not all alike, or nothing here would tell


def test_more_prompts_than_are_encoded_at_once(siglip):
    names = [f"number {i}" for i in range(70)]
    together, alone = build(siglip, names, TEMPLATES[:1]), build(siglip, names[-1:], TEMPLATES[:1])
    torch.testing.assert_close(together.classifier[:, -1:], alone.classifier, rtol=0, atol=1e-6)


def test_only_the_image_tower_is_left(model, source):
    reference, _ = open_clip.create_model_from_pretrained(source)
    expected = {f"visual.{name}": p.shape for name, p in reference.visual.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == expected
    assert {name for name, _ in model.named_buffers() if not name.startswith("visual.")} == {
        "classifier", "scale", "bias"
    }  # fmt: skip
    assert not any(isinstance(part, open_clip.CLIP | open_clip.CustomTextCLIP) for part in model.modules())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_preprocessing_is_open_clips(model, source):
    _, preprocess = open_clip.create_model_from_pretrained(source)
    for picture in pictures(2):  # wider than high: a crop and a squeeze differ
        assert torch.equal(model.preprocess(picture), preprocess(picture))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision_weights_and_float32_scores(model, source, dtype, tolerance):
    half = build(source, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert half.classifier.dtype == half.scale.dtype == torch.float32
    assert torch.equal(half.scale, model.scale) and torch.equal(half.bias, model.bias)
    images = prepared(model)
    with torch.no_grad():
        cosines = [(either(images) - model.bias) / model.scale for either in (model, half)]
    assert cosines[1].dtype == torch.float32
    torch.testing.assert_close(cosines[1], cosines[0], rtol=0, atol=tolerance)


def test_the_text_tower_is_counted_and_freed_before_the_images_come(clip):
    both = load(clip, dtype=torch.float32)
    text = [p.nbytes for name, p in both.model.named_parameters() if not name.startswith("visual.")]
    tower = weakref.ref(both.model)
    _, window, peak_bytes = zero_shot(both, NAMES, TEMPLATES, device=CPU)
    assert tower() is None
    assert peak_bytes > sum(text) and window.seconds > 0


def test_evaluate_runs_on_it(model):
    images, labels = prepared(model, 5), [0, 1, 2, 3, 4]
    evaluation = toolkit.evaluate(model, DataLoader(list(zip(images, labels)), batch_size=2))
    with torch.no_grad():
        scores = model(images)
    assert torch.equal(evaluation.predictions, scores.argmax(1))
    assert evaluation.loss == pytest.approx(F.cross_entropy(scores, torch.tensor(labels)).item(), rel=1e-4)
    weights = sum(p.numel() for p in model.visual.parameters())
    assert evaluation.macs_per_image > weights and evaluation.peak_bytes > 4 * weights


def test_siglip_writes_prompts_as_it_was_trained(siglip):
    """Its tokenizer drops case, punctuation and underscores, so that nothing here has to."""
    tokenizer = load(siglip, dtype=torch.float32).tokenizer
    first, second = tokenizer(["A photo, of a Polka_dotted!", "a photo of a polka dotted"])
    assert torch.equal(first, second)
    assert first[-1] == tokenizer.tokenizer.eos_token_id  # which SigLIP pads with
    for baseline in BASELINES.values():
        if "SigLIP" in baseline.source:
            config = open_clip.get_model_config(baseline.source.partition(":")[0])
            assert config["text_cfg"]["tokenizer_kwargs"] == {"clean": "canonicalize"}


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("name", ["clip_b32", "siglip_b16"])  # one lacks weights, the other a tokenizer too
def test_without_a_network_the_error_names_the_remedy(name):
    with pytest.raises(InputError, match="Connect to the Hugging Face hub once"):
        load(BASELINES[name].source, dtype=torch.float32)


def test_the_sources_of_all_baselines_have_weights_of_the_same_activation():
    """open_clip lists weights that were trained with OpenAI's approximate GELU under the plain architecture
    too, loads them there, and only warns."""
    for baseline in BASELINES.values():
        if baseline.family == "contrastive":
            architecture, _, tag = baseline.source.partition(":")
            weights = open_clip.get_pretrained_cfg(architecture, tag)
            config = open_clip.get_model_config(architecture)
            assert weights and weights.get("quick_gelu", False) == config.get("quick_gelu", False)


def remove_weights(folder):
    (folder / "open_clip_model.safetensors").unlink()


def cut_weights(folder):
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def break_config(folder):
    (folder / "open_clip_config.json").write_text("{")


def widen(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("harm", [remove_weights, cut_weights, break_config, widen, remove_tokenizer])
def test_a_folder_that_is_not_whole_is_refused(siglip, tmp_path, harm):
    folder = shutil.copytree(siglip.removeprefix("local-dir:"), tmp_path / "harmed")
    harm(folder)
    with pytest.raises(InputError, match=r"harmed cannot be loaded .* name a folder that holds all of them"):
        load(f"local-dir:{folder}", dtype=torch.float32)


def test_classes_that_the_tokenizer_cannot_tell_apart_are_refused(clip, siglip):
    with pytest.raises(InputError, match="'can' and 'can!' read alike to"):
        build(siglip, ["apple", "can", "can!"])
    build(clip, ["apple", "can", "can!"])
    long = "very " * 80
    with pytest.raises(InputError, match="fish' read alike to"):
        build(clip, [long + "apple", long + "fish"])
