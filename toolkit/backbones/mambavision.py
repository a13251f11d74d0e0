"""MambaVision (Hatamizadeh and Kautz 2024, arXiv 2407.08083): convolutions, then Mamba and attention.

Written from the paper and the published checkpoint's names and shapes; NVIDIA's code, which is under a
non-commercial licence, is not used.  The weights are under CC-BY-NC-SA-4.0: for research only.

Shapes: B images, maps (B, C, H, W), windows of T tokens (B·windows, T, C), N states per channel.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from toolkit.backbones.checkpoints import Checkpoint, fetch, fill, read_weights
from toolkit.backbones.selective_scan import selective_scan
from toolkit.backbones.vim import (
    ScanClassifier,
    image_config,
    initial_A_log,
    selection,
    step_size_projection,
)  # fmt: skip

# Neither revision nor digest of this file is known yet: only `fill` verifies it, by all keys and shapes.
MAMBAVISION_T = Checkpoint(
    repo="nvidia/MambaVision-T-1K",
    file="model.safetensors",
    license="cc-by-nc-sa-4.0",
    notice="The weights of MambaVision-T are licensed CC-BY-NC-SA-4.0: they, and models trained from them, "
    "are for research and evaluation only.",
)


def mambavision_t(num_classes: int, pretrained: bool = False, **sizes) -> MambaVision:
    """MambaVision-T; 31,794,248 parameters with 1000 classes.

    `sizes` replace arguments of `MambaVision`, to build small instances with random weights.
    """
    model = MambaVision(num_classes=num_classes, **sizes)
    if pretrained:
        path = fetch(MAMBAVISION_T)
        fill(model, read_weights(path), path)
    model.pretrained_cfg |= MAMBAVISION_T.config
    return model


class MambaVision(ScanClassifier):
    """Images (B, 3, H, W) of any size -> logits (B, `num_classes`), with timm's interface.

    The stem halves the resolution twice; each of the four stages but the last halves it once more and doubles
    the channels, which start at `embed_dim`.  `num_heads` and `window_sizes` are those of stages 3 and 4: the
    first half of their blocks is Mamba, the second attention.  `d_state` is N.  `drop_path_rate` is the last
    block's; rates rise to it linearly.  `img_size` is the size of the images in training.
    """

    # Full match on the names of modules that low-rank methods adapt: the linear layers of the blocks but
    # dt_proj, whose bias is used twice and which has the rank of an adapter already.
    lora_targets = r"levels\.[23]\.blocks\.\d+\.(mixer\.(in_proj|out_proj|x_proj|qkv|proj)|mlp\.fc[12])"
    # Those that QLoRA stores in 4 bit: without x_proj, which is small and makes the step size, inside an exp.
    four_bit_targets = r"levels\.[23]\.blocks\.\d+\.(mixer\.(in_proj|out_proj|qkv|proj)|mlp\.fc[12])"

    def __init__(
        self,
        num_classes: int,
        stem_dim: int = 32,
        embed_dim: int = 80,
        depths: tuple[int, int, int, int] = (1, 3, 8, 4),
        num_heads: tuple[int, int] = (8, 16),
        window_sizes: tuple[int, int] = (14, 7),
        d_state: int = 8,
        drop_path_rate: float = 0.0,
        img_size: int = 224,
    ):
        super().__init__()
        self.patch_embed = stem(stem_dim, embed_dim)
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        dims = [embed_dim * 2**i for i in range(4)]
        self.levels = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            stage_rates = [next(rates) for _ in range(depth)]
            if i < 2:
                self.levels.append(ConvStage(dim, stage_rates))
            else:
                heads, window = num_heads[i - 2], window_sizes[i - 2]
                self.levels.append(MixerStage(dim, stage_rates, heads, window, d_state, last=i == 3))
        self.num_features = dims[-1]
        self.norm = nn.BatchNorm2d(self.num_features)
        self.reset_classifier(num_classes)
        self.pretrained_cfg = image_config((img_size, img_size), crop_pct=1.0)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normed map (B, C, h, w) of the last stage: 1/32 of the images' height and width, rounded up."""
        x = self.patch_embed(images)
        for level in self.levels:
            x = level(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean(dim=(2, 3)))


