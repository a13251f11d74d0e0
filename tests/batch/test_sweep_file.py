"""Sweep files: what they name, in which order, and what they refuse."""

import itertools
import os
import warnings
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import toolkit
from toolkit.__main__ import main
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.batch import sweep_file
from toolkit.batch.sweep_file import check_count, preset, read_sweep
from toolkit.errors import InputError
from toolkit.methods import METHODS as ALL_METHODS

METHODS = ["full", "lora", "qlora", "bitfit"]
STRATEGIES = ["none", "static", "threshold", "planned"]


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """`write(content)`: the path of a sweep file with this text, or this content as YAML."""
    folder = tmp_path_factory.mktemp("sweeps")

    def to_file(content):
        path = folder / "sweep.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return to_file


def some_of(values):
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


@given(some_of(METHODS), some_of(STRATEGIES), st.integers(1, 4), st.data())
def test_law_product_minus_exclusions_in_order(write, methods, strategies, seeds, data):
    pairs = list(itertools.product(methods, strategies))
    excluded = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=len(pairs) - 1))
    content = {"grid": {"method": methods, "checkpointing": strategies}, "seeds": seeds}
    if excluded:
        content["exclude"] = [{"method": m, "checkpointing": c} for m, c in excluded]
    experiments = read_sweep(write(content))
    expected = [(s, m, c) for s in range(seeds) for m, c in pairs if (m, c) not in excluded]
    assert [(e.seed, e.method, e.checkpointing) for e in experiments] == expected
    assert read_sweep(write(content)) == experiments


