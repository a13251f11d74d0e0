"""MobileVLM from files as they are published: names, projectors, tokens, and the whole computation."""

from __future__ import annotations

import functools
import json
import pickle
import shutil

import huggingface_hub
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_mobilevlm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from toolkit.baselines import generative
from toolkit.baselines.mobilevlm import (
    PROJECTORS,
    load_mobilevlm,
)
from toolkit.errors import InputError

KINDS = ("mobilevlm", "mobilevlm_v2")
TEXTS = ["maple tree", "can", "candle", "What type of object is in this photo?"]
QUESTION = TEXTS[-1]
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.multi_modal_projector."
prompt = generative.KINDS["mobilevlm"].prompt.format


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_mobilevlm(kind, tmp_path_factory.mktemp(kind), TEXTS) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: load_mobilevlm(folder, dtype=torch.float32) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the V2 folder, to be damaged."""
    return shutil.copytree(folders["mobilevlm_v2"], tmp_path / "copy")


def published(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return json.loads((folder / "config.json").read_text()), weights


def pictures(count: int = 3) -> list[Image.Image]:
    """Noise, each of another shape."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(20 + 9 * i, 30, 3) for i in range(count)]
    return [Image.fromarray(torch.randint(256, s, generator=generator).byte().numpy()) for s in sizes]


def batch(processor, count: int = 3):
    return processor(images=pictures(count), text=[prompt(QUESTION)] * count)


@torch.inference_mode()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


# The files and names


# The computation


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())


def convolution(weights, name, x, **options):
    bias = weights.get(f"{name}.bias")
    return F.conv2d(x, weights[f"{name}.weight"].float(), None if bias is None else bias.float(), **options)


def channel_norm(weights, name, x):
    scale, shift = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
    return F.layer_norm(x.movedim(1, -1), scale.shape, scale, shift, 1e-5).movedim(-1, 1)


def ldp(weights, patches):
    x = linear(weights, "model.mlp.3", F.gelu(linear(weights, "model.mlp.1", patches)))
    x = x.transpose(1, 2).reshape(len(x), -1, 24, 24)
    for index, stride in ((1, 1), (2, 2)):
        block = f"model.mb_block.{index}.block"
        y = convolution(weights, f"{block}.0.0", x, stride=stride, padding=1, groups=x.shape[1])
        y = F.hardswish(channel_norm(weights, f"{block}.0.1", y))
        squeezed = F.relu(convolution(weights, f"{block}.1.fc1", y.mean((2, 3), keepdim=True)))
        y = y * F.hardsigmoid(convolution(weights, f"{block}.1.fc2", squeezed))
        y = channel_norm(weights, f"{block}.2.1", convolution(weights, f"{block}.2.0", y))
        x = x + y if stride == 1 else y
    return x.flatten(2).transpose(1, 2)


def ldpv2(weights, patches):
    x = linear(weights, "mlp.mlp.2", F.gelu(linear(weights, "mlp.mlp.0", patches)))
    x = F.avg_pool2d(x.transpose(1, 2).reshape(len(x), -1, 24, 24), 2)
    x = x + convolution(weights, "peg.peg.0", x, padding=1, groups=x.shape[1])
    return x.flatten(2).transpose(1, 2)


def projected(kind, weights, patches):
    own = {name.removeprefix("model.mm_projector."): value for name, value in weights.items()}
    return (ldp if kind == "mobilevlm" else ldpv2)(own, patches)


