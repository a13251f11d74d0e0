"""MambaVision against the published checkpoint's table of keys and against its formulas, written plainly.

The reference shares no code with the model: loops over time and windows, normalization and attention
spelled out, in float64.
"""

import math
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import toolkit
from toolkit.backbones import checkpoints, mambavision
from toolkit.budget import find_blocks
from toolkit.errors import InputError

pytestmark = pytest.mark.numerical

SMALL = {"stem_dim": 8, "embed_dim": 16, "depths": (1, 2, 3, 2), "num_heads": (2, 4), "window_sizes": (4, 2)}
MAMBA, ATTENTION = "mamba", "attention"


def published_shapes(stem, dims, mixers, depths, N, classes):
    """Names and shapes of the official state dict; `mixers` are the kinds of the blocks of stages 3 and 4."""

    def batch_norm(name, d):
        statistics = {"running_mean": (d,), "running_var": (d,), "num_batches_tracked": ()}
        return {f"{name}.{key}": shape for key, shape in {"weight": (d,), "bias": (d,), **statistics}.items()}

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes = {
        "patch_embed.conv_down.0.weight": (stem, 3, 3, 3),
        **batch_norm("patch_embed.conv_down.1", stem),
    }
    shapes |= {"patch_embed.conv_down.3.weight": (dims[0], stem, 3, 3)}
    shapes |= batch_norm("patch_embed.conv_down.4", dims[0])
    for level, d in enumerate(dims):
        if level < 3:
            shapes[f"levels.{level}.downsample.reduction.0.weight"] = (2 * d, d, 3, 3)
        for i in range(depths[level]):
            block = f"levels.{level}.blocks.{i}"
            if level < 2:
                for j in "12":
                    shapes |= {f"{block}.conv{j}.weight": (d, d, 3, 3), f"{block}.conv{j}.bias": (d,)}
                    shapes |= batch_norm(f"{block}.norm{j}", d)
                continue
            for name in ("norm1", "norm2"):
                shapes |= {f"{block}.{name}.weight": (d,), f"{block}.{name}.bias": (d,)}
            shapes |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
            if mixers[level - 2][i] == ATTENTION:
                shapes |= linear(f"{block}.mixer.qkv", 3 * d, d) | linear(f"{block}.mixer.proj", d, d)
                continue
            mixer = {
                "A_log": (d // 2, N),
                "D": (d // 2,),
                "in_proj.weight": (d, d),
                "out_proj.weight": (d, d),
            }
            mixer |= {"x_proj.weight": (d // 16 + 2 * N, d // 2)}
            mixer |= {"dt_proj.weight": (d // 2, d // 16), "dt_proj.bias": (d // 2,)}
            mixer |= {"conv1d_x.weight": (d // 2, 1, 3), "conv1d_z.weight": (d // 2, 1, 3)}
            shapes |= {f"{block}.mixer.{name}": shape for name, shape in mixer.items()}
    return shapes | batch_norm("norm", dims[3]) | linear("head", classes, dims[3])


FULL_SHAPES = published_shapes(
    stem=32,
    dims=(80, 160, 320, 640),
    depths=(1, 3, 8, 4),
    mixers=([MAMBA] * 4 + [ATTENTION] * 4, [MAMBA] * 2 + [ATTENTION] * 2),
    N=8,
    classes=1000,
)
SMALL_SHAPES = published_shapes(
    stem=8,
    dims=(16, 32, 64, 128),
    depths=(1, 2, 3, 2),
    mixers=([MAMBA] * 2 + [ATTENTION], [MAMBA, ATTENTION]),  # of an odd number one more is Mamba
    N=8,
    classes=1000,
)


def synthetic_weights():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(shape, generator=generator) for name, shape in SMALL_SHAPES.items()}
    return {k: v.long() if k.endswith("num_batches_tracked") else v for k, v in weights.items()}


def build_small():
    return mambavision.mambavision_t(5, **SMALL)


@pytest.fixture
def model():
    """A small instance in eval mode, none of whose tensors has its initial value.

    Small running variances let the epsilons of the norms be seen.
    """
    torch.manual_seed(0)
    model = build_small().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.01, 0.5)
            elif name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return toolkit.build_backbone("mambavision_t", 1000, pretrained=False)


def test_mambavision_t_has_the_published_keys_shapes_and_parameters(full_size):
    state = full_size.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == FULL_SHAPES
    assert sum(p.numel() for p in full_size.parameters()) == 31_794_248
    assert sum(b.numel() for b in full_size.buffers()) == 3_755
    assert len(state) == 252


# The reference, on one sample's tokens (T, C) or on maps.


def layer_norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def batch_norm(x, p, name, eps):
    mean, variance, weight, bias = (
        p[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def silu(x):
    return x * torch.sigmoid(x)


def reference_mamba(tokens, p):
    """(T, C) -> (T, C)."""
    length, half = len(tokens), tokens.shape[1] // 2
    xz = tokens @ p["in_proj.weight"].T
    padded = torch.cat([torch.zeros_like(xz[:1]), xz, torch.zeros_like(xz[:1])])
    w = torch.cat([p["conv1d_x.weight"], p["conv1d_z.weight"]])[:, 0]
    xz = torch.stack([silu(sum(w[:, k] * padded[t + k] for k in range(3))) for t in range(length)])
    A = -torch.exp(p["A_log"])
    states = A.shape[1]
    h = torch.zeros_like(A)
    outputs = []
    for x in xz[:, :half]:
        projected = x @ p["x_proj.weight"].T
        B, C = projected[-2 * states : -states], projected[-states:]
        step = projected[: -2 * states] @ p["dt_proj.weight"].T + 2 * p["dt_proj.bias"]  # twice, as published
        step = torch.log1p(torch.exp(step))
        h = torch.exp(step[:, None] * A) * h + (step * x)[:, None] * B[None, :]
        outputs.append(h @ C + p["D"] * x)
    return torch.cat([torch.stack(outputs), xz[:, half:]], dim=1) @ p["out_proj.weight"].T


def reference_attention(tokens, p, heads):
    """(T, C) -> (T, C)."""
    channels = tokens.shape[1]
    size = channels // heads
    qkv = tokens @ p["qkv.weight"].T + p["qkv.bias"]
    mixed = []
    for head in range(heads):
        q, k, v = (qkv[:, i * channels + head * size :][:, :size] for i in range(3))
        mixed.append(torch.softmax(q @ k.T / math.sqrt(size), dim=1) @ v)
    return torch.cat(mixed, dim=1) @ p["proj.weight"].T + p["proj.bias"]


def inside(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def reference_stage(x, p, depth, window, heads):
    """Map (C, H, W) -> (C, H, W), window by window."""
    channels, height, width = x.shape
    out = torch.zeros_like(x)
    for top in range(0, height, window):
        for left in range(0, width, window):
            tile = torch.zeros(channels, window, window, dtype=x.dtype)
            part = x[:, top : top + window, left : left + window]
            tile[:, : part.shape[1], : part.shape[2]] = part
            tokens = tile.flatten(1).T
            for i in range(depth):
                b = inside(p, f"blocks.{i}.")
                mixer = inside(b, "mixer.")
                normed = layer_norm(tokens, b, "norm1")
                is_mamba = "A_log" in mixer
                tokens = tokens + (
                    reference_mamba(normed, mixer) if is_mamba else reference_attention(normed, mixer, heads)
                )
                hidden = layer_norm(tokens, b, "norm2") @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                tokens = tokens + hidden @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
            tile = tokens.T.unflatten(1, (window, window))
            out[:, top : top + window, left : left + window] = tile[:, : part.shape[1], : part.shape[2]]
    return out


def reference_logits(state, image, depths, windows, heads):
    """One image (3, H, W) -> logits."""
    p = {name: value.double() for name, value in state.items()}
    x = image.double()
    for conv, norm in (("0", "1"), ("3", "4")):
        x = F.conv2d(x, p[f"patch_embed.conv_down.{conv}.weight"], stride=2, padding=1)
        x = batch_norm(x, p, f"patch_embed.conv_down.{norm}", eps=1e-4).clamp(min=0)
    for level, depth in enumerate(depths):
        stage = inside(p, f"levels.{level}.")
        if level < 2:
            for i in range(depth):
                b = inside(stage, f"blocks.{i}.")
                hidden = F.conv2d(x, b["conv1.weight"], b["conv1.bias"], padding=1)
                hidden = batch_norm(hidden, b, "norm1", eps=1e-5)
                inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
                hidden = hidden * (1 + torch.tanh(inner)) / 2
                hidden = F.conv2d(hidden, b["conv2.weight"], b["conv2.bias"], padding=1)
                x = x + batch_norm(hidden, b, "norm2", eps=1e-5)
        else:
            x = reference_stage(x, stage, depth, windows[level - 2], heads[level - 2])
        if level < 3:
            x = F.conv2d(x, stage["downsample.reduction.0.weight"], stride=2, padding=1)
    pooled = batch_norm(x, p, "norm", eps=1e-5).flatten(1).mean(1)
    return pooled @ p["head.weight"].T + p["head.bias"]


@pytest.mark.parametrize("block, reference", [(0, reference_mamba), (2, reference_attention)])
def test_mixers_match_the_formulas(model, block, reference):
    mixer = model.levels[2].blocks[block].mixer
    state = {name: value.double() for name, value in mixer.state_dict().items()}
    heads = {} if reference is reference_mamba else {"heads": 2}
    tokens = torch.randn(2, 16, 64)
    expected = torch.stack([reference(sample, state, **heads) for sample in tokens.double()])
    torch.testing.assert_close(mixer(tokens).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (40, 70)])
def test_model_matches_the_formulas_at_any_resolution(model, size):
    """One window, several, and padded ones in both stages."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    state = model.state_dict()
    expected = torch.stack([reference_logits(state, x, SMALL["depths"], (4, 2), (2, 4)) for x in images])
    torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-9, atol=1e-9)
    # In float32 each layer rounds about once, by half a last digit; processors differ in the order of sums.
    layers = sum(1 for module in model.modules() if not list(module.children()))
    difference = (model.float()(images) - expected).abs().max()
    assert difference <= layers * 2**-24 * expected.abs().max()


def test_padding_is_that_of_a_zero_padded_map(model):
    stage = model.levels[3]
    x = torch.randn(2, 128, 3, 5)
    padded = stage(F.pad(x, (0, 1, 0, 1)))
    torch.testing.assert_close(stage(x), padded[:, :, :3, :5])


def test_windows_do_not_see_one_another(model):
    stage = model.levels[3]
    x = torch.randn(1, 128, 4, 6)
    other = x.clone()
    other[:, :, 2:4, 2:4] += 1
    changed = (stage(x) - stage(other)).abs().amax(dim=(0, 1)) > 1e-6
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(changed, expected)


# Training.


def test_every_parameter_has_a_gradient(model):
    model.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_drop_path_rises_to_the_last_block():
    model = mambavision.mambavision_t(5, **SMALL, drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in find_blocks(model).values()]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_blocks_and_head_are_found(full_size, model):
    expected = [
        f"levels.{level}.blocks.{i}" for level, depth in enumerate((1, 3, 8, 4)) for i in range(depth)
    ]
    assert list(find_blocks(full_size)) == expected
    assert toolkit.adapt(model, "linear").head.weight.requires_grad
    model.reset_classifier(9)
    assert model.get_classifier().out_features == model.num_classes == 9
    assert model.no_weight_decay() == {
        f"levels.{level}.blocks.{i}.mixer.{name}"
        for level, i in ((2, 0), (2, 1), (3, 0))
        for name in ("A_log", "D")
    }


def test_declared_targets(full_size):
    named = dict(full_size.named_modules())
    adapted = {name for name in named if re.fullmatch(full_size.lora_targets, name)}
    packed = {name for name in named if re.fullmatch(full_size.four_bit_targets, name)}
    assert len(adapted) == 6 * 3 + 6 * 2 + 12 * 2
    assert {name.rpartition(".")[2] for name in adapted - packed} == {"x_proj"} and packed < adapted
    assert all(isinstance(named[name], torch.nn.Linear) for name in adapted)


def test_every_lora_adapter_has_a_gradient(model):
    import peft

    config = peft.LoraConfig(r=2, target_modules=model.lora_targets, modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    wrapped(torch.randn(2, 3, 64, 64)).square().sum().backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if "lora_B" in name}
    assert len(adapters) == 3 * 3 + 2 * 2 + 5 * 2
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []


def test_a_wrapped_dt_proj_keeps_the_bias_that_is_added_twice(model):
    import peft

    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    config = peft.LoraConfig(r=2, target_modules=r"levels\..*\.mixer\.dt_proj")
    torch.testing.assert_close(peft.get_peft_model(model, config)(images), before)


# Checkpoints.


@pytest.mark.parametrize("form", ["bare", "model.", "pickle"])
def test_checkpoint_loads_all_but_the_head(tmp_path, monkeypatch, capsys, form):
    weights = synthetic_weights()
    if form == "pickle":
        path = tmp_path / "mambavision_tiny_1k.pth.tar"
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    else:
        path = tmp_path / "model.safetensors"
        prefix = form.removeprefix("bare")
        safetensors.torch.save_file({f"{prefix}{k}": v for k, v in weights.items()}, path)
    printed_before = []

    def download(repo, file, revision):
        printed_before.append(capsys.readouterr().out)
        assert (repo, file) == ("nvidia/MambaVision-T-1K", "model.safetensors")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    checkpoints._print_once.cache_clear()
    for classes in (7, 3):
        torch.manual_seed(0)
        model = mambavision.mambavision_t(classes, pretrained=True, **SMALL)
        state = model.state_dict()
        different = {k for k in state if k not in weights or not torch.equal(state[k], weights[k])}
        assert different == {"head.weight", "head.bias"}
        assert state["head.weight"].shape == (classes, 128)
    assert "CC-BY-NC-SA-4.0" in printed_before[0] and printed_before[1] == ""
    assert model.pretrained_cfg["license"] == "cc-by-nc-sa-4.0"


def test_checkpoint_without_a_buffer_or_with_a_layer_scale_is_refused(tmp_path, model):
    weights = synthetic_weights()
    del weights["norm.running_var"]
    weights["levels.2.blocks.0.gamma_1"] = torch.ones(64)
    weights["levels.2.blocks.2.mixer.qkv.weight"] = torch.zeros(128, 64)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(weights, path)
    message = (
        r"does not fit MambaVision; 1 missing: norm.running_var; 1 unexpected: levels.2.blocks.0.gamma_1; "
        r"1 of another shape: levels.2.blocks.2.mixer.qkv.weight \(128, 64\) instead of \(192, 64\)"
    )
    with pytest.raises(InputError, match=message):
        checkpoints.fill(model, checkpoints.read_weights(path), path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.read_weights(path)


def test_missing_weights_are_an_input_error(monkeypatch):
    monkeypatch.setattr(mambavision, "MambaVision", lambda **_: None)  # nothing of full size is needed
    with pytest.raises(InputError, match=r"nvidia/MambaVision-T-1K.*pretrained=False"):
        toolkit.build_backbone("mambavision_t", 10)
