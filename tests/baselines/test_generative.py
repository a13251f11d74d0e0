"""Vision-language models behind one interface: loading, prompts, class names as tokens, pruning."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny_models import tiny_generative, tiny_mobilevlm

from toolkit import InputError
from toolkit.baselines.generative import KINDS, load, prune_vocabulary
from toolkit.methods.lean import is_packed

NAMES = ["can", "candle", "maple tree", "cat"]
QUESTION = "What type of object is in this photo?"
_noise = np.random.default_rng(0)
IMAGES = [
    Image.fromarray(_noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((32, 32), (90, 50))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind)`: of a tiny random model."""

    @functools.cache
    def write(kind: str):
        writer = tiny_mobilevlm if kind.startswith("mobilevlm") else tiny_generative
        return writer(kind, tmp_path_factory.mktemp(kind), NAMES)

    return write


@pytest.fixture(scope="module")
def model(folder):
    """`model(kind)`: one that the tests share and do not change."""
    return functools.cache(lambda kind: load(folder(kind), kind, dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------
# Loading


def test_incomplete_weights_are_refused(folder, tmp_path):
    broken = Path(shutil.copytree(folder("smolvlm"), tmp_path / "broken"))
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    del weights["model.connector.modality_projection.proj.weight"]
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack model\.connector\.modality_projection\.proj\.weight"):
        load(broken, "smolvlm", dtype=torch.float32)


def test_a_model_of_other_conventions_is_refused(folder):
    with pytest.raises(InputError, match="does not know '<eos>'"):
        load(folder("smolvlm"), "paligemma", dtype=torch.float32)
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder("paligemma"), "smolvlm", dtype=torch.float32)


def test_without_network_a_repository_is_refused():
    with pytest.raises(InputError, match="Connect to the Hugging Face hub once"):
        load("HuggingFaceTB/absent", "smolvlm", dtype=torch.float32)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def other_sizes(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": ', '"intermediate_size": 1'))


def bad_value(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"scale_factor": ', '"scale_factor": "x", "old": '))


def foreign_code(folder):
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    (folder / "evil.py").write_text("raise SystemExit('ran')")


def no_template(folder):
    for file in folder.glob("*chat_template*"):
        file.unlink()
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    content.pop("chat_template", None)
    config.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [cut, other_sizes, bad_value, foreign_code, no_template])
def test_a_damaged_or_foreign_folder_is_refused(folder, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    shutil.copytree(folder("smolvlm"), tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match="copy"):
        load(tmp_path / "copy", "smolvlm", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_type_asked_for_and_frozen(folder, dtype):
    vlm = load(folder("idefics3"), "idefics3", dtype=dtype)
    assert {parameter.dtype for parameter in vlm.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in vlm.parameters())
    assert not vlm.model.training


def test_four_bits_are_for_all_linear_layers_but_the_last(folder):
    vlm = load(folder("paligemma"), "paligemma", dtype=torch.float32, four_bit=True)
    linear = {name for name, layer in vlm.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert linear - {name for name, m in vlm.named_modules() if is_packed(m)} == {"model.lm_head"}
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight  # still


# ---------------------------------------------------------------------------------------------------
# What goes in and what class names become


@pytest.mark.parametrize(
    ("kind", "beginning", "end"),
    [
        ("idefics3", "<|im_start|>User:<", f">{QUESTION}<end_of_utterance>\nAssistant:"),
        ("smolvlm", "<|im_start|>User:<", f">{QUESTION}<end_of_utterance>\nAssistant:"),
        ("paligemma", "<image><image>", f"<image><bos>answer en {QUESTION}\n"),
        ("paligemma2", "<image><image>", f"<image><bos>answer en {QUESTION}\n"),
    ],
)
def test_the_prompt_is_the_model_s_own(model, kind, beginning, end):
    inputs = model(kind).inputs(IMAGES, QUESTION)
    for row in inputs["input_ids"]:
        text = model(kind).processor.tokenizer.decode(row)
        assert text.startswith(beginning)
        assert text.endswith(end)


@pytest.mark.parametrize("kind", KINDS)
def test_all_images_get_the_same_prefix(model, kind):
    inputs = model(kind).inputs(IMAGES, QUESTION)
    assert {len(value) for value in inputs.values()} == {2}
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    assert inputs["attention_mask"].all()
    assert "labels" not in inputs
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_as_a_whole(model, kind):
    inputs = model(kind).inputs(IMAGES, QUESTION)
    expected = model(kind).model(**inputs).logits
    found = model(kind).logits(model(kind).hidden(inputs).last_hidden_state)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_an_image_is_one_tile(model, kind):
    large = Image.fromarray(_noise.integers(0, 255, (200, 300, 3), dtype=np.uint8))
    assert model(kind).inputs([large], QUESTION)["pixel_values"].shape == (1, 1, 3, 32, 32)
    pixels = torch.tensor(np.asarray(IMAGES[0])).movedim(2, 0) / 127.5 - 1  # not enlarged and shrunk again
    torch.testing.assert_close(model(kind).inputs(IMAGES[:1], QUESTION)["pixel_values"][0, 0], pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_content_is_almost_zero_to_the_model(model, kind):
    """But not quite: an image of zeros is padding to SmolVLM, which it leaves out."""
    pixels = model(kind).null_inputs(QUESTION)["pixel_values"]
    assert 0 < pixels.abs().max() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_the_names_as_they_follow_the_prompt(model, kind):
    vlm = model(kind)
    tokenizer = vlm.processor.tokenizer
    prefix = vlm.inputs(IMAGES[:1], QUESTION)["input_ids"][0].tolist()
    said = tokenizer.decode(prefix)
    for name, ids in zip(NAMES, vlm.candidates(QUESTION, NAMES)):
        assert ids[-1] == vlm.terminator == tokenizer.eos_token_id
        assert vlm.terminator not in ids[:-1]
        space = "" if kind.startswith("paligemma") else " "
        assert tokenizer.decode(prefix + ids[:-1]) == said + space + name


def test_a_name_that_merges_with_the_prompt_is_refused(folder):
    vlm = load(folder("smolvlm"), "smolvlm", dtype=torch.float32)
    vlm.processor.tokenizer.add_tokens([": cat"])
    with pytest.raises(InputError, match="class 'cat' does not follow the prompt as tokens of its own"):
        vlm.candidates(QUESTION, NAMES)


# ---------------------------------------------------------------------------------------------------
# Fewer tokens


@pytest.mark.parametrize(("kind", "tied"), [("idefics3", False), ("paligemma", True)])
def test_pruning_keeps_the_rows_of_the_tokens_used(folder, model, kind, tied):
    vlm, whole = load(folder(kind), kind, dtype=torch.float32), model(kind)
    used = vlm.used_tokens(QUESTION, NAMES)
    prompt = vlm.inputs(IMAGES, QUESTION)["input_ids"]
    assert {*prompt.flatten().tolist(), *(t for ids in vlm.candidates(QUESTION, NAMES) for t in ids)} == {
        *used
    }
    prune_vocabulary(vlm, used)
    embedding, head = vlm.model.get_input_embeddings(), vlm.model.get_output_embeddings()
    assert embedding.weight.shape[0] == head.weight.shape[0] == len(used)
    assert (embedding.weight is head.weight) == tied
    embedded = whole.model.get_input_embeddings()(prompt)
    assert torch.equal(embedding(vlm.rows(prompt)), embedded)
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vlm.logits(hidden), whole.logits(hidden)[:, used])
