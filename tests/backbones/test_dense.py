"""Dense models: inputs and outputs of heads, methods on them, and exact plans."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import toolkit
from toolkit.backbones import data_config
from toolkit.backbones.dense import HEADS, build_dense
from toolkit.backbones.dense_heads import _REGION_ANCHORS, _RETINA_ANCHORS
from toolkit.budget import TensorMemory, find_blocks
from toolkit.datasets.tasks import IGNORED, TASKS
from toolkit.errors import InputError
from toolkit.methods import METHODS, adapt, set_train_mode, summarize

CLASSES, PIXELS = 5, 32


def build(head, image_size=PIXELS, task=None):
    toolkit.seed_everything(0)
    task = task or next(name for name, heads in HEADS.items() if head in heads)
    return build_dense("demo_swin", head, CLASSES, False, task, image_size)


def images(count=2, pixels=PIXELS):
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def boxes():
    """Two images: one with two objects and padding between them, one with none."""
    rows = torch.full((2, 3, 5), -1.0)
    rows[0, 0] = torch.tensor([2, 3, 14, 15, 4])
    rows[0, 2] = torch.tensor([16, 10, 30, 28, 0])
    instances = torch.zeros(2, PIXELS, PIXELS, dtype=torch.uint8)
    instances[0, 3:15, 2:14], instances[0, 10:28, 16:30] = 1, 3
    return {"boxes": rows, "instances": instances}


def segmentation_loss(logits, targets):
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def masks(count=2, pixels=PIXELS):
    found = torch.randint(0, CLASSES, (count, pixels, pixels), generator=torch.Generator().manual_seed(2))
    found[:, :3] = IGNORED
    return found


def test_heads_are_those_of_the_tasks():
    assert {task: tuple(heads) for task, heads in HEADS.items()} == {
        name: task.heads for name, task in TASKS.items() if task.heads
    }


@pytest.mark.parametrize("head", HEADS["segmentation"])
def test_segmentation_classifies_each_pixel_from_every_map(head):
    model, x = build(head), images()
    assert data_config(model)["input_size"] == (3, PIXELS, PIXELS)
    logits = model(x)
    assert logits.shape == (2, CLASSES, PIXELS, PIXELS)
    segmentation_loss(logits, masks()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("head", HEADS["detection"])
def test_detectors_return_losses_with_targets_and_boxes_without_in_either_mode(head):
    model, x = build(head), images()
    for mode in (True, False):
        model.train(mode)
        losses = model(x, boxes())
        assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
        with torch.no_grad():
            found = model(x)
        assert len(found) == 2
        for image in found:
            assert image["boxes"].shape == (len(image["scores"]), 4)
            assert image["labels"].dtype == torch.int64
            assert ((image["labels"] >= 0) & (image["labels"] < CLASSES)).all()
            if head == "mask_rcnn":
                assert image["masks"].shape == (len(image["scores"]), PIXELS, PIXELS)
                assert image["masks"].dtype == torch.bool
    model.train()
    sum(model(x, boxes()).values()).backward()
    head_name = "dense_head."
    without = [n for n, p in model.named_parameters() if p.grad is None and n.startswith(head_name)]
    assert not without


class Pyramid(nn.Module):
    """Trunk and pyramid of a dense model, as torchvision's detectors hold them."""

    def __init__(self, model):
        super().__init__()
        self.maps, self.pyramid = model.maps, model.head.detector.backbone

    def forward(self, x):
        return self.pyramid(self.maps(x))


@pytest.mark.parametrize("head", HEADS["detection"])
def test_detectors_equal_torchvisions_own_forward_passes(head):
    """The same losses and predictions, from targets without padding, in torchvision's count of labels."""
    model, x, targets = build(head), images(), boxes()
    first = 0 if head == "retinanet" else 1
    rows = [
        {
            "boxes": targets["boxes"][0, [0, 2], :4],
            "labels": torch.tensor([4, 0]) + first,
            "masks": torch.stack([targets["instances"][0] == n for n in (1, 3)]).to(torch.uint8),
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, PIXELS, PIXELS, dtype=torch.uint8),
        },
    ]
    stock = copy.copy(model.head.detector)
    stock._modules = stock._modules | {
        "transform": GeneralizedRCNNTransform(PIXELS, PIXELS, [0.0] * 3, [1.0] * 3, _skip_resize=True),
        "backbone": Pyramid(model),
    }
    torch.manual_seed(3)  # of the anchors and proposals that are drawn
    ours = model(x, targets)
    torch.manual_seed(3)
    theirs = stock.train()(list(x), rows)
    torch.testing.assert_close(ours, theirs)
    if head == "retinanet":  # whose first scores are all below the least that is shown
        nn.init.zeros_(stock.head.classification_head.cls_logits.bias)
    with torch.no_grad():
        ours, theirs = model.eval()(x), stock.eval()(list(x))
    assert sum(len(found["scores"]) for found in ours) > 10
    for found, expected in zip(ours, theirs):
        expected["labels"] -= first
        if head == "mask_rcnn":
            expected["masks"] = expected["masks"][:, 0] > 0.5
        torch.testing.assert_close(found, dict(expected))


