"""The resolution of an experiment is that of its model, or an error before anything is trained."""

import pytest
import torch

import toolkit
from toolkit.backbones import data_config
from toolkit.errors import InputError


@pytest.mark.parametrize(
    ("backbone", "pixels"), [("demo_vit", 64), ("demo_swin", 64), ("demo_cnn", 48), ("small:tiny_vit", 96)]
)
def test_a_model_takes_images_of_the_resolution(backbone, pixels):
    experiment = toolkit.Experiment(backbone=backbone, resolution=pixels)
    model = toolkit.build_model(experiment, 5)
    assert data_config(model)["input_size"] == (3, pixels, pixels)
    assert model(torch.randn(2, 3, pixels, pixels)).shape == (2, 5)
    assert (
        toolkit.build_model(toolkit.Experiment(backbone=backbone), 5).pretrained_cfg["input_size"][1] < pixels
    )


@pytest.mark.parametrize(
    ("backbone", "pixels", "reason"),
    [
        ("demo_vit", 60, "patches of 8 pixels"),
        ("mixer_s32_224", 96, "only its own size"),
        ("small:vim_small", 64, "64 x 64 pixels .*choose another resolution"),
        ("demo_vit", 5000, "between 0 and 4096"),
    ],
)
def test_a_resolution_that_the_backbone_cannot_take_is_refused(backbone, pixels, reason):
    with pytest.raises(InputError, match=reason):
        experiment = toolkit.Experiment(backbone=backbone, resolution=pixels, pretrained=False)
        toolkit.build_model(experiment, 5)
