"""Pictures in every form that people have them in."""

import pytest
import torch
from PIL import Image
from torch import nn

from toolkit.errors import InputError
from toolkit.model.predictor import Predictor

IMAGES = {
    "input_size": (3, 8, 8), "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1),
    "crop_pct": 1.0, "crop_mode": "squash",
}  # fmt: skip
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class MeanColour(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, images):
        return self.scale * images.mean((2, 3))


@pytest.fixture
def predictor():
    config = {"pretrained_cfg": IMAGES, "toolkit": {"task": "classification"}}
    return Predictor(MeanColour(), list(COLOURS), config)


def picture(colour, size=(20, 30)):
    return Image.new("RGB", size, COLOURS[colour])


def test_all_forms_of_pictures(predictor, tmp_path):
    (tmp_path / "more").mkdir()
    picture("green").save(tmp_path / "more" / "leaf.png")
    picture("blue").save(tmp_path / "sky.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    tensor = torch.zeros(3, 9, 5, dtype=torch.uint8)
    tensor[0] = 255
    batch = torch.stack([tensor, tensor.flip(0)]) / 255
    table = predictor.predict([picture("red"), str(tmp_path), tensor, batch], batch_size=2)
    assert table["class"].tolist() == ["red", "green", "blue", "red", "red", "blue"]
    assert table.image.tolist() == [
        "image 0", str(tmp_path / "more" / "leaf.png"), str(tmp_path / "sky.jpg"),
        "image 1", "image 2", "image 3",
    ]  # fmt: skip
    assert (table.probability > 0.9).all() and table.error.isna().all()
    assert predictor.predict(picture("blue"))["class"].tolist() == ["blue"]


def test_what_cannot_be_read_is_listed_and_the_rest_predicted(predictor, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nonsense")
    picture("red").save(tmp_path / "b.png")
    table = predictor.predict([tmp_path, tmp_path / "missing.jpg", torch.full((3, 4, 4), 7.0)]).set_index(
        "image"
    )
    assert table["class"].dropna().to_dict() == {str(tmp_path / "b.png"): "red"}
    reasons = table.error.dropna().to_dict()
    assert "not a picture" in reasons[str(tmp_path / "a.png")]
    assert "No such file" in reasons[str(tmp_path / "missing.jpg")]
    assert "outside of 0 to 1" in reasons["image 0"]


def test_nothing_to_predict_is_an_error(predictor, tmp_path):
    with pytest.raises(InputError, match="no picture to predict"):
        predictor.predict(tmp_path)
