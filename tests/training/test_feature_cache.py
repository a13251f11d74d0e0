import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import toolkit
from toolkit.backbones import data_config
from toolkit.backbones.demo import DATA_CONFIG
from toolkit.budget.step import autocast
from toolkit.datasets import Policy, in_memory, loader
from toolkit.errors import InputError
from toolkit.methods import METHODS, set_train_mode
from toolkit.training import feature_cache
from toolkit.training.feature_cache import (
    STORED,
    Layout,
    cache_key,
    cached_features,
    layout_of,
    records_of,
)

SPLITS = ("train", "val", "test")


def tiny():
    """A vision transformer of two blocks for 16 px; statistics as those of `demo_vit`."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    model.pretrained_cfg = DATA_CONFIG | {"input_size": (3, 16, 16)}
    return model


def build(method="losa", backbone="tiny", seed=0, **options):
    toolkit.seed_everything(seed)
    model = tiny() if backbone == "tiny" else toolkit.build_backbone(backbone, 10, pretrained=False)
    return METHODS[method].apply(model, METHODS[method].options(**options))


@pytest.fixture
def cached(tmp_path, few_digits):
    """`cached(model)`: its features of few digits, in a folder of this test."""

    def make(model, splits=few_digits, **options):
        options = {"budget_bytes": 10**9, "batch_size": 32, "folder": tmp_path / "features"} | options
        return cached_features(model, splits, **options)

    return make


def images_of(model, splits, split="train"):
    [(images, labels)] = loader(
        getattr(splits, split), data_config(model), splits.policy, batch_size=len(getattr(splits, split))
    )
    return images, labels


def read_by_classifier(model, images):
    head, read = model.get_classifier(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "forward", lambda x: read.append(x) or F.linear(x, head.weight, head.bias))
        model(images)
    return read[0]


# --- what the rows are ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        ("losa", "demo_vit"),
        ("lst", "tiny"),
        ("linear", "tiny"),
        ("linear", "demo_cnn"),
        pytest.param("losa", "demo_cnn", marks=pytest.mark.long),
        pytest.param("lst", "small:vit_small", marks=pytest.mark.long),
        pytest.param("linear", "small:tiny_vit", marks=pytest.mark.long),
        pytest.param("linear", "small:mambavision_t", marks=pytest.mark.long),
        pytest.param("linear", "small:vim_small", marks=pytest.mark.long),
    ],
)
def test_rows_are_the_features_of_the_backbone(cached, few_digits, method, backbone):
    """Not bit for bit: batches of other sizes may round differently."""
    model = build(method, backbone).eval()
    features = cached(model)
    rows, labels = features.val.__getitems__(list(range(32)))
    images, expected_labels = images_of(model, few_digits, "val")
    with torch.no_grad():
        expected = [read_by_classifier(model, images)] if method == "linear" else model.features(images)
        logits = model(images)
    assert rows.shape == (len(images), sum(features.model.layout.sizes))
    assert torch.equal(labels, expected_labels)
    found = features.model.layout.unpack(rows)
    assert [f.shape for f in found] == [e.shape for e in expected]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.model.eval()(rows), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.01), ("fp16", 0.002)])
def test_rows_in_half_precision_take_half_the_space(cached, few_digits, precision, tolerance):
    model = build()
    whole, half = cached(model), cached(model, precision=precision)
    labels_bytes = 8 * (len(few_digits.train) + len(few_digits.val))
    assert 2 * (half.nbytes - labels_bytes) == whole.nbytes - labels_bytes
    rows, _ = half.train.__getitems__([3, 1])
    assert rows.dtype == half.model.layout.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    images, _ = images_of(model, few_digits)
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        expected = model.features(images[[3, 1]])
    for one, other in zip(half.model.layout.unpack(rows), expected):
        assert one.dtype == other.dtype, "what trains sees the types that the backbone gives"
        torch.testing.assert_close(one.float(), other.float(), atol=tolerance, rtol=tolerance)


def test_bytes_are_those_on_disk_and_known_before(cached, tmp_path, few_digits):
    model = build()
    layout = layout_of(model, "fp32")
    tokens, width, taps = 5, 16, 2
    assert layout.shapes == ((tokens, width),) * (taps + 1)
    images = len(few_digits.train) + len(few_digits.val)
    features = cached(model)
    assert features.nbytes == images * (4 * tokens * width * (taps + 1) + 8)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
    assert features.nbytes < on_disk < features.nbytes + 1000, "the headers"


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    count=st.integers(1, 3),
)
def test_packing_and_records_lose_nothing(shapes, precision, count):
    layout = Layout(tuple(shapes), (str(STORED[precision][0])[6:],) * len(shapes), precision)
    parts = [torch.randn(count, *shape).to(layout.dtype) for shape in shapes]
    rows = layout.pack(parts)
    assert rows.shape == (count, sum(math.prod(shape) for shape in shapes)) and rows.dtype == layout.dtype
    for one, other in zip(layout.unpack(rows), parts):
        assert torch.equal(one, other)
    records = records_of(rows, torch.arange(count), precision)
    assert records["label"].tolist() == list(range(count)) and records.dtype.itemsize == layout.image_bytes
    again = torch.from_numpy(records["features"].copy()).view(layout.dtype)
    assert torch.equal(again, rows)


# --- training through the cache -------------------------------------------------------------------


def losses(model, batches_of, call, epochs=2):
    """The losses of AdamW over epochs of batches."""
    toolkit.seed_everything(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for epoch in range(epochs):
        set_train_mode(model)
        for inputs, labels in batches_of(epoch):
            loss = F.cross_entropy(call(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("method", ["losa", "lst", "linear"])
def test_training_through_the_cache_gives_the_losses_of_training_without(cached, few_digits, method):
    """Digits are not augmented, so the only difference is the rounding of batches of another size."""
    plain = build(method)
    config, policy = data_config(plain), few_digits.policy
    without = losses(
        plain,
        lambda epoch: loader(few_digits.train, config, policy, batch_size=20, seed=3, epoch=epoch),
        plain,
    )
    model = build(method)
    features = cached(model)
    found = losses(
        features.model,
        lambda epoch: features.loader("train", batch_size=20, seed=3, epoch=epoch),
        features.model,
    )
    assert len(found) == len(without) == 10 and min(without) < without[0]
    assert found == pytest.approx(without, rel=1e-4)
    images, _ = images_of(model, few_digits, "val")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-3, atol=1e-3)


def test_what_trains_is_shared_with_the_model_and_the_backbone_is_not_part_of_it(cached):
    model = build()
    inner = cached(model).model
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in inner.parameters() if p.requires_grad} == trained
    backbone = {id(p) for p in model.backbone.parameters()}
    assert not backbone & {id(p) for p in inner.parameters()}
    assert data_config(inner) == data_config(model)
    assert toolkit.methods.head_name(inner) in dict(inner.named_modules())


@pytest.mark.parametrize("seed", [None, 5])
def test_the_order_is_the_loaders(cached, few_digits, seed):
    model = build("linear")
    features = cached(model)
    for epoch, first_batch, batch_size in ((0, 0, 7), (2, 3, 7), (1, 1, 96)):
        options = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "first_batch": first_batch}
        theirs = loader(few_digits.train, data_config(model), few_digits.policy, **options)
        ours = features.loader("train", **options)
        assert len(ours) == len(theirs)
        assert [y.tolist() for _, y in ours] == [y.tolist() for _, y in theirs]
    before = torch.get_rng_state()
    list(features.loader("train", batch_size=7, seed=seed))
    assert torch.equal(torch.get_rng_state(), before), "loading leaves the global generator alone"
    with pytest.raises(InputError, match="unknown cached split 'test'"):
        features.loader("test", batch_size=7)


# --- what is found again --------------------------------------------------------------------------


def test_features_are_found_again_after_training(cached, monkeypatch):
    model = build()
    first = cached(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    monkeypatch.setattr(feature_cache, "layout_of", lambda *a: first.model.layout)
    monkeypatch.setattr(model, "features", lambda *a: pytest.fail("the backbone ran"))
    again = cached(model, batch_size=5)
    assert again.cached and not first.cached
    assert again.window == first.window and again.nbytes == first.nbytes
    assert torch.equal(again.train[7][0], first.train[7][0])


def test_losa_and_lst_that_tap_alike_share_features(cached):
    assert not cached(build("losa")).cached
    assert cached(build("lst")).cached


def test_the_key_changes_with_all_that_features_depend_on(few_digits):
    def key(model=None, splits=few_digits, precision="fp32"):
        model = model or build()
        return cache_key(model, splits, layout_of(model, precision))

    usual = key()
    assert key() == usual and json.loads(json.dumps(usual))["weights"] == usual["weights"]
    resized = build()
    resized.backbone.pretrained_cfg = data_config(resized) | {"mean": (0.4,) * 3}
    renamed = replace(few_digits, hashes=few_digits.hashes | {"train": "0" * 64})
    others = {
        "weights": key(build(seed=1)),
        "precision": key(precision="bf16"),
        "preprocessing": key(resized),
        "data": key(splits=renamed),
        "features": key(build(taps=1)),
    }
    for name, other in others.items():
        changed = {part for part in usual if other[part] != usual[part]}
        assert name in changed and changed <= {name, "features"}
    cropped = key(splits=replace(few_digits, policy=Policy(crop_scale=(0.5, 1.0))))
    assert cropped["preprocessing"] != usual["preprocessing"], "test images are cropped, too"
    flipped = key(splits=replace(few_digits, policy=Policy(flip=True)))
    assert flipped == usual, "neither split is flipped"


def test_a_frozen_buffer_is_part_of_the_key_and_the_head_is_not(few_digits):
    model = build("linear", "demo_cnn")

    def weights():
        return cache_key(model, few_digits, layout_of(model, "fp32"))["weights"]

    before = weights()
    nn.init.ones_(model.get_classifier().weight)
    assert weights() == before
    next(b for name, b in model.named_buffers() if "running_mean" in name).add_(1)
    assert weights() != before


@pytest.mark.long
def test_packed_weights_are_part_of_the_key(few_digits):
    pytest.importorskip("bitsandbytes")
    plain, packed = (build(backbone="demo_vit", four_bit=packed) for packed in (False, True))
    again = build(backbone="demo_vit", four_bit=True)
    keys = [cache_key(model, few_digits, layout_of(model, "fp32")) for model in (plain, packed, again)]
    assert keys[0]["weights"] != keys[1]["weights"] and keys[1] == keys[2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "rows.npy").unlink(),
        lambda folder: (folder / "rows.npy").write_bytes((folder / "rows.npy").read_bytes()[:-1]),
        lambda folder: flip_a_bit(folder / "rows.npy"),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text('{"question": 1, "answer": {}, "sha256": ""}'),
    ],
)
def test_damaged_features_are_computed_again_with_a_warning(cached, tmp_path, damage):
    model = build("linear")
    whole = cached(model).train[5][0]
    [folder] = (tmp_path / "features").iterdir()
    damage(folder)
    with pytest.warns(UserWarning, match=rf"{folder.name} cannot be read and is made again"):
        again = cached(model)
    assert not again.cached and torch.equal(again.train[5][0], whole)
    assert cached(model).cached


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_unfinished_features_are_not_used(cached, tmp_path, monkeypatch):
    model = build("linear")

    def killed(*args):
        raise KeyboardInterrupt

    for place in ("toolkit.cache.write_sealed", "toolkit.training.feature_cache.records_of"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, killed)
            cached(model)
        assert not list(tmp_path.rglob("*.part")), "half a file is removed"
    [folder] = (tmp_path / "features").iterdir()
    (folder / "rows.part").write_bytes(b"half")
    assert not cached(model).cached and cached(model).cached
    assert not (folder / "rows.part").exists()


SCRIPT = """
import sys, numpy, toolkit
from pathlib import Path
from toolkit.training.feature_cache import cached_features
toolkit.seed_everything(0)
model = linear(toolkit.build_backbone("demo_vit", 10, pretrained=False))
digits = toolkit.load_dataset("digits")
print("ready", flush=True)
sys.stdin.readline()
features = cached_features(model, digits, budget_bytes=10**9, batch_size=8, folder=Path(sys.argv[1]))
print(features.cached, float(features.train[9][0].sum()), len(features.val))
"""


@pytest.mark.long
def test_two_processes_that_want_the_same_features_compute_them_once(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "features")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=1200)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(each[0] for each in found) == ["False", "True"]
    assert found[0][1:] == found[1][1:] and found[0][2] == "270"


# --- what is refused ------------------------------------------------------------------------------


def test_features_above_the_budget_are_refused_before_any_is_computed(cached, tmp_path, monkeypatch):
    model = build()
    need = cached(model).nbytes
    shutil.rmtree(tmp_path / "features")
    monkeypatch.setattr(feature_cache, "kept_rows", lambda *a: pytest.fail("computed"))
    with pytest.raises(
        InputError, match=r"take .*KiB, more than .*feature_cache; allow more, tap fewer"
    ) as e:
        cached(model, budget_bytes=need - 1)
    assert "(taps)" in str(e.value) and "feature_cache=0" in str(e.value)
    assert not (tmp_path / "features").exists()


def test_features_above_the_free_disk_are_refused(cached, monkeypatch):
    model = build()
    need = cached(model).nbytes
    usage = namedtuple("usage", "total used free")
    total = 100 * need
    for free, fits in ((need + total // 20, True), (need + total // 20 - 1, False)):
        monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path, f=free: usage(total, 0, f))
        other = build(seed=int(fits) + 1)
        if fits:
            assert cached(other).nbytes == need
        else:
            with pytest.raises(InputError, match=r"has room for .* \(a twentieth stays free\); make room"):
                cached(other)


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_features_that_change_in_training_are_refused(cached, demo_model, method):
    with pytest.raises(InputError, match=r"cannot be cached: .* trains, or follows.*'linear'"):
        cached(demo_model(method))


def test_statistics_that_follow_the_batches_are_refused(cached):
    model = toolkit.build_backbone("demo_cnn", 10, pretrained=False)
    toolkit.adapt(model, "linear", batch_norm="updated")
    with pytest.raises(InputError, match="follows the batches"):
        cached(model)
    assert len(cached(toolkit.adapt(model, "linear")).val) == 32


def test_a_model_that_does_not_end_in_its_classifier_is_refused(cached):
    class Softened(VisionTransformer):
        def forward(self, x):
            return super().forward(x).softmax(1)

    model = tiny()
    model.__class__ = Softened
    with pytest.raises(InputError, match="Softened does not end in its classifier"):
        cached(METHODS["linear"].apply(model))


def test_features_that_are_not_finite_are_refused(cached, tmp_path):
    model = build("linear")
    with torch.no_grad():
        model.norm.bias.fill_(1e5)
    assert cached(model).train[0][0].max() > 9e4
    with pytest.raises(InputError, match="not finite in precision 'fp16'; take 'bf16'"):
        cached(model, precision="fp16")
    assert not list(tmp_path.rglob("*.part"))


def test_unknown_precision(cached):
    with pytest.raises(InputError, match="unknown precision 'fp8'"):
        cached(build(), precision="fp8")


def test_features_of_images_of_several_sizes_are_those_of_test_images(cached):
    """With a policy that crops and flips, what is cached is the centre, the same every time."""
    rng = np.random.default_rng(0)
    parts = {s: (rng.integers(0, 256, (12, 3, 40, 30), dtype=np.uint8), np.arange(12) % 3) for s in SPLITS}
    splits = in_memory("noise", parts, ["a", "b", "c"], Policy(crop_scale=(0.3, 1.0), flip=True))
    model = build("linear")
    features = cached(model, splits)
    images, _ = images_of(model, splits)
    with torch.no_grad():
        expected = model.eval()(images)
        rows = torch.stack([x for x, _ in features.train])
        torch.testing.assert_close(features.model(rows), expected, atol=1e-5, rtol=1e-4)
