"""Predictions of a trained model for pictures: files, folders, PIL images or tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import timm.data
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from toolkit.datasets.pictures import decode, is_picture
from toolkit.errors import InputError, one_line

Picture = Image.Image | torch.Tensor | str | os.PathLike


class Predictor:
    """A classifier with its classes and its preprocessing, as `load_model` returns it.

    `model`: the network; `classes`: names in the order of its outputs; `transform(picture)`: its input
    (3, H, W) from an RGB image of PIL, by timm's own transforms.
    """

    PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

    def __init__(self, model: nn.Module, classes: list[str], config: dict):
        self.model, self.classes, self.config = model, classes, config
        images = {key: config["pretrained_cfg"][key] for key in self.PREPROCESSING}
        self.transform = timm.data.create_transform(**images)

    def predict(self, pictures: Picture | Iterable[Picture], *, batch_size: int = 32) -> pd.DataFrame:
        """One row for each picture: `image` (its file or number), `class`, `probability`, and `error`, which
        says why a picture could not be read.

        `pictures`: see `probabilities`.
        """
        names, rows, broken = self.probabilities(pictures, batch_size=batch_size)
        highest, places = rows.max(1)
        found = [self.classes[place] for place in places]
        readable = {"image": names, "class": found, "probability": highest.tolist()}
        unread = {"image": [*broken], "error": [*broken.values()]}
        columns = ["image", "class", "probability", "error"]
        return pd.concat([pd.DataFrame(readable), pd.DataFrame(unread)]).reindex(columns=columns)

    @torch.inference_mode()
    def probabilities(
        self, pictures: Picture | Iterable[Picture], *, batch_size: int = 32
    ) -> tuple[list[str], torch.Tensor, dict[str, str]]:
        """Names of the pictures that could be read, the probabilities of their classes, float (N, classes),
        and the reason for each of the others.

        `pictures`: a file, a folder (with all pictures below it), a PIL image, or a tensor (3, H, W) or
        (N, 3, H, W), uint8 or float from 0 to 1; or several of these.  Raises `InputError` if there is none.
        """
        if self.config["toolkit"]["task"] != "classification":
            raise InputError("only classifiers name classes; call `predictor.model` on a batch instead.")
        device = next(self.model.parameters()).device
        names, rows, broken, batch = [], [torch.empty(0, len(self.classes))], {}, []
        found = list(_listed(pictures))
        if not found:
            raise InputError("there is no picture to predict: name files, or a folder that holds some.")
        for place, (name, picture) in enumerate(found):
            try:
                batch.append(self.transform(_image(picture)))
                names.append(name)
            except Exception as error:  # damaged content leads decoders to errors of any type
                broken[name] = getattr(error, "strerror", None) or one_line(error)
            if batch and (len(batch) == batch_size or place == len(found) - 1):
                rows.append(self.model(torch.stack(batch).to(device)).float().softmax(1).cpu())
                batch = []
        return names, torch.cat(rows), broken


def _listed(pictures: Picture | Iterable[Picture]) -> Iterator[tuple[str, Picture]]:
    """Each picture with its name: the path of its file, or its number."""
    if isinstance(pictures, (str, os.PathLike, Image.Image, torch.Tensor)):
        pictures = [pictures]
    number = 0
    for each in pictures:
        if isinstance(each, (str, os.PathLike)):
            files = [Path(each)]
            if files[0].is_dir():
                files = sorted(file for file in files[0].rglob("*") if file.is_file() and is_picture(file))
            yield from ((str(file), file) for file in files)
            continue
        images = each if isinstance(each, torch.Tensor) and each.dim() == 4 else [each]
        for image in images:
            yield f"image {number}", image
            number += 1


def _image(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, torch.Tensor):
        return decode(Path(picture))
    if picture.is_floating_point() and not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError("values outside of 0 to 1; normalised batches are for `predictor.model`")
    return v2.functional.to_pil_image(picture).convert("RGB")
