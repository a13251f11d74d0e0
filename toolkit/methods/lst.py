"""LST: a small transformer beside the backbone reads its blocks like the rungs of a ladder (Sung, Cho, Bansal
2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv 2206.06522).

    h_1 = B_1(D_1 b_1),   h_i = B_i(s_i h_(i-1) + (1 - s_i) D_i b_i),   s_i = sigmoid(a_i / 0.1)
    y = final features + U h,   b_i: what tapped block i returned,   a_i = 0 at first

D_i are linear maps to the width d / side_reduction, B_i transformer blocks of that width.  U starts at zero,
so training starts from the linear probe: our choice, as is that the first rung reads the first tapped block
and not the embedding.  The maps D_i train, so the features that they read are kept for backward; of the
backbone's inside nothing is.

Pruned start: B_i gets the channels of block i with the largest weights.  The paper weighs channels by Fisher
information, which takes data; magnitudes do not.  D_i then selects the channels that were left (in the paper
it is random).
"""

from __future__ import annotations

import torch
from torch import nn

from toolkit.errors import InputError, check_name
from toolkit.methods.side import SideModel, check_positive, silent, to_four_bits
from toolkit.methods.taps import Survey, taps_of

TEMPERATURE = 0.1  # of the gates
STARTS = ("auto", "pruned", "random")
HEAD_WIDTH = 8  # at least, of attention in blocks that are not pruned from others
_MLP_RATIO = 4


def lst(
    model: nn.Module,
    side_reduction: int = 8,
    side_taps: int = 0,
    lst_init: str = "auto",
    four_bit_backbone: bool = False,
) -> SideModel:
    """A ladder of `side_taps` rungs (0: one per block) beside `model`, which is used up.

    `lst_init`: "pruned" from the backbone's blocks, "random", or "auto": pruned where all tapped blocks are
    transformer blocks that can be.  Raises `InputError` for "pruned" where they are not.
    """
    check_positive(side_reduction=side_reduction)
    check_name("lst_init", lst_init, STARTS)
    survey = Survey.of(model)
    taps = taps_of(model, survey, side_taps)
    final = taps.final.width
    if final % side_reduction:
        raise InputError(
            f"side_reduction {side_reduction} does not divide the {final} channels of "
            f"{type(model).__name__}; choose a divisor."
        )
    width = final // side_reduction
    sources = [model.get_submodule(tap.name) for tap in taps.taps]
    why_not = next(filter(None, (_fault(block, width) for block in sources)), "")
    if why_not and lst_init == "pruned":
        raise InputError(f"lst_init 'pruned' is impossible: {why_not}; choose 'random'.")
    pruned = lst_init != "random" and not why_not
    with torch.device(next(model.parameters()).device):
        side = Ladder(taps.widths, width, sources if pruned else None)
    if four_bit_backbone:
        to_four_bits(model)
    return SideModel(model, survey, taps, side)


class Ladder(nn.Module):
    """Features of `widths`, (B, N, C_i), the final ones last -> (B, N, C).

    `sources`: blocks to prune from.
    """

    def __init__(self, widths: tuple[int, ...], width: int, sources: list[nn.Module] | None):
        super().__init__()
        *read, final = widths
        self.start = "random" if sources is None else "pruned"
        heads = [_heads(width)] * len(read) if sources is None else [s.attn.num_heads for s in sources]
        self.rungs = nn.ModuleList(
            Rung(each, width, count, first=i == 0) for i, (each, count) in enumerate(zip(read, heads))
        )
        self.up = silent(nn.Linear(width, final))
        if sources is not None:
            with torch.no_grad():
                _prune(sources, self.rungs, width)

    def forward(self, unread: list[torch.Tensor]) -> torch.Tensor:
        h = None
        for rung in self.rungs:
            h = rung(unread.pop(0), h)
        return unread.pop() + self.up(h)

    def extra_repr(self) -> str:
        return f"start={self.start}"


