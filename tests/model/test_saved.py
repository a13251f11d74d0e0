"""A trained model leaves as a folder that gives the same answers elsewhere."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import toolkit
from toolkit.errors import InputError
from toolkit.model.saved import CONFIG, WEIGHTS


@pytest.fixture
def saved(digits, tmp_path):
    """`saved("lora")`: a folder, the model in it as it was before, and eight test pictures."""

    def save(method: str, backbone: str = "demo_vit", **parameters):
        experiment = toolkit.Experiment(backbone=backbone, method=method, device="cpu", **parameters)
        toolkit.seed_everything(0)
        model = toolkit.adapt(toolkit.build_model(experiment, 10), method, **experiment.method_options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)  # as training would
        before = {name: value.clone() for name, value in model.state_dict().items()}
        folder = toolkit.save_model(tmp_path / "model", model.eval(), digits, experiment)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return folder, model

    return save


@pytest.fixture
def pictures(digits):
    return [Image.fromarray(image) for image in digits.test.images[:8]]


@pytest.mark.parametrize(
    ("method", "backbone", "parameters"),
    [
        ("linear", "demo_vit", {}),
        ("full", "demo_cnn", {}),
        ("lora", "demo_vit", {"resolution": 64}),
        ("dora", "demo_cnn", {}),
        ("adalora", "demo_vit", {}),
        ("qlora", "demo_vit", {}),
        ("losa", "demo_vit", {"options": {"four_bit": True}}),
        pytest.param("lst", "demo_cnn", {}, marks=pytest.mark.long),
        pytest.param("lora", "small:tiny_vit", {}, marks=pytest.mark.long),
        pytest.param("bitfit", "small:vim_small", {}, marks=pytest.mark.long),
    ],
)
def test_a_loaded_model_gives_the_probabilities_of_the_trained_one(
    saved, pictures, method, backbone, parameters
):
    folder, model = saved(method, backbone, **parameters)
    predictor = toolkit.load_model(folder)
    images = torch.stack([predictor.transform(picture.convert("RGB")) for picture in pictures])
    with torch.no_grad():
        expected = model(images).softmax(1)
    _, found, _ = predictor.probabilities(pictures)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert predictor.predict(pictures)["class"].tolist() == [str(c) for c in expected.argmax(1).tolist()]


def test_the_preprocessing_is_that_of_the_test(saved, digits):
    folder, model = saved("linear")
    _, found, _ = toolkit.load_model(folder).probabilities(
        torch.from_numpy(digits.test.images)[:, None].expand(-1, 3, -1, -1)
    )
    experiment = toolkit.Experiment(method="linear")
    evaluation = toolkit.evaluate_split(model, digits, "test", experiment)
    assert (found.argmax(1) == evaluation.predictions).float().mean() > 0.99  # up to rounding of pixels


def test_plain_timm_opens_the_folder_in_a_fresh_process(saved, pictures):
    folder, _ = saved("lora")
    pictures[0].save(folder / "digit.png")
    program = f"""
import timm, torch
from PIL import Image
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("{folder / "digit.png"}").convert("RGB"))
print(model.pretrained_cfg["label_names"][3], *model(image[None]).softmax(1)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    name, *probabilities = done.stdout.split()
    _, expected, _ = toolkit.load_model(folder).probabilities(folder / "digit.png")
    assert name == "3" and list(map(float, probabilities)) == pytest.approx(expected[0].tolist(), abs=1e-6)


def test_plain_peft_opens_the_adapter(saved, pictures):
    import peft

    folder, model = saved("lora")
    toolkit.seed_everything(0)
    backbone = toolkit.build_backbone("demo_vit", 10)
    loaded = peft.PeftModel.from_pretrained(backbone, folder / "adapter").eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=0)


def test_the_card_tells_what_was_done(saved):
    folder, _ = saved("lora")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "license: apache-2.0" in card
    for fact in (
        "| data | digits, 10 classes |",
        "| options | rank 8, alpha 16,",
        "checkpointing planned",
        "Classes: 0, 1, 2,",
    ):
        assert fact in card


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_a_folder_that_cannot_be_used_is_refused(saved, tmp_path):
    with pytest.raises(InputError, match=r"holds no model: config.json is missing"):
        toolkit.load_model(tmp_path / "nowhere")
    folder, _ = saved("linear")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"model.safetensors is not the file"):
        toolkit.load_model(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no checkpoint"):
        toolkit.load_model(folder)
    (folder / WEIGHTS).write_bytes(content)
    edit(folder, label_names=["a", "b"])
    with pytest.raises(InputError, match="2 classes for 10 outputs"):
        toolkit.load_model(folder)


def test_weights_of_another_model_are_refused(saved):
    folder, _ = saved("linear")
    edit(folder, architecture="vit_small_patch16_224")
    edit(
        folder, model_args={"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_classes": 10}
    )
    with pytest.raises(InputError, match="of another shape"):
        toolkit.load_model(folder)
    edit(folder, architecture="no_such_network")
    with pytest.raises(InputError, match="timm cannot build"):
        toolkit.load_model(folder)
