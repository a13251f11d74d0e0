"""The catalog of data sets: one entry each, registered by the file that reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolkit.datasets.splits import WHOLE, Policy, Splits
from toolkit.datasets.tasks import TASKS, Task
from toolkit.errors import check_name
from toolkit.files import DOWNLOADS


@dataclass(frozen=True)
class Prompt:
    """What zero-shot models are asked about an image.

    The default template is the one that CLIP's paper recommends (Radford et al. 2021, arXiv 2103.00020,
    sec. 3.1.4).
    """

    templates: tuple[str, ...] = ("a photo of a {}.",)  # {}: the class name
    noun: str = "object"  # "What type of {noun} is in this photo?"


_GENERAL = Prompt()


@dataclass(frozen=True)
class Dataset:
    """A data set, or a family of them: how it is loaded, and what is known before it is loaded."""

    name: str
    load: Callable[..., Splits]  # load(root), or load(root, member) for a family
    policy: Policy = WHOLE
    task: str = "classification"  # a name of `TASKS`
    members: str = ""  # form of the members' names after the family's and a colon: "CORRUPTION:SEVERITY"
    instances: bool = False  # whether detection targets have masks of instances
    image_pixels: int | None = None  # side of dense models' inputs; None: the backbone's own size
    classes: int | None = None  # known without a download; None: loading needs none
    train_images: int | None = None  # likewise
    prompt: Prompt = _GENERAL


DATASETS: dict[str, Dataset] = {}


def register_dataset(entry: Dataset) -> None:
    """Add a data set for `load_dataset`, experiments, baselines and sweeps."""
    DATASETS[entry.name] = entry


def find_dataset(name: str) -> Dataset:
    """Return the entry of a data set or of its family; raise `InputError` for an unknown name."""
    exact = DATASETS.get(name)
    if exact is not None and not exact.members:
        return exact
    family, _, member = name.partition(":")
    entry = DATASETS.get(family)
    if entry is None or not entry.members or not member:
        check_name("dataset", name, [f"{e.name}:{e.members}".rstrip(":") for e in DATASETS.values()])
    return entry


def load_dataset(name: str, root: Path | None = None) -> Splits:
    """Load a data set of `DATASETS`, or a member of a family such as `digits-c:mixed:3` or `folder:PATH`.

    `root`: the folder of downloads (default `data/downloads`); vww, coco, ade20k and cifar10-c have to be
    put there by hand.

    Raises `InputError` for an unknown name, an unusable folder, missing files, or a failed download.
    """
    entry = find_dataset(name)
    member = [name.partition(":")[2]] if entry.members else []
    splits = entry.load(root or DOWNLOADS, *member)
    return dataclasses.replace(splits, name=name, policy=entry.policy, task=entry.task)


def task_of(name: str) -> Task:
    """The task of a data set, by the data set's name."""
    return TASKS[find_dataset(name).task]
