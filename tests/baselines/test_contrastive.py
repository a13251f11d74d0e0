"""Zero-shot classification through open_clip, on small random models in open_clip's own folders."""

from __future__ import annotations

import copy
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
from toolkit.baselines import contrastive
from toolkit.baselines.contrastive import ZeroShot, load, zero_shot
from toolkit.baselines.prompts import templates
from toolkit.baselines.registry import BASELINES
from toolkit.errors import InputError
from toolkit.files import sha256_of

CPU = torch.device("cpu")
NAMES = ["apple", "aquarium fish", "can", "candle", "polka-dotted"]
TEMPLATES = templates("dtd")[:3]


def made(source: str, cache, names=NAMES, prompts=TEMPLATES, dtype=torch.float32) -> ZeroShot:
    both = contrastive.load(source, dtype=dtype)
    return zero_shot(both, names, prompts, device=CPU, cache_folder=cache)[0]


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
def model(source, tmp_path_factory) -> ZeroShot:
    """Shared: tests must not modify it."""
    cache = tmp_path_factory.mktemp("cache")
    return made(source, cache)


@pytest.fixture
def build(tmp_path):
    def build(source: str, names=NAMES, prompts=TEMPLATES, dtype=torch.float32) -> ZeroShot:
        return made(source, tmp_path / "cache", names, prompts, dtype)

    return build


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(count)]


def prepared(model: ZeroShot, count: int = 3) -> torch.Tensor:
    return torch.stack([model.preprocess(picture) for picture in pictures(count)])


def forbid_texts(monkeypatch) -> None:
    def encode_text(*arguments):
        raise AssertionError("the text tower ran")

    monkeypatch.setattr(open_clip.CLIP, "encode_text", encode_text)
    monkeypatch.setattr(open_clip.CustomTextCLIP, "encode_text", encode_text)


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


def test_scores_are_open_clips_for_one_prompt(build, source):
    model, tokenizer = build(source, prompts=TEMPLATES[:1]), open_clip.get_tokenizer(source)
    reference, preprocess = open_clip.create_model_from_pretrained(source)
    images = torch.stack([preprocess(picture) for picture in pictures(3)])
    with torch.no_grad():
        expected, _ = reference.eval().get_logits(images, tokenizer([TEMPLATES[0].format(n) for n in NAMES]))
        scores = model(images)
    assert scores.shape == (3, len(NAMES)) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert scores.std(dim=1).min() > 0.1  # the classes are not all alike, or nothing here would tell


def test_classes_and_templates_may_come_in_any_order(model, build, source):
    order = [3, 0, 4, 1, 2]
    permuted = build(source, [NAMES[i] for i in order], TEMPLATES[::-1])
    torch.testing.assert_close(permuted.classifier, model.classifier[:, order], rtol=0, atol=1e-6)


def test_more_prompts_than_are_encoded_at_once(build, siglip):
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


def test_scale_and_bias_do_not_change_the_order(model):
    model = copy.deepcopy(model)
    images = prepared(model)
    with torch.no_grad():
        before = model(images)
        model.scale.mul_(0.3)
        model.bias.add_(5)
        after = model(images)
    assert torch.equal(before.argsort(1), after.argsort(1)) and not torch.allclose(before, after)


def test_a_batch_is_its_images(model):
    images = prepared(model)
    with torch.no_grad():
        singles = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), singles, rtol=1e-5, atol=1e-5)


def test_preprocessing_is_open_clips(model, source):
    _, preprocess = open_clip.create_model_from_pretrained(source)
    for picture in pictures(2):  # wider than high: a crop and a squeeze differ
        assert torch.equal(model.preprocess(picture), preprocess(picture))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision_weights_and_float32_scores(model, build, source, dtype, tolerance):
    half = build(source, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert half.classifier.dtype == half.scale.dtype == torch.float32
    assert torch.equal(half.scale, model.scale) and torch.equal(half.bias, model.bias)
    images = prepared(model)
    with torch.no_grad():
        cosines = [(either(images) - model.bias) / model.scale for either in (model, half)]
    assert cosines[1].dtype == torch.float32
    torch.testing.assert_close(cosines[1], cosines[0], rtol=0, atol=tolerance)


def test_a_classifier_is_cached(build, siglip, monkeypatch):
    model = build(siglip)
    forbid_texts(monkeypatch)
    again = build(siglip)
    images = prepared(model)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


@pytest.mark.parametrize(
    "changed",
    [
        {"names": [*NAMES[:-1], "zebra"]},
        {"names": NAMES[::-1]},
        {"prompts": TEMPLATES[:2]},
        {"dtype": torch.bfloat16},
    ],
)
def test_other_prompts_or_precision_are_another_classifier(build, siglip, monkeypatch, changed):
    build(siglip)
    forbid_texts(monkeypatch)
    with pytest.raises(AssertionError, match="the text tower ran"):
        build(siglip, **changed)


def test_other_weights_are_another_classifier(build, tmp_path):
    source = f"local-dir:{tmp_path / 'model'}"
    tiny_contrastive(tmp_path / "model", NAMES, "siglip", seed=0)
    first = build(source)
    tiny_contrastive(tmp_path / "model", NAMES, "siglip", seed=1)
    assert not torch.allclose(first.classifier, build(source).classifier, atol=0.1)


def test_a_damaged_classifier_is_made_again(build, siglip, tmp_path):
    classifier = build(siglip).classifier
    (file,) = (tmp_path / "cache").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-7] + b"1234567")
    with pytest.warns(UserWarning, match="is made again"):
        assert torch.equal(build(siglip).classifier, classifier)
    assert torch.equal(build(siglip).classifier, classifier)


