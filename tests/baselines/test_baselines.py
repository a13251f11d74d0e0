"""One interface for three families, on small models of the real classes and on the embedded backbone."""

import json

import pandas as pd
import pytest
import torch
from tiny_models import tiny_hub

import toolkit
from toolkit.__main__ import main
from toolkit.analysis import compare, means, standing
from toolkit.baselines import BASELINES, BaselineExperiment, evaluate, evaluate_baseline
from toolkit.baselines.probes import fit_probe
from toolkit.datasets import in_memory
from toolkit.errors import InputError
from toolkit.plots.runs import accuracy_against
from toolkit.training.record import is_finished

GROUPS = ("quality", "time", "energy", "memory", "flops", "scores", "env")
TEXTS = ["What type of object is in this photo?", "a photo of the number: 0 1 2 3 4 5 6 7 8 9"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.baselines.features.CACHE", tmp_path / "features")


@pytest.fixture(scope="module")
def ten_digits(digits):
    """20 images a split; every class in each."""
    rows = {split: [] for split in ("train", "val", "test")}
    for split, found in rows.items():
        labels = getattr(digits, split).labels
        for label in range(10):
            found += [row for row in range(len(labels)) if labels[row] == label][:2]
    parts = {
        split: (getattr(digits, split).images[found], getattr(digits, split).labels[found])
        for split, found in rows.items()
    }
    return in_memory("digits", parts, digits.classes, digits.policy)


def checked(record, tmp_path):
    """Check that the record is complete, explains its nulls, and is a row of the table."""
    nulls = {name for group in GROUPS for name, value in getattr(record, group).items() if value is None}
    assert nulls == set(record.missing) and all(record.missing.values())
    assert record.run["phase"] == "inference" and record.run["status"] == "ok"
    json.dumps(record.curves["choices"])
    record.overview()
    record.save(tmp_path / "runs" / "one")
    (row,) = toolkit.load_records(tmp_path / "runs").itertuples()
    assert row.test_peak_bytes > 0 and row.prepare_seconds > 0 and row.prepare_peak_bytes > 0
    assert row.ns_m_inference == toolkit.netscore(
        "NS-M", row.test_top1_pct, peak_mib=row.test_peak_bytes / 2**20
    )
    return row


@pytest.mark.parametrize(
    ("dataset", "protocol", "least"), [("digits", "knn", 85), ("textures", "logreg", 60)]
)
def test_frozen_features_of_the_embedded_backbone(dataset, protocol, least, tmp_path):
    record = evaluate_baseline("demo_vit", dataset, protocol=protocol)
    row = checked(record, tmp_path)
    assert row.test_top1_pct > least and row.val_top1_pct > least and not row.prepare_cached
    assert row.within_budget and row.backbone == "demo_vit" and row.method == protocol
    again = evaluate_baseline("demo_vit", dataset, protocol=protocol)
    assert again.time["prepare_cached"] and again.quality["test_top1_pct"] == row.test_top1_pct
    assert again.time["prepare_seconds"] > 0 and again.run["experiment_id"] == record.run["experiment_id"]


@pytest.mark.parametrize("protocol", ["centroid", "ridge", "lda", "linear_grid"])
def test_other_protocols(protocol, ten_digits, tmp_path, monkeypatch):
    monkeypatch.setitem(fit_probe.__wrapped__.__kwdefaults__, "iterations", 20)
    row = checked(evaluate_baseline("demo_vit", ten_digits, protocol=protocol), tmp_path)
    assert row.method == protocol and row.params_trainable > 0 and row.n_train == 20


@pytest.mark.parametrize("name", ["openclip_b32", "siglip2_b16"])
def test_contrastive(name, ten_digits, tmp_path):
    source = str(tiny_hub(name, tmp_path / "hub", TEXTS))
    record = evaluate_baseline(name, ten_digits, source=source)
    row = checked(record, tmp_path)
    assert row.method == "zero_shot" and row.test_loss > 0 and row.params_trainable == 0
    assert "folder" in record.missing["predicted_peak_bytes"]


@pytest.mark.parametrize(
    ("name", "form", "protocol"),
    [
        ("smolvlm_256m", "fp32", "likelihood"),
        ("smolvlm2_256m", "bf16", "generate"),
        ("paligemma", "nf4_pruned", "likelihood"),
        ("paligemma2", "nf4", "likelihood"),
        ("mobilevlm_v2_1.7b", "fp32", "likelihood"),
    ],
)
def test_generative(name, form, protocol, ten_digits, tmp_path):
    source = str(tiny_hub(name, tmp_path, TEXTS))
    record = evaluate_baseline(
        name, ten_digits, protocol=protocol, source=source, form=form, batch_size=8, budget="64MiB"
    )
    row = checked(record, tmp_path)
    choices = record.curves["choices"]
    if protocol == "generate":
        assert 0 <= row.unmatched_pct <= 100 and row.test_loss is None and row.test_top5_pct is None
    else:
        offered = {"sibling"} if form == "nf4_pruned" else {"sum", "mean", "pmi", "sibling"}
        assert offered | {"aggregation", "images"} == set(choices)
        assert row.val_top1_pct == choices[choices["aggregation"]] == max(choices[how] for how in offered)
    assert row.form == form


def test_one_table_holds_baselines_and_fine_tuned_models(ten_digits, tmp_path, demo_model):
    experiment = toolkit.Experiment(epochs=1, batch_size=20, device="cpu", method="linear")
    model = demo_model("linear")
    result = toolkit.fit(model, ten_digits, experiment)
    evaluation = toolkit.test(model, ten_digits, experiment, result)
    toolkit.RunRecord.of_run(experiment, ten_digits, model, result, evaluation).save(tmp_path / "runs" / "a")
    for protocol in ("knn", "ridge"):
        evaluate_baseline("demo_vit", ten_digits, protocol=protocol).save(tmp_path / "runs" / protocol)
    records = toolkit.load_records(tmp_path / "runs")
    table = compare(records)
    assert list(table.method) == ["linear", "knn", "ridge"]
    assert not (table[["test accuracy (%)", "peak memory (MiB)", "time (s)"]] == "–").any().any()
    ranks = standing(records, "inference").pareto_rank
    assert ranks.notna().all() and min(ranks) == 1
    assert accuracy_against(means(records), "memory").axes


def test_predicted_peak_holds_where_weights_are_published(ten_digits):
    record = evaluate_baseline("demo_vit", ten_digits, protocol="ridge", batch_size=16)
    predicted, measured = record.memory["predicted_peak_bytes"], record.memory["test_peak_bytes"]
    assert measured == pytest.approx(predicted, rel=0.1)


def no_long_work(monkeypatch):
    def never(*_):
        raise AssertionError("long work began")

    monkeypatch.setattr(evaluate, "load_dataset", never)
    monkeypatch.setattr(evaluate, "prepare", never)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dinov2", {}, "Did you mean 'dinov2_"),
        ("dinov2_s", {"protocol": "knnn"}, "Did you mean 'knn'"),
        ("dinov2_s", {"protocol": "zero_shot"}, "protocol of 'dinov2_s'"),
        ("dinov2_s", {"form": "nf4"}, "form of the weights of 'dinov2_s' 'nf4'"),
        ("dinov2_s", {"budget": "20MB"}, "needs .* above the budget of"),
        ("smolvlm_256m", {"protocol": "generate", "form": "nf4_pruned"}, "cannot generate"),
        ("smolvlm_256m", {"budget": "50MB"}, "needs .* above the budget of"),
        ("smolvlm_256m", {"source": "/nowhere"}, "no such folder"),
        ("demo_vit", {"batch_size": 0}, "batch_size must lie"),
    ],
)
def test_bad_input_ends_before_any_long_work(name, parameters, message, monkeypatch):
    no_long_work(monkeypatch)
    with pytest.raises(InputError, match=message):
        evaluate_baseline(name, "cifar100", device="cpu", **parameters)


