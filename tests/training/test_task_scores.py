"""Scores against values worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.datasets.tasks import IGNORED
from toolkit.errors import InputError
from toolkit.training.task_scores import DetectionScore, SegmentationScore


def logits_of(classes: list[list[int]], num_classes: int) -> torch.Tensor:
    """(1, K, h, w) whose greatest is at `classes`."""
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).permute(2, 0, 1)[None].float()


def segmentation(predicted, true, num_classes: int) -> dict:
    score = SegmentationScore(num_classes)
    score.update(logits_of(predicted, num_classes), torch.tensor(true)[None])
    return score.result()["scores"] | {"iou": score.class_iou()}


# --- segmentation ---------------------------------------------------------------------------------


def test_mean_iou_of_four_pixels_and_two_classes():
    """Class 0: one of two pixels found, none too many: 1/2.  Class 1: both found, one too many: 2/3."""
    found = segmentation([[0, 1], [1, 1]], [[0, 0], [1, 1]], 2)
    assert found["iou"] == pytest.approx([50, 200 / 3])
    assert found["miou_pct"] == pytest.approx(175 / 3)
    assert found["pixel_accuracy_pct"] == pytest.approx(75)


def test_absent_classes_are_left_out_of_the_mean_and_wrongly_predicted_ones_are_not():
    found = segmentation([[0, 0], [1, 1]], [[0, 0], [1, 1]], 3)
    assert found["iou"] == [100, 100, None] and found["miou_pct"] == 100
    found = segmentation([[0, 2], [1, 1]], [[0, 0], [1, 1]], 3)
    assert found["iou"] == [50, 100, 0] and found["miou_pct"] == 50


def test_ignored_pixels_are_neither_right_nor_wrong():
    found = segmentation([[0, 1], [1, 0]], [[0, IGNORED], [1, IGNORED]], 2)
    assert found["iou"] == [100, 100] and found["pixel_accuracy_pct"] == 100
    nothing = segmentation([[0, 1]], [[IGNORED, IGNORED]], 2)
    assert nothing == {"miou_pct": None, "pixel_accuracy_pct": None, "iou": [None, None]}


def test_batches_add_up_and_classes_beyond_the_last_are_refused():
    score = SegmentationScore(2)
    score.update(logits_of([[0, 0]], 2), torch.tensor([[[0, 0]]]))
    score.update(logits_of([[0, 0]], 2), torch.tensor([[[1, 1]]]))
    assert score.class_iou() == [50, 0]
    with pytest.raises(InputError, match="masks hold the classes 0 to 7, the model has 2"):
        score.update(logits_of([[0, 0]], 2), torch.tensor([[[0, 7]]]))


@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, IGNORED])), min_size=1, max_size=30
    )
)
def test_mean_iou_by_its_definition(pairs):
    """Pixel by pixel, with sets: of class k the pixels said to be, those that are, and what both share."""
    predicted, true = zip(*pairs)
    known = {i for i, label in enumerate(true) if label != IGNORED}
    ious = []
    for k in range(4):
        said, are = {i for i in known if predicted[i] == k}, {i for i in known if true[i] == k}
        ious.append(100 * len(said & are) / len(said | are) if said | are else None)
    found = segmentation([predicted], [true], 4)
    assert found["iou"] == pytest.approx(ious)
    seen = [iou for iou in ious if iou is not None]
    assert found["miou_pct"] == (pytest.approx(sum(seen) / len(seen)) if seen else None)


# --- detection ------------------------------------------------------------------------------------

BOX, FAR = [8.0, 8, 24, 40], [40.0, 40, 60, 60]
PADDING = [0.0, 0, 0, 0, -1]


def predictions(*found: tuple[list[float], float, int]) -> list[dict]:
    """Predictions for one image: box, score, class."""
    boxes, scores, labels = zip(*found) if found else ((), (), ())
    return [
        {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "scores": torch.tensor(scores),
            "labels": torch.tensor(labels, dtype=torch.long),
        }
    ]


def detection(found: list[dict], *true: list[float]) -> dict:
    score = DetectionScore(3)
    score.update(found, {"boxes": torch.tensor([[*true, PADDING]])})
    return score.result()["scores"]


def test_a_perfect_box_scores_100():
    assert detection(predictions((BOX, 0.9, 2)), [*BOX, 2]) == {
        "map_pct": 100, "map50_pct": 100, "map75_pct": 100,
    }  # fmt: skip


def test_a_box_counts_at_the_iou_thresholds_below_its_own():
    """IoU 0.83: a hit at 0.5, 0.55, ... 0.8, seven of COCO's ten thresholds."""
    found = detection(predictions(([0.0, 0, 83, 100], 0.9, 0)), [0.0, 0, 100, 100, 0])
    assert found["map50_pct"] == found["map75_pct"] == 100
    assert found["map_pct"] == pytest.approx(70)


