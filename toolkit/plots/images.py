"""Figures that show images: predictions next to the truth, examples of a data set, confusion matrices."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from toolkit.backbones import data_config
from toolkit.datasets import Splits, loader
from toolkit.datasets.pictures import decode
from toolkit.datasets.splits import labels_of
from toolkit.datasets.tasks import IGNORED
from toolkit.plots.style import note, plain, styled
from toolkit.training.evaluation import Evaluation

LEAST_SCORE = 0.5  # predicted boxes below it are not drawn
MOST_NAMED = 24  # classes in a legend
OPACITY = 0.65  # of a class's colour over the image


def test_pictures(evaluation: Evaluation, model: nn.Module, splits: Splits) -> Figure:
    """What a test looks like: the confusion matrix of a classifier, predictions of a dense model."""
    if splits.task == "classification":
        return confusion_matrix(evaluation, splits.classes)
    return test_examples(model, splits)


@torch.no_grad()
def test_examples(model: nn.Module, splits: Splits, count: int = 4) -> Figure:
    """The first `count` test images with their truth and the prediction of `model`."""
    config = data_config(model)
    images, targets = next(iter(loader(splits.test, config, splits.policy, batch_size=count, workers=0)))
    model.eval()
    outputs = model(images.to(next(model.parameters()).device))
    mean, std = (torch.tensor(config[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    pictures = (images * std + mean).clamp(0, 1)
    if splits.task == "segmentation":
        return dense_grid(pictures, targets, splits.classes, outputs.argmax(1).cpu())
    found = [{name: values.cpu() for name, values in output.items()} for output in outputs]
    return dense_grid(pictures, [_true_boxes(boxes) for boxes in targets["boxes"]], splits.classes, found)


def examples(splits: Splits, count: int = 4) -> Figure:
    """The first training images of a data set with their truth; of a classification set, of each class."""
    if splits.task == "classification":
        return class_examples(splits, count)
    rows = [splits.train[row] for row in range(count)]
    images = torch.stack([image for image, _ in rows]) / 255
    targets = [target for _, target in rows]
    if splits.task == "detection":
        targets = [_true_boxes(target["boxes"]) for target in targets]
    return dense_grid(images, targets, splits.classes)


@styled
def class_examples(splits: Splits, count: int = 4, most: int = 8) -> Figure:
    """The first `count` training images of up to `most` classes, spread over all of them; one class a row."""
    labels = labels_of(splits.train)
    classes = np.unique(labels)
    shown = classes[np.linspace(0, len(classes) - 1, min(most, len(classes))).astype(int)]
    size = (1.5 * count + 1, 1.5 * len(shown))
    figure, rows = plt.subplots(len(shown), count, figsize=size, layout="constrained", squeeze=False)
    for label, panels in zip(shown, rows):
        panels[0].set_ylabel(plain(splits.classes[label]), rotation=0, ha="right", va="center")
        for panel in panels:
            panel.set(xticks=[], yticks=[], frame_on=False)
        for panel, row in zip(panels, np.flatnonzero(labels == label)):
            image = splits.train[row][0]
            step = max(1, max(image.shape) // 256)  # whole photos would take the figure gigabytes
            panel.imshow(image[:, ::step, ::step].permute(1, 2, 0))
    return figure


def _true_boxes(boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes (M, 5) of a data set, whose last column is the class or -1, in the form of predictions."""
    boxes = boxes[boxes[:, 4] >= 0]
    return {"boxes": boxes[:, :4], "labels": boxes[:, 4].int()}


@styled
def dense_grid(
    images: torch.Tensor,  # float (B, 3, H, W), 0 to 1
    targets: Sequence,  # per image: classes, int (H, W), or a dict of boxes (n, 4) and labels (n,)
    classes: Sequence[str],
    predictions: Sequence | None = None,  # the same; boxes also have scores (n,)
) -> Figure:
    """Image, truth and, if there is one, prediction side by side, one image a row.

    Ignored pixels are white.  Predicted boxes are drawn from a score of one half.
    """
    titles = ("image", "truth") if predictions is None else ("image", "truth", "prediction")
    size = (2.85 * len(titles), 2.3 * len(images) + 0.5)
    figure, rows = plt.subplots(len(images), len(titles), figsize=size, layout="constrained", squeeze=False)
    shown = _labels_in([*targets, *(() if predictions is None else predictions)])
    few = sns.color_palette("tab10")  # a class has the same colour in all figures, if there are few
    colours = (
        {n: few[n] for n in shown} if len(classes) <= 10 else dict(zip(shown, sns.husl_palette(len(shown))))
    )
    for row, panels in enumerate(rows):
        image = images[row].permute(1, 2, 0).numpy()
        for panel in panels:
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            panel.imshow(image)
        found = [targets[row]] if predictions is None else [targets[row], predictions[row]]
        for title, panel, one in zip(titles[1:], panels[1:], found):
            if isinstance(one, dict):
                _draw_boxes(panel, one, classes, colours)
                continue
            known = targets[row] != IGNORED
            _draw_mask(panel, image, one.where(known, IGNORED), colours)
            if title == "prediction" and known.any():
                right = 100 * (one == targets[row])[known].float().mean()
                panel.set_xlabel(f"{right:.0f} % right", fontsize=9)
    for panel, title in zip(rows[0], titles):
        panel.set_title(title)
    handles = [Patch(color=colour, label=plain(classes[label])) for label, colour in colours.items()]
    if len(handles) > MOST_NAMED:
        more = Patch(facecolor="none", label=f"and {len(handles) - MOST_NAMED} more")
        handles = [*handles[:MOST_NAMED], more]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
    return figure