def test_classes_that_read_alike_are_refused(ten_digits):
    parts = {split: (getattr(ten_digits, split).images, getattr(ten_digits, split).labels) for split in
             ("train", "val", "test")}  # fmt: skip
    twins = in_memory("digits", parts, ["a b", "a_b", *"cdefghij"], ten_digits.policy)
    with pytest.raises(InputError, match="read alike"):
        evaluate_baseline("openclip_b32", twins)


def test_no_hub_is_one_clear_error(ten_digits):
    for name in ("dinov2_s", "smolvlm_256m"):
        with pytest.raises(InputError, match=r"[Cc]onnect"):
            evaluate_baseline(name, ten_digits)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def nan_scores(model, images):
    return torch.full((len(images), 10), torch.nan)


def nan_features(model, images):
    return torch.full((len(images), 96), torch.nan)


@pytest.mark.parametrize(
    ("place", "what", "status"),
    [
        ("features.Frozen.forward", out_of_memory, "oom"),
        ("probes.fit_probe", out_of_memory, "oom"),
        ("features.Frozen.forward", nan_scores, "nan"),
        ("features.FeatureExtractor.forward", nan_features, "nan"),
        (None, None, "failed"),
    ],
)
def test_every_outcome_is_a_record_that_tables_accept(place, what, status, ten_digits, monkeypatch, tmp_path):
    """Alone, and next to a run that ended well."""
    if place is None:
        experiment = BaselineExperiment(baseline="demo_vit", protocol="ridge")
        record = toolkit.RunRecord.of_failure(experiment, "the kernel died")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(f"toolkit.baselines.{place}", what)
            record = evaluate_baseline("demo_vit", ten_digits, protocol="ridge")
    assert (record.run["status"], record.run["phase"]) == (status, "inference") and record.run["error"]
    record.overview()
    if status != "failed":
        assert record.quality["test_top1_pct"] is None and is_finished_after(record, tmp_path / "runs" / "it")
        nulls = {name for group in GROUPS for name, value in getattr(record, group).items() if value is None}
        assert nulls == set(record.missing) and all(record.missing.values())
    record.save(tmp_path / "runs" / "it")
    for beside in (False, True):
        if beside:
            well = evaluate_baseline("demo_vit", ten_digits, protocol="knn")
            well.save(tmp_path / "runs" / "knn")
        records = toolkit.load_records(tmp_path / "runs")
        table = compare(records)
        assert not beside or list(table["not ok"]) == ["", status]
        assert list(table.backbone) == ["demo_vit"] * len(table)
        standing(records, "inference")
        if beside:
            accuracy_against(means(records), "memory")