def test_projector_by_hand(kind, folders, loaded):
    _, weights = published(folders[kind])
    patches = torch.randn(2, 576, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = loaded[kind][0].model.multi_modal_projector(patches)
    assert tokens.shape == (2, 144, 32)
    torch.testing.assert_close(tokens, projected(kind, weights, patches), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_projector_changes_the_width(projector):
    assert PROJECTORS[projector](16, 64)(torch.zeros(1, 576, 16)).shape == (1, 144, 64)


@torch.inference_mode()
def test_whole_model_is_tower_projector_and_language_model(kind, folders, loaded):
    """From the published weights and transformers' parts, with embeddings put together here."""
    model, processor = loaded[kind]
    config, weights = published(folders[kind])
    tower = CLIPVisionModel(CLIPVisionConfig(**config["vision_config"])).eval()
    if kind == "mobilevlm":
        tower = CLIPVisionModel.from_pretrained(config["mm_vision_tower"])
    else:
        tower.load_state_dict({n.removeprefix(TOWER): w for n, w in weights.items() if n.startswith(TOWER)})
    keys = LlamaConfig().to_dict().keys() & config.keys() - {"architectures", "model_type"}
    language = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keys})).eval()
    language.load_state_dict({name: weights[name] for name in language.state_dict()})
    inputs = batch(processor, 1)
    patches = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    before, after = prompt(QUESTION).split("<image>")
    before, after = (
        torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (before, after)
    )
    words = language.get_input_embeddings()
    embeddings = [words(torch.tensor([1])), words(before), projected(kind, weights, patches)[0], words(after)]
    expected = language(inputs_embeds=torch.cat(embeddings)[None]).logits
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_answers_depend_on_the_image_and_not_on_the_batch(kind, loaded):
    model, processor = loaded[kind]
    together = logits(model, batch(processor))
    assert (together[0, -1] - together[1, -1]).abs().max() > 0.01
    for image, expected in zip(pictures(), together):
        alone = logits(model, processor(images=[image], text=[prompt(QUESTION)]))
        torch.testing.assert_close(alone[0], expected, rtol=1e-4, atol=1e-4)


def test_generates_greedily(kind, loaded):
    model, processor = loaded[kind]
    inputs = batch(processor)
    answers = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    new = answers[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (3, 3)
    del inputs["attention_mask"]  # then transformers guesses it, and placeholders are no padding
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False), answers)
    longer = inputs | {
        "input_ids": answers[:, :-1],
        "attention_mask": torch.ones_like(answers[:, :-1]),
    }
    predicted = logits(model, longer)[:, -3:].clone()
    predicted[..., processor.tokenizer.eos_token_id] = -torch.inf  # as three tokens are asked for
    assert torch.equal(predicted.argmax(-1), new)


@torch.inference_mode()
def test_tokens_after_the_image_need_no_image(loaded):
    """A pass over a cached prefix with a 4-D mask, in which two tokens do not see one another."""
    model, processor = loaded["mobilevlm_v2"]
    inputs = batch(processor, 1)
    length = inputs["input_ids"].shape[1]
    prefix = model(**inputs, use_cache=True, logits_to_keep=1)
    assert prefix.logits.shape[1] == 1
    mask = torch.zeros(1, 1, 2, length + 2)
    mask[0, 0, [0, 1], [length + 1, length]] = torch.finfo(torch.float32).min
    pair = torch.tensor([[40, 50]])
    positions = torch.tensor([[length, length]])
    siblings = model(
        input_ids=pair,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=prefix.past_key_values,
    ).logits
    for index in (0, 1):
        ids = torch.cat([inputs["input_ids"], pair[:, index : index + 1]], dim=1)
        whole = model(input_ids=ids, pixel_values=inputs["pixel_values"], logits_to_keep=1).logits
        torch.testing.assert_close(siblings[:, index : index + 1], whole, rtol=1e-4, atol=1e-4)


# Loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_another_type(kind, folders, loaded, dtype):
    model, processor = load_mobilevlm(folders[kind], dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert not model.training
    expected = logits(loaded[kind][0], batch(processor))[:, -1]
    found = logits(model, batch(processor))[:, -1]
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_first_version_takes_the_tower_of_its_checkpoint_if_there_is_one(folders, loaded, tmp_path):
    model, processor = loaded["mobilevlm"]
    folder = shutil.copytree(folders["mobilevlm"], tmp_path / "copy")
    config, weights = published(folder)
    tower = model.model.vision_tower.state_dict()
    torch.save(weights | {TOWER + name: value for name, value in tower.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "nobody/nothing"}))
    again, _ = load_mobilevlm(folder, dtype=torch.float32)
    assert torch.equal(logits(again, batch(processor)), logits(model, batch(processor)))
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"vision tower nobody/nothing cannot be loaded .* Connect"):
        load_mobilevlm(folder, dtype=torch.float32)


