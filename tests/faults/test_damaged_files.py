"""Whatever happens to a file that is read back, its content is used whole or not at all."""

import json
import random
import warnings

import pytest
import torch
from draws import damaged, few_or_many, not_hanging
from torch import nn

import toolkit
from toolkit.cache import kept, kept_rows
from toolkit.errors import InputError
from toolkit.methods.weights import trained_state
from toolkit.training.record import RunRecord
from toolkit.training.resume import Snapshots


def record(tmp_path):
    experiment = toolkit.Experiment(device="cpu")
    RunRecord.of_failure(experiment, "12 of 34").save(tmp_path / "run")

    def read():
        frame = toolkit.load_records(tmp_path)
        return frame.drop(columns="folder").to_dict("records") if len(frame) else None

    return tmp_path / "run" / "record.json", read


def snapshot(tmp_path):
    snapshots = Snapshots(tmp_path)
    snapshots.save(3, {"weights": torch.arange(50.0), "step": 3})

    def read():
        state = snapshots.newest()
        return state and {"weights": state["weights"].tolist(), "step": state["step"]}

    return tmp_path / "snapshots" / "step-00000003.pt", read


def manifest(tmp_path):
    path, read = snapshot(tmp_path)
    return path.with_suffix(".json"), read


def answer(tmp_path):
    question, right = {"asked": [1, 2]}, {"number": 12.5, "text": "x", "list": [1, 2, 3]}
    kept(tmp_path, question, lambda: right)
    (path,) = tmp_path.glob("*.json")
    return path, lambda: kept(tmp_path, question, lambda: None)


def rows(name):
    def make(tmp_path):
        records = torch.arange(40.0).numpy().view([("features", "<f4", (4,))])

        def ask(make):
            found, meta, _ = kept_rows(tmp_path, {"asked": 1}, 10, make)
            return found[list(range(10))]["features"].tolist(), meta

        def made(answer):
            def make(write):
                write(records)
                return answer

            return make

        ask(made({"seconds": 1.25}))

        def read():
            values, meta = ask(made(None))
            return (values, meta) if meta is not None else None

        (path,) = tmp_path.glob(f"*/{name}")
        return path, read

    make.__name__ = name
    return make


def weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    path = toolkit.save_adapted(model, tmp_path / "adapted.safetensors")

    def read():
        other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        try:
            toolkit.load_adapted(other, path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return None
        return {name: value.tolist() for name, value in trained_state(other).items()}

    return path, read


@pytest.mark.parametrize(
    "make", [record, snapshot, manifest, answer, rows("rows.npy"), rows("meta.json"), weights]
)
@few_or_many(40, 600)
def test_damage_is_seen(tmp_path, make, count):
    path, read = make(tmp_path)
    right, whole, rng, silent = read(), path.read_bytes(), random.Random(0), []
    assert right is not None
    for number in range(count):
        content = damaged(rng, whole)
        path.write_bytes(content)
        with warnings.catch_warnings(), not_hanging():
            warnings.simplefilter("ignore")
            found = read()
        if found is not None and found != right:
            silent.append((number, content))
        path.write_bytes(whole)
        if read() != right:  # it was made again
            path, read = make(tmp_path / str(number))
            whole = path.read_bytes()
    assert silent == []


def test_a_sealed_file_names_what_is_wrong_with_it(tmp_path):
    path, _ = record(tmp_path)
    content = json.loads(path.read_text())
    content["config"]["epochs"] += 1
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="damaged: its digest is another one"):
        assert toolkit.load_records(tmp_path).empty
