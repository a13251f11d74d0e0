"""Records, sweep files and folders of pictures that somebody made to do harm, or by accident."""

import json
import os
import random
import socket
import warnings

import pytest
from draws import damaged, few_or_many, not_hanging
from PIL import Image

import toolkit
from toolkit.analysis import as_text, compare, read
from toolkit.batch.sweep_file import PRESETS, read_sweep
from toolkit.errors import InputError
from toolkit.training.record import FILE_NAME, RunRecord, finished_folder

VALUES = [
    None, True, -1, 0, 2**63, 10**4000, 1e308, "", "x" * 10_000_000, "\x1b[31m\x07",
    "<script>alert(1)</script>", "\ud800", [], {}, {"a": {"b": []}}, [[[[]]]], "NaN",
    "../../etc/passwd", "a\nb",
]  # fmt: skip


def hostile_record(rng, path):
    """A record that was never written by a run: valid but for some values, or not at all."""
    content = json.loads(path.read_text())
    content.pop("sha256")
    for _ in range(rng.randint(1, 3)):
        group = rng.choice(list(content))
        value = rng.choice(VALUES)
        if rng.random() < 0.2 or not content[group]:
            content[group] = value
        else:
            key = (
                rng.choice([*content[group], "new", "\x1b]0;title\x07"])
                if isinstance(content[group], dict)
                else ""
            )
            if isinstance(content[group], dict):
                content[group][key] = value
    text = json.dumps(content).encode()
    return damaged(rng, text) if rng.random() < 0.3 else text


@few_or_many(25, 150)
def test_a_foreign_record_stops_no_other(tmp_path, count):
    experiment, rng = toolkit.Experiment(device="cpu"), random.Random(3)
    RunRecord.of_failure(experiment, "right").save(tmp_path / "right")
    for number in range(count):
        folder = tmp_path / experiment.name
        folder.mkdir(exist_ok=True)
        (folder / FILE_NAME).write_bytes(hostile_record(rng, tmp_path / "right" / FILE_NAME))
        with warnings.catch_warnings(), not_hanging():
            warnings.simplefilter("ignore")
            frame, left_out = read(tmp_path)
            assert "right" in list(frame.error) and len(frame) + len(left_out) >= 1
            compare(frame)
            shown = as_text(frame).to_string()
            assert "\x1b" not in shown and "\x07" not in shown, number
            finished_folder(experiment, tmp_path)


@few_or_many(25, 150)
def test_any_sweep_file_is_experiments_or_one_line(tmp_path, count):
    rng, wholes = random.Random(4), [path.read_bytes() for path in sorted(PRESETS.glob("*.yaml"))]
    pieces = [b"&a ", b"*a", b"<<: *a", b"!!python/name:os.system ", b"!!int ", b"0x1F", b"1:30", b"9" * 9999,
              b"[" * 99, b"{a: " * 99, b"- " * 99, b"? ", b"\x00", b"\xff", b"\t", b"...\n---\n",
              b"!!merge <<: *a"]  # fmt: skip
    for _ in range(count):
        content = rng.choice(wholes)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            content = content[:at] + rng.choice(pieces) + content[at:]
        path = tmp_path / "sweep.yaml"
        path.write_bytes(damaged(rng, content) if rng.random() < 0.3 else content)
        with warnings.catch_warnings(), not_hanging():
            warnings.simplefilter("ignore")
            try:
                assert read_sweep(path)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 10_000


@few_or_many(6, 150)
def test_any_folder_of_pictures_is_loaded_or_refused(tmp_path, count):
    """Pipes, sockets, loops of links, odd names and damaged pictures among good ones."""
    rng = random.Random(5)
    for number in range(count):
        top = tmp_path / str(number)
        for kind in ("cat", "dog"):
            (top / kind).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (i, number % 256, 0)).save(top / kind / f"{i}.png")
        good = (top / "cat" / "0.png").read_bytes()
        for _ in range(rng.randint(1, 6)):
            name = rng.choice(
                ["a.png", "b", "\x1b[31m.png", "\udc80.jpg", "c.ppm", "d" * 200 + ".png", "e\nf.gif", "g.tif"]
            )
            place = top / rng.choice(["cat", "dog", ""]) / name
            if os.path.lexists(place):
                continue
            what = rng.randrange(7)
            if what == 0:
                os.mkfifo(place)
            elif what == 1:
                place.symlink_to(rng.choice([place, top, "/dev/zero", "/dev/null", "/nowhere"]))
            elif what == 2 and len(str(place)) < 100:
                with socket.socket(socket.AF_UNIX) as bound:
                    bound.bind(str(place).encode("utf-8", "surrogateescape"))
            elif what == 3:
                place.write_bytes(b"P3 4000 4000 255\n" + b"#\n" * 100_000)
            elif what == 4:
                with open(place, "wb") as file:
                    file.truncate(10**12)
            else:
                place.write_bytes(damaged(rng, good))
        with not_hanging():
            try:
                splits = toolkit.load_dataset(f"folder:{top}")
                text = splits.summary()
                [splits.train[i] for i in range(len(splits.train))]
            except InputError as error:
                text = str(error)
        text.encode()
        assert not set(text) & set("\x1b\x07")


@pytest.mark.parametrize(
    "name", ["folder:", "folder:a\x00b", "folder:~nobody-here/x", "folder:\udc80", "folder:" + "x" * 9999]
)
def test_names_that_are_no_folders_are_bad_input(name):
    with pytest.raises(InputError) as raised:
        toolkit.load_dataset(toolkit.Experiment(dataset=name, device="cpu").dataset)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    str(raised.value).encode()