def stem(stem_dim: int, dim: int) -> nn.Module:
    """Two convolutions that halve height and width: (B, 3, H, W) -> (B, C, H/4, W/4)."""
    layers = nn.Sequential(
        nn.Conv2d(3, stem_dim, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(stem_dim, eps=1e-4),
        nn.ReLU(),
        nn.Conv2d(stem_dim, dim, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(dim, eps=1e-4),
        nn.ReLU(),
    )
    return nn.Sequential(OrderedDict(conv_down=layers))  # named as in the checkpoint


def downsample(dim: int) -> nn.Module:
    """A convolution to half the height and width, and twice the channels."""
    convolution = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(OrderedDict(reduction=nn.Sequential(convolution)))


class ConvStage(nn.Module):
    """Stages 1 and 2: residual convolutions on the map, then down-sampling."""

    def __init__(self, dim: int, drop_path_rates: list[float]):
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(dim, rate) for rate in drop_path_rates)
        self.downsample = downsample(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions on a map (B, C, H, W)."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.norm2(self.conv2(hidden)))


class MixerStage(nn.Module):
    """Stages 3 and 4: blocks on the windows of a map, then down-sampling, but not in the last stage.

    The map is padded with zeros at the right and at the bottom to whole windows; as in the published model,
    blocks treat the padding like other tokens.  Windows do not see one another.
    """

    def __init__(
        self, dim: int, drop_path_rates: list[float], heads: int, window: int, d_state: int, last: bool
    ):
        super().__init__()
        self.window = window
        mamba = math.ceil(len(drop_path_rates) / 2)
        self.blocks = nn.ModuleList(
            MixerBlock(
                dim, MambaMixer(dim, d_state) if i < mamba else Attention(dim, heads, qkv_bias=True), rate
            )
            for i, rate in enumerate(drop_path_rates)
        )
        self.downsample = nn.Identity() if last else downsample(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % self.window, 0, -height % self.window))
        tokens = to_windows(padded, self.window)
        for block in self.blocks:
            tokens = block(tokens)
        x = from_windows(tokens, padded.shape, self.window)[:, :, :height, :width]
        return self.downsample(x)


def to_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """Cut (B, C, H, W) into (B·windows, window², C), windows and their tokens row by row."""
    tiles = x.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, C, rows, window, columns, window)
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)


def from_windows(tokens: torch.Tensor, shape: torch.Size, window: int) -> torch.Tensor:
    """Undo `to_windows`: the map (B, C, H, W) = `shape`."""
    batch, _, height, width = shape
    tiles = tokens.unflatten(1, (window, window)).unflatten(0, (batch, height // window, width // window))
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class MixerBlock(nn.Module):
    """Pre-norm residual block on tokens (B·windows, T, C): Mamba or attention, then an MLP of 4C."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MambaMixer(nn.Module):
    """MambaVision's mixer (section 3): half of the channels are scanned, the others only convolved.

    Both halves go through a convolution that sees both neighbours, not only the past; their concatenation is
    projected, without a gate.  Tokens (B, T, C) -> (B, T, C).
    """

    def __init__(self, dim: int, d_state: int):
        super().__init__()
        half, rank = dim // 2, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.x_proj = nn.Linear(half, rank + 2 * d_state, bias=False)
        self.dt_proj = step_size_projection(rank, half)
        self.A_log = nn.Parameter(initial_A_log(half, d_state))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (B, C/2, T) each
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        A = -self.A_log.exp()
        # The published weights were trained with dt_proj's bias added twice: by dt_proj and in the scan.
        bias = self.dt_proj.bias
        y = selective_scan(x, *selection(x, self.x_proj, self.dt_proj, A), D=self.D, delta_bias=bias)
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))
