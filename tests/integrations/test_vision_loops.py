"""Budgets in loops as torchvision's and timm's training scripts have them: a real step is recorded."""

import numpy as np
import pytest
import torch
from programs import Run, Watch, held
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.convnext import ConvNeXt
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import toolkit
from toolkit.budget import tensors_of

DRAW = torch.Generator().manual_seed(0)
PICTURES = [torch.rand(3, 128, 160, generator=DRAW), torch.rand(3, 112, 144, generator=DRAW)]
BOXES = [
    {"boxes": torch.tensor([[5.0, 5, 50, 60], [20, 10, 70, 40]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.tensor([[10.0, 12, 60, 66]]), "labels": torch.tensor([1])},
]
IMAGES = torch.rand(8, 3, 96, 96, generator=DRAW)
CLASSES = torch.randint(0, 4, (8, 96, 96), generator=DRAW)
LABELS = torch.arange(8) % 4


class Detection:
    """Its anchors, matches and losses depend on values."""

    data = (*PICTURES, *(tensor for target in BOXES for tensor in target.values()))

    def __init__(self):
        levels = {"layer1": "0", "layer2": "1"}
        backbone = BackboneWithFPN(resnet18(weights=None), levels, [64, 128], 32)
        anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
        self.model = RetinaNet(backbone, 3, min_size=128, max_size=160, anchor_generator=anchors)

    def loss(self):
        return sum(self.model(PICTURES, BOXES).values())


class Segmentation:
    data = (IMAGES, CLASSES)

    def __init__(self):
        self.model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)

    def loss(self):
        return F.cross_entropy(self.model(IMAGES)["out"], CLASSES)


class Classification:
    """timm's recipe: mixup, drop path, channels_last, an average of the weights."""

    data = (IMAGES, LABELS)

    def __init__(self):
        model = ConvNeXt(depths=(2, 2, 2, 2), dims=(16, 24, 32, 48), num_classes=4, drop_path_rate=0.3)
        self.model = model.to(memory_format=torch.channels_last)
        self.average = ModelEmaV3(self.model, decay=0.9)
        self.mix, self.criterion = Mixup(0.8, 1.0, num_classes=4), SoftTargetCrossEntropy()

    def loss(self):
        images, targets = self.mix(IMAGES.clone(), LABELS.clone())
        return self.criterion(self.model(images.contiguous(memory_format=torch.channels_last)), targets)


def _program(make):
    def program(budget):
        np.random.seed(0)  # of mixup
        loop, watch, handle = make(), Watch(), None
        optimizer = torch.optim.SGD(loop.model.parameters(), 1e-3, momentum=0.9)
        if budget is not None:
            handle = toolkit.auto_checkpoint(loop.model, budget, optimizer=optimizer)
        average = getattr(loop, "average", None)
        for _ in range(4):
            watch.step_begins(loop.model, *loop.data, *(tensors_of(average) if average else ()))
            loop.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(loop.model)
        peak_bytes = watch.training_ends()
        if handle:
            handle.remove()
        return Run(loop.model, peak_bytes, handle)

    return program


@pytest.mark.parametrize(("make", "share"), [(Detection, 0.85), (Segmentation, 0.75), (Classification, 0.8)])
def test_a_loop_keeps_its_budget(make, share):
    run = held(_program(make), share)
    assert run.handle.plan.recompute_flops > 0 and run.handle.departures == 0
