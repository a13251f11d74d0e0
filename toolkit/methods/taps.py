"""The features of a frozen backbone that side networks read, and their form.

A tap is the output of one of the backbone's repeated blocks (`budget.find_blocks`), taken by a hook while
`forward_features` runs.  The backbone's layout may be tokens (B, N, C), maps (B, C, H, W) as in CNNs, or
(B, H, W, C) as in Swin; side networks see tokens (B, N, C) at the positions of the final features, which the
head reads.  Maps of earlier stages are averaged over cells of positions, without parameters and on the frozen
side, so that little is held and stored.  Matching widths is left to the side network.  (The papers, arXiv
2206.06522 and 2402.02887, are about transformers with one width and one number of tokens; how to read a
hierarchical backbone is our choice.)

timm's `forward_intermediates` does not return these features: of a hierarchy it returns one map per stage
(ResNet-18: 5 maps for 8 blocks, Swin-T: 4 for 12), and of a vision transformer maps without the class token,
which LoSA mixes and LST reads.

Layouts are found once, from a run on fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.backbones import data_config
from toolkit.budget import find_blocks
from toolkit.budget.fakes import on_fake_tensors
from toolkit.errors import InputError

TOKENS, CHANNELS_FIRST, CHANNELS_LAST = "tokens", "channels first", "channels last"
_INSTEAD = "choose method 'linear' or 'lora'."


@dataclass(frozen=True)
class Form:
    """The form of features: their layout, positions (N,) or (H, W), and width C."""

    layout: str
    positions: tuple[int, ...]
    width: int

    def tokens_of(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) of features in this form; a view where that is possible."""
        if self.layout == TOKENS:
            return x
        return x.flatten(2).transpose(1, 2) if self.layout == CHANNELS_FIRST else x.flatten(1, 2)

    def map_of(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) of features in this form, which has two positions; also of tokens, row by row."""
        if self.layout == CHANNELS_FIRST:
            return x
        return (x.unflatten(1, self.positions) if x.dim() == 3 else x).movedim(-1, 1)


@dataclass(frozen=True)
class Tap:
    """The output of the block `name`, in `form`."""

    name: str
    form: Form


@dataclass(frozen=True)
class Taps:
    """The tapped blocks of a backbone in the order in which they run, and its final features."""

    taps: tuple[Tap, ...]
    final: Form
    memory_format: torch.memory_format  # of the final features

    @property
    def positions(self) -> int:
        """Positions N of all that `collect` returns."""
        return math.prod(self.final.positions)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths C_i of what `collect` returns, the final features last."""
        return (*(tap.form.width for tap in self.taps), self.final.width)

    def collect(self, backbone: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The taps' features (B, N, C_i), and the final ones (B, N, C) last, of `images` (B, 3, H, W)."""
        found: dict[str, torch.Tensor] = {}

        def take(tap: Tap, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            found[tap.name] = self._brought_to_final(tap, output)

        with hooked(backbone, {tap.name: partial(take, tap) for tap in self.taps}):
            final = self.final.tokens_of(backbone.forward_features(images))
        if final.shape[1:] != (self.positions, self.final.width):
            raise InputError(
                f"features of {tuple(final.shape[1:])} (positions, width), and the side network was made for "
                f"({self.positions}, {self.final.width}): use images of that size."
            )
        return *(found.pop(tap.name) for tap in self.taps), final

    def for_head(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (B, N, C) in the layout and memory format of the backbone's own, so that sums over them
        round alike."""
        if self.final.layout == TOKENS:
            return tokens
        if self.final.layout == CHANNELS_LAST:
            return tokens.unflatten(1, self.final.positions)
        features = tokens.transpose(1, 2).unflatten(2, self.final.positions)
        return features.contiguous(memory_format=self.memory_format)

    def _brought_to_final(self, tap: Tap, output: torch.Tensor) -> torch.Tensor:
        if math.prod(tap.form.positions) == self.positions:
            return tap.form.tokens_of(output)
        pooled = F.adaptive_avg_pool2d(tap.form.map_of(output), self.final.positions)
        return pooled.flatten(2).transpose(1, 2)


@contextmanager
def hooked(
    model: nn.Module, after: dict[str, Callable], before: dict[str, Callable] | None = None
) -> Iterator[None]:
    """Hooks on modules of `model` by name: forward hooks `after` and forward pre-hooks `before`."""
    handles = [model.get_submodule(n).register_forward_hook(hook) for n, hook in after.items()]
    handles += [model.get_submodule(n).register_forward_pre_hook(h) for n, h in (before or {}).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seen:
    """Shapes that a block read and returned in one run."""

    name: str
    read: torch.Size
    returned: torch.Size


@dataclass(frozen=True)
class Survey:
    """A run of a model's features on fake tensors."""

    image: tuple[int, int]  # height and width in pixels
    blocks: tuple[Seen, ...]  # in the order in which they ran
    final: torch.Size
    memory_format: torch.memory_format
    head: tuple[str, ...]  # children that `forward_head` calls

    @classmethod
    def of(cls, model: nn.Module, image: tuple[int, int] | None = None) -> Survey:
        """Run `model` on two images of its own size, or of `image` (height, width).

        Raises `InputError` for a model without `forward_features` and `forward_head`, or without blocks
        that can be tapped.
        """
        for part in ("forward_features", "forward_head"):
            if not hasattr(model, part):
                raise InputError(f"{type(model).__name__} has no {part}(), as timm's models have; {_INSTEAD}")
        try:
            blocks = find_blocks(model)
        except InputError as error:
            raise InputError(
                f"{type(model).__name__} is a backbone without taps: nothing in it repeats, so a side "
                f"network has no blocks to read; {_INSTEAD}"
            ) from error
        channels, *own_image = data_config(model)["input_size"]
        image = image or tuple(own_image)
        ran: dict[str, tuple[Seen, torch.Tensor, int]] = {}  # with the output and its version
        head: dict[str, None] = {}

        def note(name: str, module: nn.Module, args: tuple, output: object) -> None:
            if name in ran:
                raise InputError(f"{name} runs twice for an image, so it cannot be tapped; {_INSTEAD}")
            if not (args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor)):
                raise InputError(
                    f"{name} does not map a tensor to a tensor, so it cannot be tapped; {_INSTEAD}"
                )
            ran[name] = Seen(name, args[0].shape, output.shape), output, output._version

        with on_fake_tensors(model, torch.zeros(2, channels, *image)) as images, torch.no_grad():
            model.eval()
            with hooked(model, {name: partial(note, name) for name in blocks}):
                final = model.forward_features(images)
            if not isinstance(final, torch.Tensor):
                raise InputError(
                    f"the features of {type(model).__name__} are a {type(final).__name__}, not one tensor, "
                    f"so no side network can refine them; {_INSTEAD}"
                )
            inside = [name for name, _ in model.named_modules() if name]
            with hooked(model, {n: lambda *_, n=n: head.update({n.split(".")[0]: None}) for n in inside}):
                model.forward_head(final)
        for name, (_, output, version) in ran.items():
            if output._version != version:
                raise InputError(f"the output of {name} changes in place, so it cannot be tapped; {_INSTEAD}")
        last = final.dim() == 4 and final.is_contiguous(memory_format=torch.channels_last)
        return cls(
            image,
            tuple(seen for seen, *_ in ran.values()),
            final.shape,
            torch.channels_last if last and not final.is_contiguous() else torch.contiguous_format,
            tuple(head),
        )

    def layout(self, shape: torch.Size) -> str | None:
        """Layout of features of this `shape`; None if that is ambiguous."""
        if len(shape) == 3:
            return TOKENS
        if len(shape) != 4:
            return None
        _, a, b, c = shape
        height, width = self.image
        first, last = b * width == c * height, a * width == b * height
        if first == last:
            return None
        return CHANNELS_FIRST if first else CHANNELS_LAST


def forms_of(model: nn.Module, survey: Survey) -> tuple[list[Form], Form]:
    """The forms of the blocks' outputs, in the order of the run, and of the final features.

    An axis that grows with the image is a position, the other one the width.  Where a map has as many
    channels as rows and columns, images of twice the height decide.  Raises `InputError` where a layout stays
    ambiguous.
    """
    shapes = {"the final features": survey.final, **{seen.name: seen.returned for seen in survey.blocks}}
    layouts = {name: survey.layout(shape) for name, shape in shapes.items()}
    unclear = [name for name, layout in layouts.items() if layout is None]
    if unclear:
        height, width = survey.image
        try:
            taller = Survey.of(model, (2 * height, width))
        except (AssertionError, RuntimeError, ValueError):
            taller = survey  # the model takes images of one size only
        grown = {"the final features": taller.final, **{s.name: s.returned for s in taller.blocks}}
        for name in unclear:
            shape, other = shapes[name], grown[name]
            rows = [axis for axis in range(1, len(shape)) if len(shape) == 4 and shape[axis] != other[axis]]
            if rows not in ([1], [2]):
                raise InputError(
                    f"the layout of {name} of {type(model).__name__}, {tuple(shape)}, is ambiguous: tokens, "
                    "channels first or channels last; choose another image size, or method 'lora'."
                )
            layouts[name] = CHANNELS_LAST if rows == [1] else CHANNELS_FIRST
    forms = {name: _form(layouts[name], shape) for name, shape in shapes.items()}
    return [forms[seen.name] for seen in survey.blocks], forms["the final features"]


def _form(layout: str, shape: torch.Size) -> Form:
    if layout == CHANNELS_FIRST:
        return Form(layout, tuple(shape[2:]), shape[1])
    return Form(layout, tuple(shape[1:-1]), shape[-1])


def taps_of(model: nn.Module, survey: Survey, count: int = 0) -> Taps:
    """`count` blocks of `model`, spread evenly, the last included; 0: all.

    Raises `InputError` for a count above the number of blocks and for feature shapes that do not chain.
    """
    forms, final = forms_of(model, survey)
    total = len(survey.blocks)
    if not 0 <= count <= total:
        raise InputError(
            f"taps is {count}, and {type(model).__name__} has {total} blocks that run: choose 0 (all) "
            f"to {total}."
        )
    count = count or total
    chosen = [round((i + 1) * total / count) - 1 for i in range(count)]
    taps = (Tap(survey.blocks[i].name, _chained(survey, survey.blocks[i], forms[i], final)) for i in chosen)
    return Taps(tuple(taps), final, survey.memory_format)


def _chained(survey: Survey, seen: Seen, form: Form, final: Form) -> Form:
    """The form of a block's output: tokens that have to be averaged to the final positions as a map."""
    if seen.returned[0] != survey.final[0]:
        raise InputError(
            f"feature shapes that do not chain: {seen.name} computes on windows, {seen.returned[0]} for "
            f"{survey.final[0]} images; choose an image size at which a window is the whole map, or method "
            "'lora'."
        )
    if math.prod(form.positions) == math.prod(final.positions):
        return form
    if form.layout == TOKENS and len(final.positions) == 2:  # of a map, row by row
        height, width = survey.image
        rows = math.isqrt(form.positions[0] * height // width)
        if rows and form.positions[0] % rows == 0 and rows * rows * width == form.positions[0] * height:
            form = Form(CHANNELS_LAST, (rows, form.positions[0] // rows), form.width)
    if len(form.positions) == len(final.positions) == 2 and all(
        mine >= theirs for mine, theirs in zip(form.positions, final.positions)
    ):
        return form
    raise InputError(
        f"feature shapes that do not chain: {seen.name} returns positions {form.positions}, which cannot be "
        f"averaged to the final features' {final.positions}; choose another backbone, or method 'lora'."
    )
