"""Vision Mamba, "Vim" (Zhu et al. 2024, arXiv 2401.09417): a sequence of patches read in both directions.

Written from the paper and the published checkpoint's names and shapes, so that no CUDA extension is needed
and every projection is called as a module: adapters, 4-bit layers and hooks see it.  (The official code
passes bare weights to a fused kernel, under which LoRA layers get no gradient.)

The residual stream is one tensor, x + drop_path(mixer(norm(x))); the official pair (hidden, residual) has the
same sum.

Shapes: B images, L = M + 1 tokens (M patches and the class token), D channels, E = 2D inner channels,
N states per channel, R = D/16 rank of the step size.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed
from torch import nn

from toolkit.backbones.checkpoints import Checkpoint, fetch, fill, read_weights
from toolkit.backbones.selective_scan import selective_scan

VIM_SMALL = Checkpoint(
    repo="hustvl/Vim-small-midclstok",
    file="vim_s_midclstok_80p5acc.pth",
    license="apache-2.0",
    revision="babc4440f5fab6e08d97e371afa639c8cf98bf2c",
    sha256="aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
)


def vim_small(num_classes: int, pretrained: bool = False, **sizes) -> VisionMamba:
    """Vim-Small with the class token in the middle; 25,796,584 parameters with 1000 classes.

    `sizes` replace arguments of `VisionMamba`, to build small instances with random weights.
    """
    model = VisionMamba(num_classes=num_classes, **sizes)
    if pretrained:
        load_vim_weights(model, fetch(VIM_SMALL), VIM_SMALL.sha256)
    model.pretrained_cfg |= VIM_SMALL.config
    return model


def load_vim_weights(model: VisionMamba, path: Path, sha256: str | None = None) -> None:
    """Fill everything but the head from the checkpoint file `path`.

    The position embedding is resampled to the model's grid of patches.  Raises `InputError` for a file with
    another digest, an unreadable one, and one that does not fit.
    """
    weights = read_weights(path, sha256)
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_position_embedding(weights["pos_embed"], model.patch_embed.grid_size)
    fill(model, weights, path)


def resize_position_embedding(embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resample (1, M + 1, D) for a square grid of M patches to (1, h·w + 1, D) for `grid` = (h, w), bicubic.

    The class token's embedding is in the middle of both, at M//2.  Embeddings of other grids are returned
    unchanged.
    """
    patches = embedding.shape[1] - 1
    if patches == math.prod(grid) or math.isqrt(patches) ** 2 != patches:
        return embedding
    before, token, after = embedding.split([patches // 2, 1, patches - patches // 2], dim=1)
    resized = resample_abs_pos_embed(torch.cat([before, after], dim=1), list(grid), num_prefix_tokens=0)
    middle = math.prod(grid) // 2
    return torch.cat([resized[:, :middle], token, resized[:, middle:]], dim=1)


def image_config(size: tuple[int, int], crop_pct: float) -> dict:
    """timm's `pretrained_cfg` of a model trained on ImageNet images of `size`, height and width."""
    return {
        "input_size": (3, *size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
    }


class ScanClassifier(nn.Module):
    """timm's interface of a classifier; subclasses define `forward_features` and `forward_head`."""

    num_features: int
    undecayed = ("A_log", "A_b_log", "D", "D_b", "pos_embed", "cls_token")  # ends of parameter names

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new, random one."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, device=next(self.parameters()).device)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to which weight decay does not apply."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in self.undecayed}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


class VisionMamba(ScanClassifier):
    """Images (B, 3, `img_size`, `img_size`) -> logits (B, `num_classes`), with timm's interface.

    `embed_dim` is D, `d_state` N, `depth` the number of blocks.  `drop_path_rate` is the last block's; rates
    rise to it linearly.  There is no MLP and no attention.
    """

    # Full match on the names of modules that low-rank methods adapt: the projections (MambaPEFT, arXiv
    # 2411.03855).  dt_proj has the rank of an adapter already.
    lora_targets = r"layers\.\d+\.mixer\.(in_proj|out_proj|x_proj|x_proj_b)"
    # Those that QLoRA stores in 4 bit: 82 % of the parameters.  x_proj makes the step size, inside an exp.
    four_bit_targets = r"layers\.\d+\.mixer\.(in_proj|out_proj)"

    def __init__(
        self,
        num_classes: int,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 24,
        d_state: int = 16,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.num_features = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=embed_dim)
        patches = self.patch_embed.num_patches
        self.middle = patches // 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(VimBlock(embed_dim, d_state, rate) for rate in rates)
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.reset_classifier(num_classes)
        self.pretrained_cfg = image_config(self.patch_embed.img_size, crop_pct=0.875)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normed tokens (B, L, D) of images (B, 3, H, W); the class token is number `middle`."""
        patches = self.patch_embed(images)
        before, after = patches[:, : self.middle], patches[:, self.middle :]
        token = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([before, token, after], dim=1) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)

    def forward_head(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(tokens[:, self.middle])


class VimBlock(nn.Module):
    """Pre-norm residual block on tokens (B, L, D)."""

    def __init__(self, dim: int, d_state: int, drop_path: float):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = BidirectionalMamba(dim, d_state)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class BidirectionalMamba(nn.Module):
    """Vim's mixer (algorithm 1): the mean of two Mamba mixers, one of which reads from the end.

    They share in_proj and out_proj and nothing else; the second's parts are named with `_b`.
    Tokens (B, L, D) -> (B, L, D).
    """

    def __init__(self, dim: int, d_state: int):
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner, kernel_size=4, reverse=False)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = step_size_projection(rank, inner)
        self.A_log = nn.Parameter(initial_A_log(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.conv1d_b = CausalConv1d(inner, kernel_size=4, reverse=True)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = step_size_projection(rank, inner)
        self.A_b_log = nn.Parameter(initial_A_log(inner, d_state))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each

        def scan(conv, x_proj, dt_proj, A_log, D, reverse):
            u = F.silu(conv(x))
            A = -A_log.exp()
            # dt_proj adds its bias itself: once, before the softplus.
            return selective_scan(u, *selection(u, x_proj, dt_proj, A), D=D, z=z, reverse=reverse)

        onward = scan(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        back = scan(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        return self.out_proj(((onward + back) / 2).transpose(1, 2))


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution of (B, E, L) whose output t sees inputs t-k+1 to t.

    `reverse`: inputs t to t+k-1, as if the sequence were flipped before and after, without such copies.
    """

    def __init__(self, channels: int, kernel_size: int, reverse: bool):
        super().__init__(channels, channels, kernel_size, padding=kernel_size - 1, groups=channels)
        self.reverse = reverse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        if self.reverse:
            return self._conv_forward(x, self.weight.flip(-1), self.bias)[..., -length:]
        return super().forward(x)[..., :length]


def selection(
    u: torch.Tensor, x_proj: nn.Module, dt_proj: nn.Module, A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute (dt, A, B, C) of a scan of `u` (B, E, L): the selection of arXiv 2312.00752, algorithm 2.

    dt (B, E, L) is before the softplus; B and C are (B, N, L).
    """
    states = A.shape[1]
    projected = x_proj(u.transpose(1, 2))  # (B, L, R + 2N)
    step, B, C = projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)
    return dt_proj(step).transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2)


def initial_A_log(channels: int, states: int) -> torch.Tensor:
    """Log of -A, (channels, states): A starts as -1, ..., -N in every channel (S4D-Real, ibid., sec. 3.6)."""
    return torch.arange(1, states + 1, dtype=torch.float32).log().repeat(channels, 1)


def step_size_projection(rank: int, channels: int) -> nn.Linear:
    """A layer R -> E with a bias whose softplus is log-uniform in [1e-3, 1e-1] (ibid., sec. 3.6)."""
    projection = nn.Linear(rank, channels)
    nn.init.uniform_(projection.weight, -(rank**-0.5), rank**-0.5)
    step = torch.exp(torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)))
    with torch.no_grad():
        projection.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    return projection