@given(
    st.lists(
        st.builds(
            toolkit.Experiment,
            method=st.sampled_from(METHODS),
            budget=st.integers(1, 2**40),
            epochs=st.integers(1, 1000),
            lr=st.floats(0, 1),
            pretrained=st.booleans(),
            seed=st.integers(0, 2**31 - 1),
        ),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_law_parameters_survive_the_file(write, experiments):
    assert read_sweep(write({"runs": [e.flat_dict() for e in experiments]})) == experiments


def test_several_grids_run_one_after_the_other(write):
    grids = [{"method": ["lora", "dora"], "rank": [2, 4]}, {"method": ["full"], "batch_size": [8, 16]}]
    experiments = read_sweep(write({"common": {"epochs": 1}, "grid": grids, "seeds": [5]}))
    expected = [("lora", 2, 64), ("lora", 4, 64), ("dora", 2, 64), ("dora", 4, 64)]
    expected += [("full", None, 8), ("full", None, 16)]  # which has no rank
    assert [(e.method, e.options.get("rank"), e.batch_size) for e in experiments] == expected
    assert {(e.epochs, e.seed) for e in experiments} == {(1, 5)}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
parameters = st.dictionaries(st.sampled_from(["method", "lr", "seed", "budget", "pretrained"]), anything)


@given(
    st.dictionaries(
        st.sampled_from(["common", "grid", "runs", "exclude", "seeds", "baselines"]),
        anything | parameters | st.lists(parameters, max_size=2),
    )
)
def test_law_any_file_gives_experiments_or_one_clear_error(write, content):
    path = write(content)
    with warnings.catch_warnings(action="ignore"):  # of repeated experiments
        try:
            experiments = read_sweep(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert experiments and len(set(experiments)) == len(experiments)


def test_the_documented_example(write):
    example = sweep_file.__doc__.split("\n\n")[1]
    experiments = read_sweep(write(example))
    found = Counter(e.seed for e in experiments if isinstance(e, toolkit.Experiment))
    assert found == {0: 10, 1: 10, 2: 10}  # 2 x 2 x 2 + 2 of the grid, one excluded, and one run
    assert {e.budget_bytes for e in experiments if isinstance(e, toolkit.Experiment)} == {18 * 2**20}
    baselines = [e for e in experiments if isinstance(e, BaselineExperiment)]
    assert [(e.protocol, e.seed) for e in baselines] == [("logreg", 0), ("knn", 0)]  # nothing is drawn


def test_runs_and_grids_override_common(write):
    text = "common: {epochs: 9, lr: 0.5}\ngrid: {epochs: [1, 2]}\nruns: [{lr: 0.25}]"
    assert [(e.epochs, e.lr) for e in read_sweep(write(text))] == [(1, 0.5), (2, 0.5), (9, 0.25)]


def test_an_exclusion_matches_defaults_and_other_spellings(write):
    text = "grid: {budget: [1 GiB, 2 GiB]}\nexclude: [{budget: 1024 MiB, precision: fp32}]"
    assert [e.budget_bytes for e in read_sweep(write(text))] == [2**31]


def test_a_repeated_experiment_runs_once(write):
    text = "grid: {method: [lora, full, lora]}\nruns: [{method: full}]\nseeds: 2"
    with pytest.warns(UserWarning, match="repeat 1 experiments; each is run once"):
        experiments = read_sweep(write(text))
    assert [(e.method, e.seed) for e in experiments] == [("lora", 0), ("full", 0), ("lora", 1), ("full", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gird: {method: [lora]}", "unknown key of the file 'gird'. Did you mean 'grid'"),
        ("grid: {methd: [lora]}", "unknown key of grid 'methd'. Did you mean 'method'"),
        ("grid: {method: [lorra]}", "unknown method 'lorra'. Did you mean 'lora'"),
        ("runs: [{method: lora}, {methd: full}]", r"key of runs\[2\] 'methd'"),
        ("baselines: {grid: {baselin: [demo_vit]}}", "key of baselines.grid 'baselin'"),
        ("baselines: {seeds: 3}", "unknown key of baselines 'seeds'"),
        ("", "the file must be a mapping"),
        ("- lora", "the file must be a mapping"),
        ("{}", "the file is empty"),
        ("seeds: 3", "nothing to run"),
        ("baselines: {common: {dataset: digits}}", "baselines.grid and baselines.runs are both missing"),
        ("grid: {}", "grid is empty"),
        ("grid: {method: []}", "grid.method is empty"),
        ("grid: {method: lora}", "grid.method must be a list"),
        ("grid: [lora]", r"grid\[1\] must be a mapping"),
        ("grid: [{method: [lora]}, {method: []}]", r"grid\[2\].method is empty"),
        ("grid: lora", "grid must be a mapping"),
        ("runs:", "runs must be a list"),
        ("grid: {seed: [1]}\nexclude: {seed: 1}", "exclude must be a list"),
        ("common: {method: [lora]}\nruns: [{seed: 1}]", r"method must be str, got \['lora'\]"),
        ("runs: [{method: full, rank: 4}]", "rank is an option of lora, .*; choose one of these"),
        ("runs: [{epochs: 1.5}]", "epochs must be int"),
        ("grid: {checkpointing: [no]}", "unknown checkpointing strategy 'no'"),
        ("runs: [{seed: yes}]", "seed must be int, got 'yes'"),
        ("runs: [{seed: true}]", "seed must be int, got True"),
        ("grid: {lr: ['1e-3']}", "lr must be float, got '1e-3'"),
        ("grid: {method: [~]}", "method must be str, got None"),
        ("grid: {method: [lora]}\ngrid: {method: [full]}", "'grid' is there twice.*line 2"),
        ("grid: {method: [lora}", "is not YAML.*line 1"),
        ("[" * 5000, "is not YAML"),
        ("!!python/object/apply:os.system ['touch pwned']", "is not YAML"),
        ("grid: &again {method: [*again]}", "is not YAML.*'again' stands for nothing before it"),
        ("grid: [&a [1, 1], " + "".join(f"&a [{'*a, ' * 9}], " for _ in range(9)) + "]", "100,000 values"),
        (f"grid: {{seed: &a [1, 1], rank: &b [{'*a,' * 999}], lr: [{'*b,' * 999}]}}", "100,000 values"),
        ("grid: {rank: !!int [0x1F]}", "the tag"),
        ("grid: {rank: [!!int 1:30:59]}", "the tag"),
        ("grid: {rank: [0x1F]}", "rank must be int, got '0x1F'"),
        ("grid: {rank: [1:30]}", "rank must be int, got '1:30'"),
        ("grid: {lr: [%s]}" % ("9" * 5000), "more than 30 characters"),
        ("<<: {grid: {seed: [1]}}", "unknown key of the file '<<'"),
        ("? [grid]\n: 3", "a key that is not a name"),
        ("grid: {seed: [1]}\n---\nruns: 3", "several documents"),
        ("grid: {%s: [1]}" % ("a" * 1000), "unknown key of grid 'aaaa.*aaa'.*Valid"),
        ("runs: [{}]", r"runs\[1\] is empty"),
        ("seeds: 0\nruns: [{method: lora}]", "seeds must be a count from 1 to 100,000 or a list, got 0"),
        ("seeds: true\nruns: [{method: lora}]", "seeds must be a count"),
        ("seeds: [a]\nruns: [{method: lora}]", "seed must be int, got 'a'"),
        ("seeds: 2\nruns: [{seed: 3}]", "keep one of the two"),
        ("seeds: 1_000_000_000_000_000_000_000\nruns: [{method: lora}]", "seeds must be a count from 1 to"),
        ("seeds: [0, 1, 0]\nruns: [{method: lora}]", "seeds has the same one twice"),
        ("seeds: 100\ngrid: {epochs: &n %s, rank: *n}" % ([1] * 100), "names 1,000,000 experiments"),
        ("runs: [{method: lora}]\nexclude: [{method: full}]", r"exclude\[1\] matches no.*method is {'lora'}"),
        ("runs: [{method: lora}]\nexclude: [{budget: lots}]", "'lots' is not a size"),
        ("runs: [{method: lora}]\nexclude: [{epochs: '5'}]", r"exclude\[1\] matches no"),
        ("grid: {seed: [1, 2]}\nexclude: [{method: lora}]", r"exclude\[1\] leave no experiment"),
        ("grid: {seed: [1, 2]}\nexclude: [{seed: 1}, {seed: 2}]", r"exclude\[1\] and exclude\[2\] leave no"),
    ],
)
def test_bad_files_are_named_with_key_and_remedy(write, text, message):
    path = write(text)
    with pytest.raises(InputError, match=f"^{path}: .*{message}") as raised:
        read_sweep(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_unreadable_files_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml: cannot be read \(No such file"):
        read_sweep(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(tmp_path)
    (tmp_path / "picture.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"picture\.yaml: is not YAML"):
        read_sweep(tmp_path / "picture.yaml")


def test_a_preset_is_chosen_by_name():
    with pytest.raises(InputError, match=r"unknown preset 'dmo'\. Did you mean 'demo'"):
        preset("dmo")


def test_preset_demo_is_complete():
    experiments = preset("demo")
    assert {(e.dataset, e.backbone, e.budget_bytes) for e in experiments} == {
        ("digits", "demo_vit", 18 * 2**20)
    }
    assert len({e.method for e in experiments}) == 5
    assert len({(e.method, e.checkpointing, e.seed) for e in experiments}) == len(experiments) == 5 * 4 * 3


def test_preset_paper_is_complete():
    experiments = preset("paper")
    tuned = [e for e in experiments if isinstance(e, toolkit.Experiment)]
    levels = ("dataset", "backbone", "method", "checkpointing", "seed")
    assert [len({getattr(e, name) for e in tuned}) for name in levels] == [2, 4, 5, 4, 3]
    assert len({e.id for e in tuned}) == len(tuned) == 2 * 4 * 5 * 4 * 3
    assert {(e.budget, e.precision) for e in tuned} == {(2_000_000_000, "bf16")}
    baselines = Counter(e.baseline for e in experiments if isinstance(e, BaselineExperiment))
    once, thrice = ("openclip_b16", "siglip_b16", "dinov2_b"), ("paligemma", "mobilevlm_1.7b", "smolvlm")
    assert baselines == dict.fromkeys(once, 2) | dict.fromkeys(thrice, 6)  # of two data sets
    check_count(experiments)


def test_preset_edge_runs_every_method_that_convolutions_allow():
    runs = preset("edge")
    methods = {run.method for run in runs if run.dataset == "digits-c:mixed:5"}
    assert methods == {name for name, m in ALL_METHODS.items() if not m.frozen_backbone} - {"qlora"}
    assert {run.seed for run in runs} == {0, 1, 2} and len(runs) == len(set(runs)) <= 140
    ranks = {run.options["rank"] for run in runs if run.method == "lora" and run.batch_size == 64}
    assert ranks == {1, 4, 8, 16, 64}
    galore = [run for run in runs if run.method == "galore" and run.batch_size == 64]
    assert {run.options["rank"] for run in galore} == {1, 4, 16, 32, 64}
    assert {run.options["gap"] for run in galore if run.options["rank"] == 32} == {1, 5, 20, 50}


def test_preset_edge_paper_needs_no_confirmation():
    runs = preset("edge_paper")
    check_count(runs)
    assert {run.backbone for run in runs} == {
        "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100"
    }  # fmt: skip


def test_too_many_runs_need_a_confirmation():
    experiments = [toolkit.Experiment()] * 11
    with pytest.raises(InputError, match=r"has 11 runs, more than 10;.*--yes"):
        check_count(experiments, limit=10)
    check_count(experiments, limit=10, yes=True)
    check_count(experiments, limit=11)


def test_the_command_line_lists_a_sweep_and_starts_nothing(tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text("grid: {method: [lora, full], checkpointing: [none]}\nseeds: 2\n")
    assert main(["sweep", str(file), "--dry-run", "--runs", str(tmp_path / "runs")]) == 0
    output = capsys.readouterr().out
    assert "4 runs, 0 finished" in output and output.count("digits-demo_vit-") == 4
    assert not (tmp_path / "runs").exists()
    file.write_text("grid: {method: [lora], seed: [" + ", ".join(map(str, range(1001))) + "]}\n")
    assert main(["sweep", str(file)]) == 2
    assert "pass --yes" in capsys.readouterr().err
    file.write_text("grid: {methodd: [lora]}\n")
    assert main(["sweep", str(file), "--dry-run"]) == 2
    assert "Did you mean 'method'" in capsys.readouterr().err


def test_a_file_that_is_too_large_or_no_file_is_refused_at_once(tmp_path):
    (tmp_path / "large.yaml").write_text("# " + "x" * 1_000_000)
    with pytest.raises(InputError, match=r"1,000,002 bytes are more than 1,000,000"):
        read_sweep(tmp_path / "large.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read"):
            read_sweep(path)
