"""Images with truth and prediction: colours, boxes and legends are those of the data."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

import toolkit
from toolkit import plots
from toolkit.plots.images import OPACITY, dense_grid

CLASSES = ["brick", "a $x_1$ thing", "moon"]
IMAGES = torch.full((2, 3, 8, 8), 0.5)


def texts(figure) -> list[str]:
    figure.canvas.draw()  # what cannot be drawn raises here
    found = [text.get_text() for axes in figure.axes for text in [axes.title, axes.xaxis.label, *axes.texts]]
    return [text for text in found if text]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def shown(axes) -> np.ndarray:
    return np.asarray(axes.get_images()[-1].get_array())


def test_segmentation_shows_truth_and_prediction_in_the_colours_of_the_legend():
    targets = torch.zeros(2, 8, 8, dtype=torch.long)
    targets[0, :, 4:], targets[1] = 1, 255
    predicted = torch.zeros(2, 8, 8, dtype=torch.long)
    predicted[:, :, :2], predicted[:, :, 4:] = 2, 1  # wrong in two of eight columns
    figure = dense_grid(IMAGES, targets, CLASSES, predicted)
    assert texts(figure) == ["image", "truth", "prediction", "75 % right"]
    assert legend(figure) == ["brick", r"a \$x_1\$ thing", "moon"]
    axes = np.array(figure.axes).reshape(2, 3)
    colours = [np.array(patch.get_facecolor()[:3]) for patch in figure.legends[0].get_patches()]
    truth, prediction = (shown(panel) for panel in axes[0, 1:])
    for mask, column, label in ((truth, 0, 0), (truth, 7, 1), (prediction, 0, 2), (prediction, 3, 0)):
        assert np.allclose(mask[0, column], (1 - OPACITY) * 0.5 + OPACITY * colours[label])
    assert np.allclose(shown(axes[1, 2]), (1 - OPACITY) * 0.5 + OPACITY), "ignored pixels are white"


def test_detection_draws_true_boxes_and_confident_ones():
    true = {"boxes": torch.tensor([[1.0, 2, 5, 7]]), "labels": torch.tensor([1])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    found = {
        "boxes": torch.tensor([[1.0, 1, 5, 7], [0, 0, 8, 8]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.87, 0.2]),
    }
    figure = dense_grid(IMAGES, [true, none], CLASSES, [found, none | {"scores": torch.zeros(0)}])
    name = r"a \$x_1\$ thing"
    assert texts(figure) == ["image", "truth", name, "prediction", "1 more below 0.5", f"{name} 0.87"]
    drawn = [
        [patch.get_bbox().extents.tolist() for patch in axes.patches if isinstance(patch, Rectangle)]
        for axes in figure.axes
    ]
    assert drawn == [[], [[0.5, 1.5, 4.5, 6.5]], [[0.5, 0.5, 4.5, 6.5]], [], [], []]


@pytest.mark.parametrize("count", [3, 6, 10, 100])
def test_names_along_a_confusion_matrix_do_not_touch(count):
    labels = torch.arange(count)
    outcome = SimpleNamespace(labels=labels, predictions=labels)
    figure = plots.confusion_matrix(outcome, [f"a long class name {n}" for n in range(count)])
    figure.canvas.draw()
    axes = figure.axes[0]
    for names in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [name.get_window_extent() for name in names]
        assert len(boxes) == count and not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_a_legend_of_many_classes_is_cut():
    targets = torch.arange(64).reshape(1, 8, 8).repeat(2, 1, 1)
    figure = dense_grid(IMAGES, targets, [f"class {n}" for n in range(64)], targets)
    assert legend(figure)[-1] == "and 40 more" and len(legend(figure)) == 25


@pytest.mark.parametrize("dataset", ["mosaics", "digit_scenes"])
def test_examples_show_images_and_their_truth(dataset):
    splits = toolkit.load_dataset(dataset)
    figure = plots.examples(splits, 2)
    figure.canvas.draw()
    assert len(figure.axes) == 4
    expected = splits.train[0][0].permute(1, 2, 0).numpy() / 255
    assert np.allclose(figure.axes[0].images[0].get_array(), expected)
    assert figure.axes[1].patches or not np.allclose(shown(figure.axes[1]), expected)
    seen = set()
    for row in range(2):
        target = splits.train[row][1]
        seen |= set((target if dataset == "mosaics" else target["boxes"][:, 4]).int().unique().tolist())
    assert set(legend(figure)) == {splits.classes[label] for label in seen}


def test_examples_of_a_classification_set_are_a_row_for_each_class():
    digits = toolkit.load_dataset("digits")
    figure = plots.examples(digits, 3)
    figure.canvas.draw()
    names = [axes.get_ylabel() for axes in figure.axes[::3]]
    assert len(names) == 8 and names[0] == digits.classes[0] and names[-1] == digits.classes[-1]
    last = [row for row in range(len(digits.train)) if digits.train[row][1] == 9][:3]
    for axes, row in zip(figure.axes[-3:], last):
        assert np.array_equal(shown(axes), digits.train[row][0].permute(1, 2, 0))


def test_mistakes_are_the_most_certain_wrong_answers(few_digits):
    labels = torch.from_numpy(few_digits.test.labels)
    predictions = labels.clone()
    predictions[[3, 5]] = (labels[[3, 5]] + 1) % 10
    confidences = torch.full((len(labels),), 0.99)
    confidences[[3, 5]] = torch.tensor([0.6, 0.9])
    outcome = SimpleNamespace(predictions=predictions, labels=labels, confidences=confidences)
    figure = plots.mistakes(outcome, few_digits)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        f"{labels[row]}, not {predictions[row]} ({share} %)" for row, share in ((5, 90), (3, 60))
    ]