def test_shards(copy, loaded):
    model, processor = loaded["mobilevlm_v2"]
    _, weights = published(copy)
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({name: weights[name] for name in part}, copy / f"pytorch_model-{number}.bin")
    (copy / "pytorch_model.bin").unlink()
    again, _ = load_mobilevlm(copy, dtype=torch.float32)
    assert torch.equal(logits(again, batch(processor)), logits(model, batch(processor)))
    (copy / "pytorch_model-1.bin").unlink()
    with pytest.raises(InputError, match=r"not those of its config\.json: missing keys such as"):
        load_mobilevlm(copy, dtype=torch.float32)


# Images and prompts


@functools.cache
def sentence_piece(folder) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_prompt():
    assert prompt("What is it?") == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is it?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )


def test_text_around_the_image_is_tokenised_apart(folders, loaded):
    _, processor = loaded["mobilevlm_v2"]
    before, after = sentence_piece(folders["mobilevlm_v2"]).encode(prompt(QUESTION).split("<image>"))
    inputs = batch(processor, 2)
    assert inputs["input_ids"].tolist() == [[1, *before, *[0] * 144, *after]] * 2
    assert inputs["attention_mask"].all()
    assert 0 not in before + after


@settings(max_examples=30)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="<> ▁", exclude_categories=["Cc"]), min_size=1)
)
def test_tokeniser_is_sentencepiece(folders, loaded, text):
    found = loaded["mobilevlm"][1].tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found == sentence_piece(folders["mobilevlm"]).encode(text)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (30, 30)])
def test_images_are_padded_with_the_mean_colour(loaded, size):
    _, processor = loaded["mobilevlm_v2"]
    inputs = processor(images=[Image.new("L", size, 255)], text=[prompt(QUESTION)])
    pixels = inputs["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48) and pixels.dtype == torch.float32
    white = ((pixels[0] - pixels[0, :, 24:25, 24:25]).abs() < 1e-4).all(0)
    bars = (pixels[0].abs() < 0.02).all(0)  # zero up to the rounding of the colour
    if size[0] == size[1]:
        assert white.all()
    else:  # a quarter on either side
        rows = (lambda mask: mask) if size[0] > size[1] else (lambda mask: mask.T)
        assert rows(bars)[:10].all() and rows(bars)[-10:].all()
        assert rows(white)[14:-14].all()


# What can go wrong


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(
        InputError, match="missing keys" if name.endswith("bin") else f"cannot be loaded .*{name}"
    ):
        generative.load(copy, "mobilevlm_v2", dtype=torch.float32)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_damaged_file(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    with pytest.raises(InputError, match="copy cannot be loaded"):
        generative.load(copy, "mobilevlm_v2", dtype=torch.float32)


def test_code_in_a_pickle_is_not_run(copy, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"lm_head.weight": Code()}, copy / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_mobilevlm(copy, dtype=torch.float32)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "cannot be loaded .*mlp2x_gelu"),
        ({"mm_projector_type": "ldpnet"}, "missing keys such as model.multi_modal_projector"),
        ({"hidden_size": 64}, "cannot be loaded"),
    ],
)
def test_configuration_of_another_model(copy, change, message):
    config, _ = published(copy)
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        generative.load(copy, "mobilevlm_v2", dtype=torch.float32)


def test_repository_is_opened_where_the_hub_put_it(monkeypatch, folders, loaded):
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return str(folders["mobilevlm_v2"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, processor = load_mobilevlm("mtgv/MobileVLM_V2-1.7B", dtype=torch.float32, revision="abc")
    assert asked == [("mtgv/MobileVLM_V2-1.7B", "abc")]
    assert torch.equal(logits(model, batch(processor)), logits(loaded["mobilevlm_v2"][0], batch(processor)))
