"""CIFAR and DTD through torchvision's readers."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
import torchvision
from pictures import write_image

from toolkit.datasets import load_dataset, public
from toolkit.errors import InputError


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("dtd", "dtd-r1.0.1.tar.gz"),
    ],
)
def test_no_network_says_what_to_put_where(tmp_path, name, archive):
    with pytest.raises(InputError) as caught:
        load_dataset(name, root=tmp_path)
    assert archive in str(caught.value) and str(tmp_path) in str(caught.value)


def test_dtd_keeps_the_three_parts_of_partition_1_apart(tmp_path):
    root = tmp_path / "dtd" / "dtd"
    lists = {"train": [0, 1], "val": [2], "test": [3]}
    for name in ("banded", "woven"):
        for number in range(4):
            write_image(root / "images" / name / f"{name}_{number}.jpg", seed=number)
    for partition, shift in ((1, 0), (2, 1)):
        for split, numbers in lists.items():
            lines = [f"{n}/{n}_{(i + shift) % 4}.jpg" for n in ("banded", "woven") for i in numbers]
            path = root / "labels" / f"{split}{partition}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines))
    splits = load_dataset("dtd", root=tmp_path)
    assert splits.classes == ["banded", "woven"]
    for split, numbers in lists.items():
        names = [path.name for path, _ in getattr(splits, split).samples]
        assert names == [f"{n}_{i}.jpg" for n in ("banded", "woven") for i in numbers]


@pytest.mark.parametrize(
    ("name", "count", "labels_key", "names_key"),
    [("cifar100", 100, "fine_labels", "fine_label_names"), ("cifar10", 10, "labels", "label_names")],
)
def test_cifar_splits_validation_from_the_training_set(
    tmp_path, monkeypatch, name, count, labels_key, names_key
):
    """1,000 and 100 images in CIFAR's format; torchvision's own reader checks and reads them."""
    kind = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file, content) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for file, images in (("train", 1000), ("test", 100)):
        pixels = np.random.default_rng(images).integers(0, 256, (images, 3072), dtype=np.uint8)
        digest = write(file, {"data": pixels, labels_key: [i % count for i in range(images)]})
        monkeypatch.setattr(kind, f"{file}_list", [[file, digest]])
    meta = {"filename": "meta", "key": names_key}
    meta["md5"] = write("meta", {names_key: [f"class {i}" for i in range(count)]})
    monkeypatch.setattr(kind, "meta", meta)
    splits = load_dataset(name, root=tmp_path)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [900, 100, 100]
    assert len(splits.classes) == count
    assert np.bincount(splits.val.labels).tolist() == [100 // count] * count
    image, _ = splits.test[0]
    assert image.shape == (3, 32, 32)
    train = {image.tobytes() for image in splits.train.images}
    assert not train & {image.tobytes() for image in splits.val.images}


def idx(values) -> bytes:
    return bytes(16 if values.ndim == 3 else 8) + values.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """6,000 and 2,000 images of noise in the form of Debian's package."""
    rng = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 6_000), ("t10k", 2_000)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        content[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 255, (count, 28, 28), dtype=np.uint8))
        content[f"{part}-labels-idx1-ubyte"] = idx(labels)
    for name, data in content.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data, 1))
    monkeypatch.setattr(public, "DEBIAN", tmp_path)
    monkeypatch.setattr(
        public,
        "FASHION_SHA256",
        {name: hashlib.sha256(content[name]).hexdigest() for name in public.FASHION_SHA256},
    )
    return tmp_path


def test_fashion_mnist_is_read_from_debians_package(fashion):
    splits = load_dataset("fashion_mnist")
    assert [len(getattr(splits, split)) for split in ("train", "val", "test")] == [5_400, 600, 2_000]
    image, label = splits.test[13]
    assert image.shape == (3, 28, 28) and label == 3 and splits.classes[9] == "Ankle boot"
    small = load_dataset("fashion_mnist_1000")
    assert len(small.train) == len(small.test) == 1_000 and len(small.val) == 600
    assert (small.counts()["test"] == 100).all()


def test_fashion_mnist_of_other_content_is_refused(fashion):
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(2_008)))
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte.gz is not the file"):
        load_dataset("fashion_mnist")
