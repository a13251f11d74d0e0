import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from toolkit.plots.images import OPACITY, detection_grid, pictures, segmentation_grid

CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CLASSES = ["brick", "a $x_1$ thing", "moon"]
IMAGES = torch.zeros(2, 3, 8, 8)  # grey


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def texts(figure) -> list[str]:
    figure.canvas.draw()  # what cannot be drawn raises here
    found = [text.get_text() for axes in figure.axes for text in [axes.title, axes.xaxis.label, *axes.texts]]
    return [text for text in found if text]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def shown(axes) -> np.ndarray:
    return np.asarray(axes.get_images()[0].get_array())


def test_pictures_undo_the_normalisation():
    images = torch.tensor([-2.0, 0.0, 1.0, 9.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert pictures(images, CONFIG)[0, :, :, 0].tolist() == [[0, 0.5], [0.75, 1]]


def test_segmentation_shows_truth_and_prediction_in_the_colours_of_the_legend():
    targets = torch.zeros(2, 8, 8, dtype=torch.long)
    targets[0, :, 4:], targets[1] = 1, 255
    logits = torch.zeros(2, 3, 8, 8)
    logits[:, 2, :, :2] = 1  # wrong in two of eight columns
    logits[:, 1, :, 4:] = 1
    figure = segmentation_grid(IMAGES, targets, logits, CLASSES, CONFIG)
    assert texts(figure) == ["picture", "truth", "prediction", "75 % right", "nothing to score"]
    assert legend(figure) == ["brick", r"a \$x_1\$ thing", "moon", "ignored"]
    axes = np.array(figure.axes).reshape(2, 3)
    colours = [np.array(patch.get_facecolor()[:3]) for patch in figure.legends[0].get_patches()]
    truth, predicted = (shown(panel) for panel in axes[0, 1:])
    for mask, column, label in ((truth, 0, 0), (truth, 7, 1), (predicted, 0, 2), (predicted, 3, 0)):
        assert np.allclose(mask[0, column], (1 - OPACITY) * 0.5 + OPACITY * colours[label])
    assert np.allclose(shown(axes[1, 1]), shown(axes[1, 2])), "what is ignored is not judged"
    assert np.allclose(shown(axes[1, 1]), (1 - OPACITY) * 0.5 + OPACITY)


def test_detection_draws_true_boxes_and_confident_ones():
    targets = {"boxes": torch.tensor([[[1.0, 2, 5, 7, 1], [0, 0, 0, 0, -1]], [[0.0, 0, 0, 0, -1]] * 2])}
    sure = {
        "boxes": torch.tensor([[1.0, 1, 5, 7], [0, 0, 8, 8]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.87, 0.2]),
    }
    none = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)
    }  # fmt: skip
    figure = detection_grid(IMAGES, targets, [sure, none], CLASSES, CONFIG)
    assert texts(figure) == [
        "picture", "truth", r"a \$x_1\$ thing", "prediction", "1 more below 0.5", r"a \$x_1\$ thing 0.87",
    ]  # fmt: skip
    assert legend(figure) == [r"a \$x_1\$ thing"]
    drawn = [
        [patch.get_bbox().extents.tolist() for patch in axes.patches if isinstance(patch, Rectangle)]
        for axes in figure.axes
    ]
    assert drawn == [[], [[0.5, 1.5, 4.5, 6.5]], [[0.5, 0.5, 4.5, 6.5]], [], [], []]


def test_a_legend_of_many_classes_is_cut():
    targets = torch.arange(64).reshape(1, 8, 8).repeat(2, 1, 1)
    figure = segmentation_grid(IMAGES, targets, targets, [f"class {n}" for n in range(64)], CONFIG)
    assert legend(figure)[-1] == "and 40 more" and len(legend(figure)) == 25