def test_wrong_classes_and_missing_predictions_score_zero():
    assert detection(predictions((BOX, 0.9, 1)), [*BOX, 2])["map_pct"] == 0
    assert detection(predictions(), [*BOX, 2])["map_pct"] == 0


def test_without_boxes_in_the_truth_there_is_no_score():
    assert set(detection(predictions((BOX, 0.9, 1))).values()) == {None}
    assert set(detection(predictions()).values()) == {None}


def test_precision_and_recall_by_hand():
    """Two true boxes; by score a hit, a miss, a hit: precision 1 up to recall 1/2, then 2/3.

    At COCO's 101 recalls, of which 0, 0.01, ... 0.5 are 51: (51 + 50 * 2/3) / 101.
    """
    found = predictions((BOX, 0.9, 0), ([0.0, 50, 10, 60], 0.8, 0), (FAR, 0.7, 0))
    assert detection(found, [*BOX, 0], [*FAR, 0])["map_pct"] == pytest.approx(100 * (51 + 100 / 3) / 101)


def test_the_mean_is_over_the_classes_that_occur_in_the_truth():
    found = predictions((BOX, 0.9, 0), (FAR, 0.8, 2))
    assert detection(found, [*BOX, 0], [*FAR, 1])["map_pct"] == 50


corner, extent = st.integers(0, 40), st.integers(2, 30)
box = st.tuples(corner, corner, extent, extent, st.integers(0, 2))


@settings(max_examples=25)
@given(
    true=st.lists(box, min_size=1, max_size=4),
    found=st.lists(box, max_size=4),
    factor=st.sampled_from([2, 4]),
)
def test_squeezing_an_image_does_not_change_the_score_of_its_boxes(true, found, factor):
    def score(width: float) -> dict:
        corners = [[width * x, y, width * (x + w), y + h, k] for x, y, w, h, k in true]
        guesses = [
            ([width * x, y, width * (x + w), y + h], 1 - n / 10, k) for n, (x, y, w, h, k) in enumerate(found)
        ]
        return detection(predictions(*guesses), *corners)

    assert score(factor) == pytest.approx(score(1))


def test_masks_are_compared_with_the_instances():
    """The second digit's mask has a hole that the prediction lacks: IoU 13/16, a hit at 0.5 to 0.8."""
    instances = torch.zeros(1, 8, 8, dtype=torch.uint8)
    instances[0, :4, :4], instances[0, 4:, 4:], instances[0, 5, 5:8] = 1, 2, 0
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4, :4], masks[1, 4:, 4:] = True, True
    [found] = predictions(([0.0, 0, 4, 4], 0.9, 0), ([4.0, 4, 8, 8], 0.9, 1))
    targets = {"boxes": torch.tensor([[[0.0, 0, 4, 4, 0], [4, 4, 8, 8, 1]]]), "instances": instances}
    score = DetectionScore(3)
    score.update([found | {"masks": masks}], targets)
    scores = score.result()["scores"]
    assert scores["map_pct"] == 100
    assert scores["mask_map_pct"] == pytest.approx((100 + 70) / 2)
    with pytest.raises(InputError, match="without instances"):
        score.update([found | {"masks": masks}], {"boxes": targets["boxes"]})


def test_boxes_of_a_class_beyond_the_last_are_refused():
    with pytest.raises(InputError, match="boxes hold the class 3, the model has 3"):
        detection(predictions(), [*BOX, 3])