def _labels_in(found: Sequence) -> list[int]:
    """All classes in masks or boxes, sorted."""
    labels = [one["labels"] if isinstance(one, dict) else one for one in found]
    return sorted({int(label) for one in labels for label in one.unique()} - {IGNORED})


def _draw_mask(panel: Axes, image: np.ndarray, mask: torch.Tensor, colours: dict[int, tuple]) -> None:
    """Paint each pixel of `image` (H, W, 3) in the colour of its class; ignored ones are white."""
    table = np.ones((256, 3))
    for label, colour in colours.items():
        table[label] = colour
    panel.imshow((1 - OPACITY) * image + OPACITY * table[mask.numpy()])


def _draw_boxes(panel: Axes, found: dict, classes: Sequence[str], colours: dict[int, tuple]) -> None:
    scores = found["scores"] if "scores" in found else torch.ones(len(found["boxes"]))
    for place in scores.argsort().tolist():  # the most certain last, on top
        score = float(scores[place])
        if score < LEAST_SCORE:
            continue
        label = int(found["labels"][place])
        x1, y1, x2, y2 = found["boxes"][place].tolist()
        # Pixel centres are at whole numbers: the image's edge is at -0.5.
        box = Rectangle(
            (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colours[label], linewidth=2
        )
        panel.add_patch(box)
        text = plain(classes[label]) + (f" {score:.2f}" if "scores" in found else "")
        frame = {"facecolor": colours[label], "edgecolor": "none", "pad": 1}
        panel.text(max(x1, 0) - 0.5, y1 - 0.5, text, fontsize=7, color="white", va="bottom", bbox=frame)
    left_out = int((scores < LEAST_SCORE).sum())
    panel.set_xlabel(f"{left_out} more below {LEAST_SCORE}" if left_out else "", fontsize=9)


@styled
def gallery(images: Sequence[torch.Tensor], titles: Sequence[str], columns: int = 4) -> Figure:
    """`images`, each (3, H, W), under their titles; the unused places stay empty."""
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(2 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, image, title in zip(axes.flat, images, titles):
        step = max(1, max(image.shape) // 256)  # whole photos would take the figure gigabytes
        panel.imshow(image[:, ::step, ::step].permute(1, 2, 0))
        panel.set_title(plain(textwrap.fill(title, 20)), fontsize=9)
    return figure


def mistakes(evaluation: Evaluation, splits: Splits, count: int = 8) -> Figure:
    """The wrong answers of a test that the classifier was most certain of, the most certain first."""
    wrong = torch.nonzero(evaluation.predictions != evaluation.labels).flatten()
    worst = wrong[evaluation.confidences[wrong].argsort(descending=True)][:count].tolist()
    titles = []
    for row in worst:
        true, found = (splits.classes[int(each[row])] for each in (evaluation.labels, evaluation.predictions))
        titles.append(f"{true}, not {found} ({100 * evaluation.confidences[row]:.0f} %)")
    return gallery([splits.test[row][0] for row in worst], titles) if worst else note("no mistake")


def predicted(table: pd.DataFrame, count: int = 8) -> Figure:
    """The first pictures of a table of `Predictor.predict`, made of files, with class and probability."""
    shown = table.dropna(subset="class").head(count)
    titles = [f"{row['class']} ({100 * row.probability:.0f} %)" for _, row in shown.iterrows()]
    return gallery([pil_to_tensor(decode(Path(file))) for file in shown.image], titles)


@styled
def confusion_matrix(evaluation: Evaluation, classes: list[str]) -> Figure:
    """True against predicted class on the evaluated split; rows sum to 1, less answers that name no class."""
    count = len(classes)
    side = min(max(5, 0.35 * count), 14)
    figure, axes = plt.subplots(figsize=(side + 1.5, side), layout="constrained")
    fontsize = min(10, 58 * side / count)  # 72 points are an inch: names do not touch
    pairs = pd.crosstab(evaluation.labels.numpy(), evaluation.predictions.numpy(), normalize="index")
    names = [plain(textwrap.shorten(name, 24, placeholder="…")) for name in classes]
    sns.heatmap(
        pairs.reindex(index=range(len(classes)), columns=range(len(classes)), fill_value=0.0),
        vmin=0, vmax=1, cmap="Blues", square=True, annot=count <= 10, fmt=".2f",
        annot_kws={"fontsize": 8}, xticklabels=names, yticklabels=names, ax=axes, cbar_kws={"shrink": 0.7},
    )  # fmt: skip
    axes.tick_params(labelsize=fontsize)
    axes.tick_params(axis="x", rotation=90 if max(map(len, names)) * count > 40 else 0)
    axes.tick_params(axis="y", rotation=0)
    axes.set(xlabel="predicted", ylabel="true")
    return figure