def test_a_cached_classifier_reports_its_cost(clip, tmp_path):
    """Time and memory of the text tower, even if it did not run; it is freed before the images come."""
    costs = []
    for remembered in (False, True):
        both = load(clip, dtype=torch.float32)
        text = [p.nbytes for name, p in both.model.named_parameters() if not name.startswith("visual.")]
        tower = weakref.ref(both.model)
        _, cost = zero_shot(both, NAMES, TEMPLATES, device=CPU, cache_folder=tmp_path)
        assert tower() is None
        assert cost.cached == remembered and cost.peak_bytes > sum(text) and cost.window.seconds > 0
        costs.append((cost.peak_bytes, cost.window.seconds))
    assert costs[0] == costs[1]


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


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tiny_models_are_repeatable(tmp_path, kind):
    state = torch.random.get_rng_state()
    folders = [
        tiny_contrastive(tmp_path / f"{run}", NAMES, kind, seed=seed) for run, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    contents = [{file.name: sha256_of(file) for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert {name for name, digest in contents[2].items() if digest != contents[0][name]} == {
        "open_clip_model.safetensors"
    }


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-32:openai", "write ViT-B-32-quickgelu:openai"),
        ("ViT-B-16:dfn2b", "write ViT-B-16-quickgelu:dfn2b"),
        ("ViT-B-32-quickgelu:laion2b_s34b_b79k", "write ViT-B-32:laion2b_s34b_b79k"),
        ("ViT-B-33:openai", "unknown contrastive architecture 'ViT-B-33'. Did you mean 'ViT-B-32'"),
        ("coca_ViT-B-32:laion2b_s13b_b90k", "unknown contrastive architecture"),
        ("ViT-B-32:laion2b_s34b_b78k", "Did you mean 'laion2b_s34b_b79k'"),
        ("ViT-B-32", "names no weights"),
        ("local-dir:/nowhere", "/nowhere holds no open_clip_config.json"),
    ],
)
def test_a_wrong_source_is_refused_before_any_download(source, message, monkeypatch):
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *arguments: pytest.fail("went on"))
    with pytest.raises(InputError, match=message):
        load(source, dtype=torch.float32)


@pytest.mark.parametrize("name", ["clip_b32", "siglip_b16"])  # one lacks weights, the other a tokenizer too
def test_without_a_network_the_error_names_the_remedy(name):
    with pytest.raises(InputError, match="Connect to the Hugging Face hub once"):
        load(BASELINES[name].source, dtype=torch.float32)


def test_the_sources_of_all_baselines_are_accepted(monkeypatch):
    def tokenizer(architecture):
        raise OSError("went on")

    monkeypatch.setattr(open_clip, "get_tokenizer", tokenizer)
    sources = [baseline.source for baseline in BASELINES.values() if baseline.family == "contrastive"]
    for source in sources:
        with pytest.raises(InputError, match="went on"):
            load(source, dtype=torch.float32)


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
    with pytest.raises(InputError, match=r"harmed cannot be loaded .* The folder must be whole"):
        load(f"local-dir:{folder}", dtype=torch.float32)


def test_classes_that_the_tokenizer_cannot_tell_apart_are_refused(build, clip, siglip):
    with pytest.raises(InputError, match="'can' and 'can!' read alike to"):
        build(siglip, ["apple", "can", "can!"])
    build(clip, ["apple", "can", "can!"])
    long = "very " * 80
    with pytest.raises(InputError, match="fish' read alike to"):
        build(clip, [long + "apple", long + "fish"])


def test_names_and_templates_are_checked(build, siglip):
    with pytest.raises(InputError, match="no class names"):
        build(siglip, [])
    with pytest.raises(InputError, match="has no"):
        build(siglip, NAMES, ["a photo"])


def test_an_unknown_kind_of_tiny_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'siglip'"):
        tiny_contrastive(tmp_path, NAMES, "siglip2")