def test_anchors_cover_objects_of_10_to_28_pixels_of_64():
    """Some anchor of the demo backbone overlaps a centred square of each size by half at least."""
    strides = {"retina": (4, 8, 16, 32), "region": (2, 4, 8, 16, 32)}
    for name, sides in (("retina", _RETINA_ANCHORS), ("region", _REGION_ANCHORS)):
        sizes = [stride * side for stride in strides[name] for side in sides]
        for pixels in range(10, 29):
            assert max((min(s, pixels) / max(s, pixels)) ** 2 for s in sizes) >= 0.5, (name, pixels)


def test_bf16_leaves_boxes_in_full_precision():
    for head in ("retinanet", "faster_rcnn"):
        model = build(head).eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(images())[0]["boxes"].dtype == torch.float32


def test_blocks_and_adapters_are_the_trunks_and_the_whole_head_trains():
    model = build("retinanet")
    names = [*find_blocks(model)]
    assert names[0] == "trunk.layers.0.blocks.0" and len(names) == 8
    adapted = adapt(model, "lora", rank=4)
    trained = summarize(adapted).names
    assert all("lora_" in name or ".dense_head." in name for name in trained)
    assert sum("lora_" in name for name in trained) == 8 * 4 * 2
    losses = adapted(images(), boxes())
    assert set(losses) == {"classification", "bbox_regression"}


# qlora's weights of four bits need layers of 32 channels, which the demo backbone's first stage lacks.
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("losa", "lst", "dtl", "qlora", "e3va")])
def test_every_method_for_classifiers_trains_a_dense_model(method):
    model = adapt(build("fpn"), method)
    set_train_mode(model)
    loss = segmentation_loss(model(images()), masks())
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss.isfinite() and sum(p.grad is not None for p in trained) >= 0.9 * len(trained)


def step_of(method, pixels):
    """Model, batch, optimizer, and a function that measures the peak bytes of the second of two steps."""
    model = adapt(build("fpn", pixels), method)
    set_train_mode(model)
    x, y = images(2, pixels), masks(2, pixels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def measured_peak():
        memory = TensorMemory(torch.device("cpu"))
        memory.track([*model.parameters(), *model.buffers(), x, y])
        memory.track(value for state in optimizer.state.values() for value in state.values())
        for _ in range(2):
            memory.reset_peak()
            with memory:
                logits = model(x)  # which the loop holds
                loss = segmentation_loss(logits, y)
                loss.backward()
                del logits, loss
                optimizer.step()
                optimizer.zero_grad()
        return memory.peak_bytes

    return model, (x, y), {"loss": segmentation_loss, "optimizer": optimizer}, measured_peak


@pytest.mark.parametrize(
    "method",
    ["e3va", *(pytest.param(method, marks=pytest.mark.long) for method in ("full", "linear", "lora"))],
)
def test_a_plan_of_segmentation_predicts_real_steps(method):
    model, batch, settings, measured_peak = step_of(method, PIXELS)
    assert toolkit.plan(model, 2**40, batch, strategy="none", **settings).peak_bytes == measured_peak()


@pytest.mark.long
@pytest.mark.parametrize(("method", "share"), [("full", 0.8), ("lora", 0.8), ("e3va", 0.93)])
def test_a_plan_of_segmentation_keeps_its_budget(method, share):
    model, batch, settings, measured_peak = step_of(method, 64)
    budget_bytes = int(share * measured_peak())
    with toolkit.auto_checkpoint(model, budget_bytes, batch, **settings) as handle:
        assert measured_peak() <= handle.plan.peak_bytes <= budget_bytes
    assert handle.departures == handle.replans == 0


def test_larger_images_keep_windows_and_tables_of_the_weights():
    small, large = build("fpn", 32), build("fpn", 64)
    assert {n: t.shape for n, t in small.state_dict().items()} == {
        n: t.shape for n, t in large.state_dict().items()
    }
    large.load_state_dict(small.state_dict())
    assert large(images(1, 64)).shape == (1, CLASSES, 64, 64)
    # Where windows do not shift, a window of the larger image sees what one of the smaller does.
    x = images(1, 64)
    first = [model.eval().trunk.layers[0].blocks[0] for model in (small, large)]
    with torch.no_grad():
        maps = [small.trunk.patch_embed(x[..., :32, :32]), large.trunk.patch_embed(x)]
        ours, theirs = (block(m) for block, m in zip(first, maps))
    torch.testing.assert_close(ours, theirs[:, :16, :16], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "demo_vit"}, "'demo_vit' is a VisionTransformer.*'demo_swin'"),
        ({"head": "cascade_rcnn"}, "unknown head for segmentation.*fpn"),
        ({"head": "retinanet"}, "unknown head for segmentation"),
        ({"task": "classification"}, "unknown task of dense prediction"),
        ({"image_size": 40}, "image_size 40 is not a multiple of 16.* choose 32"),
        ({"image_size": 0}, "image_size 0 .* choose 16"),
    ],
)
def test_unsuitable_arguments_are_refused_before_weights_are_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr("toolkit.backbones.demo.load_demo_weights", lambda *_: pytest.fail("loaded"))
    given = {"backbone": "demo_swin", "head": "fpn", "num_classes": 3, "task": "segmentation"} | arguments
    with pytest.raises(InputError, match=f"(?i){message}"):
        build_dense(pretrained=True, **given)


def test_mask_rcnn_needs_instances():
    with pytest.raises(InputError, match=r"mask_rcnn learns from instance masks.*faster_rcnn"):
        build("mask_rcnn")(images(), {"boxes": boxes()["boxes"]})
