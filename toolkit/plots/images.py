"""Figures of dense predictions: picture, truth and prediction side by side, one image a row."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from toolkit.backbones import data_config
from toolkit.datasets import Splits, loader
from toolkit.datasets.tasks import IGNORED
from toolkit.plots.text import plain

COLUMNS = ("picture", "truth", "prediction")
IGNORED_COLOUR = (1.0, 1.0, 1.0)
LEAST_SCORE = 0.5  # of a predicted box that is drawn
MOST_NAMED = 24  # classes in a legend
OPACITY = 0.65  # of a class's colour over the picture


@torch.no_grad()
def test_examples(model: nn.Module, splits: Splits, count: int = 4) -> Figure:
    """The first `count` test images with their truth and what `model` says of them."""
    config = data_config(model)
    images, targets = next(iter(loader(splits.test, config, splits.policy, batch_size=count, workers=0)))
    model.eval()
    outputs = model(images.to(next(model.parameters()).device))
    grid = segmentation_grid if splits.task == "segmentation" else detection_grid
    return grid(images, targets, outputs, splits.classes, config)


def segmentation_grid(
    images: torch.Tensor,
    targets: torch.Tensor,
    predictions: torch.Tensor,
    classes: Sequence[str],
    config: dict,
) -> Figure:
    """Each image, its mask over it, and the predicted mask with its share of right pixels.

    `images`: float (B, 3, H, W), normalised as `config` says; `targets`: int (B, H, W), and `predictions`:
    logits (B, K, H, W) or classes (B, H, W).  Ignored pixels are white and count for nothing.
    """
    if predictions.ndim == 4:
        predictions = predictions.argmax(1)
    targets, predictions = targets.cpu().numpy(), predictions.cpu().numpy()
    shown = sorted({*np.unique(targets), *np.unique(predictions)} - {IGNORED})
    colours = _colours(shown, len(classes))
    figure, rows = _rows(len(images))
    for axes, image, target, predicted in zip(rows, pictures(images, config), targets, predictions):
        known = target != IGNORED
        axes[0].imshow(image)
        for panel, mask in zip(axes[1:], (target, np.where(known, predicted, IGNORED))):
            panel.imshow((1 - OPACITY) * image + OPACITY * _painted(mask, colours))
        right = (
            f"{100 * (predicted == target)[known].mean():.0f} % right" if known.any() else "nothing to score"
        )
        axes[2].set_xlabel(right, fontsize=9)
    _legend(figure, colours, classes, IGNORED_COLOUR if (targets == IGNORED).any() else None)
    return figure


def detection_grid(
    images: torch.Tensor,
    targets: dict[str, torch.Tensor],
    predictions: Sequence[dict[str, torch.Tensor]],
    classes: Sequence[str],
    config: dict,
) -> Figure:
    """Each image, its true boxes, and the predicted ones of a score of at least one half.

    `images`: float (B, 3, H, W), normalised as `config` says; `targets`: `"boxes"` (B, M, 5) as `loader`
    gives them; `predictions`: one dict per image, boxes (n, 4), scores (n,) and labels (n,).
    """
    true = [boxes[boxes[:, 4] >= 0] for boxes in targets["boxes"].cpu()]
    found = [_confident(prediction) for prediction in predictions]
    shown = sorted(
        {int(label) for boxes in true for label in boxes[:, 4]} | {int(b[4]) for f in found for b in f}
    )
    colours = _colours(shown, len(classes))
    figure, rows = _rows(len(images))
    for axes, image, truth, boxes, prediction in zip(
        rows, pictures(images, config), true, found, predictions
    ):
        for panel in axes:
            panel.imshow(image)
        for box in truth.tolist():
            _draw_box(axes[1], box, classes, colours)
        for box in boxes:
            _draw_box(axes[2], box, classes, colours)
        left_out = len(prediction["scores"]) - len(boxes)
        axes[2].set_xlabel(f"{left_out} more below {LEAST_SCORE}" if left_out else "", fontsize=9)
    _legend(figure, colours, classes, None)
    return figure


def pictures(images: torch.Tensor, config: dict) -> np.ndarray:
    """Normalised images as float (B, H, W, 3) from 0 to 1."""
    mean, std = (torch.tensor(config[key]).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    return (images.detach().cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _confident(prediction: dict[str, torch.Tensor]) -> list[list[float]]:
    """x1, y1, x2, y2, class and score of the boxes that are drawn, the surest last, on top."""
    columns = (prediction["boxes"], prediction["labels"][:, None], prediction["scores"][:, None])
    boxes = torch.cat([column.detach().cpu().float() for column in columns], dim=1)
    boxes = boxes[boxes[:, 5] >= LEAST_SCORE]
    return boxes[boxes[:, 5].argsort()].tolist()


def _colours(shown: Sequence[int], num_classes: int) -> dict[int, tuple[float, float, float]]:
    """Of each class that is shown: its own, if there are few, so that figures agree."""
    if num_classes <= 10:
        return {label: sns.color_palette("tab10")[label] for label in map(int, shown)}
    return dict(zip(map(int, shown), sns.husl_palette(len(shown))))


def _painted(mask: np.ndarray, colours: dict[int, tuple]) -> np.ndarray:
    """The colour (H, W, 3) of each pixel's class."""
    table = np.ones((256, 3))
    table[IGNORED] = IGNORED_COLOUR
    for label, colour in colours.items():
        table[label] = colour
    return table[mask]


def _rows(count: int) -> tuple[Figure, np.ndarray]:
    figure, rows = plt.subplots(
        count, 3, figsize=(8.5, 2.3 * count + 0.5), layout="constrained", squeeze=False
    )
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes, title in zip(rows[0], COLUMNS):
        axes.set_title(title)
    return figure, rows


def _draw_box(axes: Axes, box: list[float], classes: Sequence[str], colours: dict[int, tuple]) -> None:
    x1, y1, x2, y2, label, *score = box
    colour = colours[int(label)]
    # Pixel centres are at whole numbers: the image's edge is at -0.5.
    axes.add_patch(
        Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2)
    )
    said = " ".join([plain(classes[int(label)]), *(f"{value:.2f}" for value in score)])
    axes.text(
        max(x1, 0) - 0.5, y1 - 0.5, said, fontsize=7, color="white", verticalalignment="bottom",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _legend(figure: Figure, colours: dict[int, tuple], classes: Sequence[str], ignored: tuple | None) -> None:
    handles = [Patch(color=colour, label=plain(classes[label])) for label, colour in colours.items()]
    if len(handles) > MOST_NAMED:
        more = len(handles) - MOST_NAMED
        handles = [*handles[:MOST_NAMED], Patch(facecolor="none", label=f"and {more} more")]
    if ignored is not None:
        handles.append(Patch(facecolor=ignored, edgecolor="grey", label="ignored"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
