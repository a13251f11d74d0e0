"""Vision Mamba against the published checkpoint's table of keys and against its formulas, written plainly.

Another implementation of the reference would share our mistakes only by chance: loops over time, explicit
flips and the official pair (hidden, residual), in float64.
"""

import argparse
import dataclasses
import hashlib
import os
import re

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

import toolkit
from toolkit.backbones import vim
from toolkit.budget import find_blocks
from toolkit.errors import InputError

pytestmark = pytest.mark.numerical

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "d_state": 4}


def published_shapes(D, E, R, N, tokens, patch, depth, classes):
    """Names and shapes of the official state dict: channels, inner channels, rank, states, sizes."""
    shapes = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, tokens, D),
        "patch_embed.proj.weight": (D, 3, patch, patch),
        "patch_embed.proj.bias": (D,),
        "norm_f.weight": (D,),
        "head.weight": (classes, D),
        "head.bias": (classes,),
    }
    for i in range(depth):
        shapes[f"layers.{i}.norm.weight"] = (D,)
        mixer = {"in_proj.weight": (2 * E, D), "out_proj.weight": (D, E)}
        mixer |= {"A_log": (E, N), "A_b_log": (E, N), "D": (E,), "D_b": (E,)}
        for b in ("", "_b"):
            mixer |= {f"conv1d{b}.weight": (E, 1, 4), f"conv1d{b}.bias": (E,)}
            mixer |= {f"x_proj{b}.weight": (R + 2 * N, E)}
            mixer |= {f"dt_proj{b}.weight": (E, R), f"dt_proj{b}.bias": (E,)}
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    return shapes


FULL_SHAPES = published_shapes(D=384, E=768, R=24, N=16, tokens=197, patch=16, depth=24, classes=1000)
SMALL_SHAPES = published_shapes(D=32, E=64, R=2, N=4, tokens=17, patch=8, depth=3, classes=1000)


def synthetic_weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SMALL_SHAPES.items()}