def is_finished_after(record, folder):
    record.save(folder)
    return is_finished(folder)


def test_old_records_count_as_fine_tuned_runs(ten_digits, tmp_path):
    """Old records have no phase; runs that differ are not averaged."""
    evaluate_baseline("demo_vit", ten_digits, protocol="knn").save(tmp_path / "knn")
    frame = toolkit.load_records(tmp_path)
    old = {"status": "ok", "dataset": "digits", "backbone": "demo_vit", "method": "full", "seed": 0,
           "checkpointing": "none", "within_budget": True, "params_trainable": 1, "train_seconds": 1.0,
           "train_peak_bytes": 2**20, "test_top1_pct": 90.0}  # fmt: skip
    rows = [old | {"budget_bytes": 100}, old | {"budget_bytes": 50, "test_top1_pct": 60.0}]
    table = compare(pd.concat([frame, pd.DataFrame(rows)], ignore_index=True))
    assert sorted(table.loc[table.method == "full", "test accuracy (%)"]) == ["60.00", "90.00"]


def test_a_run_of_baselines_from_the_command_line(tmp_path, capsys):
    flags = ["--baseline", "demo_vit", "--protocol", "centroid", "--runs", str(tmp_path)]
    assert main(["run", *flags]) == 0
    (record,) = toolkit.load_records(tmp_path).itertuples()
    assert (record.status, record.method, record.phase) == ("ok", "centroid", "inference")
    assert record.test_top1_pct > 75
    assert "centroid" in capsys.readouterr().out
    assert main(["run", *flags, "--method", "lora"]) == 2
    assert "--method is not for baselines" in capsys.readouterr().err
    assert main(["run", "--protocol", "knn"]) == 2
    assert "--protocol needs --baseline" in capsys.readouterr().err


def test_every_baseline_names_its_licence():
    assert len(BASELINES) > 20
    for name, baseline in BASELINES.items():
        assert baseline.license and BaselineExperiment(baseline=name, device="cpu").protocol