class Rung(nn.Module):
    """B(s h + (1 - s) D b) for features b (B, N, C_b) and h (B, N, C), or B(D b) for the first."""

    def __init__(self, width_in: int, width: int, heads: int, first: bool):
        from timm.models.vision_transformer import Block  # an experiment is checked without timm

        super().__init__()
        self.down = nn.Linear(width_in, width)
        if not first:
            self.gate = nn.Parameter(torch.zeros(1))
        self.block = Block(width, heads, mlp_ratio=_MLP_RATIO, qkv_bias=True)

    def forward(self, b: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        x = self.down(b)
        if h is not None:
            x = torch.lerp(x, h.to(x.dtype), torch.sigmoid(self.gate / TEMPERATURE).to(x.dtype))
        return self.block(x)


def _heads(width: int) -> int:
    """The most heads of at least `HEAD_WIDTH` channels that `width` channels can be divided into."""
    return max((n for n in range(1, width + 1) if width % n == 0 and width // n >= HEAD_WIDTH), default=1)


def _fault(block: nn.Module, width: int) -> str:
    """Why a block of `width` channels cannot be pruned from `block`; "" if it can."""
    from timm.layers import Mlp
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.vision_transformer import Block

    kind = type(block).__name__
    if type(block) not in (Block, SwinTransformerBlock):
        return f"{kind} is no transformer block of attention and MLP as in timm's ViT and Swin"
    attention, mlp = block.attn, block.mlp
    parts = (attention.qkv, attention.proj, getattr(mlp, "fc1", None), getattr(mlp, "fc2", None))
    if type(mlp) is not Mlp or any(type(part) is not nn.Linear for part in parts):
        return f"{kind} has other parts than plain linear layers"
    norms = (block.norm1, block.norm2)
    if type(mlp.act) is not nn.GELU or any(not isinstance(norm, nn.LayerNorm) for norm in norms):
        return f"{kind} has another activation than GELU, or other norms than layer norms"
    between = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    if any(not isinstance(part, nn.Identity | None) for part in between):
        return f"{kind} has norms or gates inside its attention"
    inner, source = attention.proj.in_features, attention.proj.out_features
    heads = attention.num_heads
    if source < width or inner < width or width % heads or mlp.fc1.out_features < _MLP_RATIO * width:
        return f"{kind} of {source} channels in {heads} heads has no {width} channels in as many heads"
    return ""


def _prune(sources: list[nn.Module], rungs: nn.ModuleList, width: int) -> None:
    """Fill `rungs` from blocks: of the residual stream the same channels in all blocks of a width."""
    totals: dict[int, torch.Tensor] = {}
    for block in sources:
        weight = _stream_magnitudes(block)
        totals[len(weight)] = totals.get(len(weight), 0) + weight
    for block, rung in zip(sources, rungs):
        size = block.attn.proj.out_features
        _prune_block(block, rung.block, _largest(totals[size], width))
        nn.init.zeros_(rung.down.bias)
        nn.init.zeros_(rung.down.weight)
        rung.down.weight[torch.arange(width), _largest(totals[size], width)] = 1


def _prune_block(source: nn.Module, target: nn.Module, stream: torch.Tensor) -> None:
    """Give `target` the channels `stream` of `source`, and inside, the largest."""
    width, heads = len(stream), source.attn.num_heads
    qkv, proj = source.attn.qkv, source.attn.proj
    fc1, fc2 = source.mlp.fc1, source.mlp.fc2
    # Queries, keys and values of a head keep the same places, and each head as many.
    by_place = qkv.weight.unflatten(0, (3, -1)).square().sum((0, 2)) + proj.weight.square().sum(0)
    head_width = by_place.numel() // heads
    places = [
        head * head_width + _largest(by_place[head * head_width : (head + 1) * head_width], width // heads)
        for head in range(heads)
    ]
    inner = torch.cat(places)
    every = torch.cat([inner + part * by_place.numel() for part in range(3)])
    hidden = _largest(fc1.weight.square().sum(1) + fc2.weight.square().sum(0), target.mlp.fc1.out_features)
    for norm, theirs in ((target.norm1, source.norm1), (target.norm2, source.norm2)):
        norm.eps = theirs.eps
        norm.weight.copy_(theirs.weight[stream])
        norm.bias.copy_(theirs.bias[stream])
    _copy_linear(qkv, target.attn.qkv, every, stream)
    _copy_linear(proj, target.attn.proj, stream, inner, getattr(source, "ls1", None))
    _copy_linear(fc1, target.mlp.fc1, hidden, stream)
    _copy_linear(fc2, target.mlp.fc2, stream, hidden, getattr(source, "ls2", None))


def _copy_linear(
    source: nn.Linear,
    target: nn.Linear,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: nn.Module | None = None,
) -> None:
    gamma = getattr(scale, "gamma", torch.ones_like(source.weight[:, 0]))  # of a layer scale
    target.weight.copy_((source.weight * gamma[:, None])[rows][:, columns])
    if source.bias is None:
        nn.init.zeros_(target.bias)
    else:
        target.bias.copy_((source.bias * gamma)[rows])


def _stream_magnitudes(block: nn.Module) -> torch.Tensor:
    """Sum of squared weights that read or write each channel of the residual stream, (C,)."""
    reads = block.attn.qkv.weight.square().sum(0) + block.mlp.fc1.weight.square().sum(0)
    return reads + block.attn.proj.weight.square().sum(1) + block.mlp.fc2.weight.square().sum(1)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` largest values, in ascending order."""
    return values.topk(count).indices.sort().values