def save(weights, path):
    """Save as the training script does: weights next to arguments and optimizer state."""
    torch.save({"model": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3, "optimizer": {}}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model():
    """A small instance all of whose parameters differ from their initial values."""
    torch.manual_seed(0)
    model = vim.vim_small(5, **SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return toolkit.build_backbone("vim_small", 1000, pretrained=False)


def test_vim_small_has_the_published_keys_shapes_and_parameters(full_size):
    state = full_size.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == FULL_SHAPES
    assert sum(p.numel() for p in full_size.parameters()) == 25_796_584
    assert len(state) == len(list(full_size.parameters())) == 415


def test_initial_steps_and_decays_are_those_of_the_paper():
    torch.manual_seed(0)
    mixer = vim.BidirectionalMamba(64, 16)
    steps = F.softplus(mixer.dt_proj_b.bias)
    assert 0.9e-3 < steps.min() < 2e-3 and 5e-2 < steps.max() < 1.1e-1
    assert torch.allclose(steps.log().mean(), torch.tensor(0.01).log(), atol=0.4)
    assert torch.allclose(mixer.A_b_log.exp()[3], torch.arange(1.0, 17))


# The reference.


def reference_scan(x, z, p, b):
    """One direction on (batch, L, E), in the order in which it reads."""
    w = p[f"conv1d{b}.weight"][:, 0]  # (E, 4)
    batch, length, channels = x.shape
    history = [torch.zeros(batch, channels, dtype=x.dtype)] * 3 + list(x.unbind(1))
    A = -torch.exp(p["A_b_log" if b else "A_log"])
    states = A.shape[1]
    h = torch.zeros(batch, channels, states, dtype=x.dtype)
    outputs = []
    for t in range(length):
        u = sum(w[:, k] * history[t + k] for k in range(4)) + p[f"conv1d{b}.bias"]
        u = u * torch.sigmoid(u)
        projected = u @ p[f"x_proj{b}.weight"].T
        B, C = projected[:, -2 * states : -states], projected[:, -states:]
        dt = projected[:, : -2 * states] @ p[f"dt_proj{b}.weight"].T + p[f"dt_proj{b}.bias"]
        dt = torch.log1p(torch.exp(dt))
        h = torch.exp(dt[:, :, None] * A) * h + (dt * u)[:, :, None] * B[:, None, :]
        y = (h * C[:, None, :]).sum(2) + p[f"D{b}"] * u
        outputs.append(y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(outputs, 1)


def reference_norm(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def reference_mixer(x, p):
    xz = x @ p["in_proj.weight"].T
    x, z = xz[..., : xz.shape[-1] // 2], xz[..., xz.shape[-1] // 2 :]
    onward = reference_scan(x, z, p, "")
    back = reference_scan(x.flip(1), z.flip(1), p, "_b").flip(1)
    return (onward + back) / 2 @ p["out_proj.weight"].T


def reference_logits(state, images, patch):
    p = {name: value.double() for name, value in state.items()}
    tokens = []
    for row in range(0, images.shape[2], patch):
        for column in range(0, images.shape[3], patch):
            tile = images[:, :, row : row + patch, column : column + patch].double().flatten(1)
            tokens.append(tile @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"])
    middle = len(tokens) // 2
    tokens.insert(middle, p["cls_token"][0].expand(len(images), -1))
    hidden, residual = torch.stack(tokens, 1) + p["pos_embed"], 0
    for i in range(sum(re.fullmatch(r"layers\.\d+\.norm\.weight", name) is not None for name in p)):
        prefix = f"layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): value for name, value in layer.items()}
        residual = residual + hidden
        hidden = reference_mixer(reference_norm(residual, layer["norm.weight"]), mixer)
    normed = reference_norm(residual + hidden, p["norm_f.weight"])
    return normed[:, middle] @ p["head.weight"].T + p["head.bias"]


def test_mixer_matches_the_formulas(model):
    x = torch.randn(2, 17, 32)
    mixer = model.layers[1].mixer
    expected = reference_mixer(x.double(), {k: v.double() for k, v in mixer.state_dict().items()})
    torch.testing.assert_close(mixer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_model_matches_the_formulas(model, images):
    expected = reference_logits(model.state_dict(), images, patch=8)
    torch.testing.assert_close(model(images).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-10, atol=1e-10)


def test_class_token_is_in_the_middle(model, images):
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    tokens = seen[0] - model.pos_embed
    patches = model.patch_embed(images)
    torch.testing.assert_close(tokens[:, 8], model.cls_token[0].expand(2, -1))
    torch.testing.assert_close(tokens[:, :8], patches[:, :8])
    torch.testing.assert_close(tokens[:, 9:], patches[:, 8:])


@pytest.mark.parametrize("changed, far", [(16, slice(0, 12)), (0, slice(5, 17))])
def test_mixer_reads_in_both_directions(model, changed, far):
    """Tokens beyond the convolution's width see the change, so it came through the states."""
    x = torch.randn(1, 17, 32)
    other = x.clone()
    other[:, changed] += 1
    mixer = model.layers[0].mixer
    difference = (mixer(x) - mixer(other))[:, far].abs().amax(dim=2)
    assert (difference > 1e-6).all()


def test_exchanged_directions_read_the_flipped_sequence(model):
    x = torch.randn(2, 17, 32)
    mixer = model.layers[0].mixer
    before = mixer(x)
    state = mixer.state_dict()
    partner = {"A_log": "A_b_log", "A_b_log": "A_log"}
    for name in state:
        stem, dot, rest = name.partition(".")
        if stem.startswith(("conv1d", "x_proj", "dt_proj", "D")):
            partner[name] = (stem.removesuffix("_b") if stem.endswith("_b") else stem + "_b") + dot + rest
    mixer.load_state_dict({name: state[partner.get(name, name)].clone() for name in state})
    torch.testing.assert_close(mixer(x.flip(1)).flip(1), before)


# Training.


def test_every_parameter_has_a_gradient(model, images):
    model(images).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_drop_path_rises_to_the_last_block():
    model = vim.vim_small(5, **SMALL, drop_path_rate=0.2)
    assert [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers] == [0.0, 0.1, 0.2]


def test_residual_stream_stays_in_float32_under_autocast(model, images):
    types = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *a: types.append(a[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert types == [torch.float32] * 3
    torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)


def test_blocks_and_head_are_found(model, full_size):
    assert list(find_blocks(full_size)) == [f"layers.{i}" for i in range(24)]
    assert toolkit.adapt(model, "linear").head.weight.requires_grad
    model.reset_classifier(9)
    assert model.get_classifier().out_features == model.num_classes == 9


def test_parameters_without_weight_decay(model):
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {name.rpartition(".mixer.")[2].replace("_b.", ".") for name in names} == {
        "in_proj.weight", "out_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight",
        "patch_embed.proj.weight", "head.weight",
    }  # fmt: skip


def test_declared_targets(full_size):
    named = dict(full_size.named_modules())
    adapted = {name for name in named if re.fullmatch(full_size.lora_targets, name)}
    packed = {name for name in named if re.fullmatch(full_size.four_bit_targets, name)}
    assert len(adapted) == 24 * 4 and len(packed) == 24 * 2 and packed < adapted
    assert sum(named[name].weight.numel() for name in packed) == 21_233_664


def test_every_lora_adapter_has_a_gradient(model, images):
    import peft

    config = peft.LoraConfig(r=2, target_modules=model.lora_targets, modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    wrapped(images).square().sum().backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if "lora_B" in name}
    assert len(adapters) == 3 * 4
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []


# Checkpoints.


def test_checkpoint_loads_all_but_the_head(tmp_path, monkeypatch):
    weights = synthetic_weights()
    path = tmp_path / "vim.pth"
    published = dataclasses.replace(vim.VIM_SMALL, sha256=save(weights, path))
    asked = []
    monkeypatch.setattr(vim, "VIM_SMALL", published)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((*a, k["revision"])) or str(path)
    )
    torch.manual_seed(0)
    model = vim.vim_small(7, pretrained=True, **SMALL)
    assert asked == [(published.repo, "vim_s_midclstok_80p5acc.pth", published.revision)]
    state = model.state_dict()
    assert {k for k in state if k not in weights or not torch.equal(state[k], weights[k])} == {
        "head.weight",
        "head.bias",
    }
    assert state["head.weight"].shape == (7, 32)
    assert model.pretrained_cfg["license"] == "apache-2.0"


def drop_key(weights):
    del weights["layers.1.mixer.A_b_log"]
    return "1 missing: layers.1.mixer.A_b_log"


def rename_keys(weights):
    for i in range(3):
        weights[f"layers.{i}.mixer.A_log_b"] = weights.pop(f"layers.{i}.mixer.A_b_log")
    weights["extra"] = torch.zeros(1)
    return r"3 missing: layers.0.*; 4 unexpected: extra, layers.0.mixer.A_log_b, .*, \.\.\."


def reshape_key(weights):
    weights["layers.0.mixer.D"] = torch.zeros(63)
    return r"1 of another shape: layers.0.mixer.D \(63,\) instead of \(64,\)"


@pytest.mark.parametrize("damage", [drop_key, rename_keys, reshape_key])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, model, damage):
    weights = synthetic_weights()
    message = damage(weights)
    save(weights, tmp_path / "vim.pth")
    before = model.pos_embed.clone()
    with pytest.raises(InputError, match=message):
        vim.load_vim_weights(model, tmp_path / "vim.pth")
    assert torch.equal(model.pos_embed, before)


class _Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["TEST_VIM_TRACE"],)


def test_files_that_are_not_the_published_weights_are_refused(tmp_path, model, monkeypatch):
    path = tmp_path / "vim.pth"
    monkeypatch.setenv("TEST_VIM_TRACE", str(tmp_path / "executed"))
    with pytest.raises(InputError, match="no checkpoint"):
        vim.load_vim_weights(model, path)

    torch.save({"model": synthetic_weights(), "args": _Code()}, path)
    with pytest.raises(InputError, match="not the file that was published"):
        vim.load_vim_weights(model, path, vim.VIM_SMALL.sha256)
    with pytest.raises(InputError, match="cannot be read"):
        vim.load_vim_weights(model, path)
    assert not (tmp_path / "executed").exists()

    save(synthetic_weights(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        vim.load_vim_weights(model, path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="cannot be read"):
        vim.load_vim_weights(model, path)
    torch.save({"model": {"epoch": 3}}, path)
    with pytest.raises(InputError, match="holds no weights"):
        vim.load_vim_weights(model, path)


def test_missing_weights_are_an_input_error(monkeypatch):
    monkeypatch.setattr(vim, "VisionMamba", lambda **_: None)  # nothing of full size is needed for this
    with pytest.raises(InputError, match=r"vim_s_midclstok_80p5acc.pth.*pretrained=False"):
        toolkit.build_backbone("vim_small", 10)


def test_position_embedding_is_resized_around_the_class_token():
    rows = torch.arange(14.0).repeat_interleave(14)
    embedding = torch.stack([rows, torch.arange(14.0).repeat(14)], dim=1)[None]  # (1, 196, 2): row, column
    embedding = torch.cat([embedding[:, :98], torch.full((1, 1, 2), 1e6), embedding[:, 98:]], dim=1)
    assert vim.resize_position_embedding(embedding, (14, 14)) is embedding
    resized = vim.resize_position_embedding(embedding, (28, 20))
    assert resized.shape == (1, 561, 2)
    assert (resized[0, 280] == 1e6).all()
    grid = torch.cat([resized[0, :280], resized[0, 281:]]).unflatten(0, (28, 20))
    # Away from the border bicubic interpolation is exact for what is linear.
    expected_rows = (torch.arange(28.0) + 0.5) / 2 - 0.5
    expected_columns = (torch.arange(20.0) + 0.5) * 14 / 20 - 0.5
    inside = (slice(5, -5), slice(5, -5))
    torch.testing.assert_close(
        grid[..., 0][inside], expected_rows[5:-5, None].expand(18, 10), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(grid[..., 1][inside], expected_columns[5:-5].expand(18, 10), atol=1e-4, rtol=0)


def test_checkpoint_of_another_image_size_loads(tmp_path):
    weights = synthetic_weights()
    save(weights, tmp_path / "vim.pth")
    model = vim.vim_small(5, **SMALL | {"img_size": (48, 32)})
    vim.load_vim_weights(model, tmp_path / "vim.pth")
    assert model.pretrained_cfg["input_size"] == (3, 48, 32)
    assert torch.equal(model.pos_embed[:, 12], weights["pos_embed"][:, 8])
    assert model(torch.zeros(1, 3, 48, 32)).shape == (1, 5)
