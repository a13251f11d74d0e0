"""Batch execution and the command line, on runs of one short epoch where a run is needed."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import filelock
import nbformat
import papermill
import pytest
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from PIL import Image

import toolkit
from toolkit.__main__ import main, phases
from toolkit.backbones import demo
from toolkit.batch import kernels, report, sweep
from toolkit.batch.sweep_file import presets
from toolkit.errors import InputError, Stopped
from toolkit.files import NOTEBOOKS
from toolkit.forecast.forecasts import TrainingStep
from toolkit.training.loop import FitResult
from toolkit.training.record import RunRecord, run_fields


def test_a_grid_is_the_product_of_its_lists():
    experiments = sweep.grid(method=["lora", "full"], seed=[0, 1, 2])
    assert [(e.method, e.seed) for e in experiments] == [(m, s) for m in ("lora", "full") for s in range(3)]


def test_default_comparison_is_the_documented_one():
    experiments = sweep.grid(**sweep.DEFAULT_COMPARISON)
    assert len(experiments) == 8 and len({e.id for e in experiments}) == 8


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"methd": "lora"}, "unknown parameter of 1_finetune.ipynb 'methd'.*Did you mean 'method'"),
        ({'x=1;__import__("os").system("touch pwned");y': 1}, "is not an identifier"),
        ({"": 1}, "is not an identifier"),
    ],
)
def test_parameter_names_are_checked_before_papermill_sees_them(tmp_path, monkeypatch, parameters, message):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("papermill was called"))
    with pytest.raises(InputError, match=message):
        sweep.execute_notebook("1_finetune", tmp_path / "out" / "n.ipynb", parameters)
    assert not (tmp_path / "out").exists()


def test_an_unknown_notebook_is_refused(tmp_path):
    with pytest.raises(InputError, match="Did you mean '1_finetune'"):
        sweep.execute_notebook("1_finetun", tmp_path / "n.ipynb", {})


def test_notebook_declares_every_parameter_of_an_experiment():
    declared = papermill.inspect_notebook(str(NOTEBOOKS / "1_finetune.ipynb"))
    assert set(declared) == {*toolkit.Experiment().to_dict(), "runs"}


@pytest.fixture
def fake_run(monkeypatch, few_digits, demo_model):
    """Instead of a kernel: a callable decides what the run of an experiment leaves behind."""
    calls = []

    def use(behaviour):
        def execute(name, output, parameters):
            experiment = toolkit.Experiment(**{k: v for k, v in parameters.items() if k != "runs"})
            calls.append(experiment.id)
            status = behaviour(experiment)
            if status:
                record = RunRecord.of_run(
                    experiment, few_digits, demo_model("linear"), FitResult(status=status), None
                )
                record.save(output.parent)

        monkeypatch.setattr(sweep, "execute_notebook", execute)
        monkeypatch.setattr(report, "execute_notebook", report.execute_notebook)  # the report's is real
        monkeypatch.setattr(sweep, "load_dataset", lambda name: few_digits)
        return calls

    return use


def test_finished_runs_are_skipped_and_unfinished_ones_repeated(fake_run, tmp_path):
    statuses = iter(["ok", "nan", "oom", "interrupted"])
    calls = fake_run(lambda _: next(statuses))
    experiments = sweep.grid(seed=[0, 1, 2, 3])
    assert sweep.run_experiments(experiments, tmp_path) == [experiments[3]]
    calls = fake_run(lambda _: "ok")
    calls.clear()
    assert sweep.run_experiments(experiments, tmp_path) == []
    assert calls == [experiments[3].id]


def test_runs_that_ended_out_of_memory_are_tried_again_if_asked_for(fake_run, tmp_path):
    (experiment,) = sweep.grid(seed=[0])
    calls = fake_run(lambda _: "oom")
    for retry, times in (((), 1), ((), 1), (("oom",), 2)):
        assert sweep.run_experiments([experiment], tmp_path, retry=retry) == []
        assert len(calls) == times
    fake_run(lambda _: None)  # a kernel that leaves no record of its own
    assert sweep.run_experiments([experiment], tmp_path, retry=("oom",)) == [experiment]
    fake_run(lambda _: "ok")
    assert sweep.run_experiments([experiment], tmp_path) == []
    assert toolkit.load_records(tmp_path).status.tolist() == ["ok"]


@pytest.mark.parametrize("saved", ["interrupted", None])
def test_a_signal_ends_a_sweep_after_its_run_and_keeps_what_is_saved(fake_run, tmp_path, saved, capsys):
    def behaviour(experiment):
        if saved:
            RunRecord.of_failure(experiment, "at step 3", saved).save(
                toolkit.run_folder(experiment, tmp_path)
            )
        raise Stopped(signal.SIGTERM)

    calls = fake_run(behaviour)
    arguments = ["run", "--method", "linear", "--seed", "0", "1", "--runs", str(tmp_path)]
    assert main(arguments) == 143
    assert len(calls) == 1 and "continues from here" in capsys.readouterr().err
    records = toolkit.load_records(tmp_path)
    assert records.status.tolist() == ["interrupted"]
    assert records.error.tolist() == ["at step 3" if saved else "stopped by SIGTERM"]


def test_signals_are_passed_on_to_kernels_and_waited_for():
    """A process stands for the kernel: it ends well at SIGTERM, whatever the signal was."""
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)):
        with pytest.raises(Stopped) as stopped, kernels.passing_on_signals():
            (notebook,) = kernels._running
            with subprocess.Popen(["sleep", "60"]) as process:
                notebook.pid = process.pid
                os.kill(os.getpid(), number)
                assert process.wait() == -signal.SIGTERM
            raise DeadKernelError("Kernel died")
        assert stopped.value.status == status and not kernels._running
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_dead_kernel_is_a_failure_with_a_record_and_the_rest_goes_on(fake_run, tmp_path):
    def behaviour(experiment):
        if experiment.seed == 0:
            raise DeadKernelError("Kernel died")
        return None if experiment.seed == 1 else "ok"  # a notebook that ends without a record

    fake_run(behaviour)
    experiments = sweep.grid(seed=[0, 1, 2])
    assert sweep.run_experiments(experiments, tmp_path) == experiments[:2]
    frame = toolkit.load_records(tmp_path).set_index("seed")
    assert frame.status.to_dict() == {0: "failed", 1: "failed", 2: "ok"}
    assert frame.error[0] == "DeadKernelError: Kernel died"
    assert "without a finished record" in frame.error[1]


@pytest.mark.parametrize("other_ends", ["finished", "gave up"])
def test_runs_of_another_process_come_last(fake_run, tmp_path, monkeypatch, other_ends):
    """The lock's holder ends while the sweep does the rest; what it leaves unfinished is done here."""
    experiments = sweep.grid(seed=[0, 1])
    folder = toolkit.run_folder(experiments[0], tmp_path)
    folder.mkdir()
    other = filelock.FileLock(folder / ".sweep.lock", is_singleton=False)
    other.acquire()

    def behaviour(experiment):
        if experiment == experiments[1]:
            if other_ends == "finished":
                record = RunRecord(
                    run=run_fields(experiments[0], "ok", None),
                    config=experiments[0].config,
                    data={"train_sha256": sweep.load_dataset("digits").hashes["train"]},
                )
                record.save(folder)
            other.release()
        return "ok"

    calls = fake_run(behaviour)
    assert sweep.run_experiments(experiments, tmp_path) == []
    assert calls == [experiments[1].id] + ([experiments[0].id] if other_ends == "gave up" else [])


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (DeadKernelError("Kernel died"), 2),
        (RuntimeError("Kernel didn't respond in 60 seconds"), 2),
        (PapermillExecutionError(3, 1, "", "ValueError", "no such file", ""), 1),
        (OSError("No space left on device"), 1),
    ],
)
def test_transient_errors_are_tried_once_more(fake_run, tmp_path, error, attempts):
    def behaviour(experiment):
        raise error

    calls = fake_run(behaviour)
    (experiment,) = sweep.grid(seed=[0])
    assert sweep.run_experiments([experiment], tmp_path) == [experiment]
    assert len(calls) == attempts


def test_a_second_attempt_may_succeed(fake_run, tmp_path):
    outcomes = iter([DeadKernelError("Kernel died"), None])

    def behaviour(experiment):
        error = next(outcomes)
        if error:
            raise error
        return "ok"

    fake_run(behaviour)
    assert sweep.run_experiments(sweep.grid(seed=[0]), tmp_path) == []
    assert toolkit.load_records(tmp_path).status.tolist() == ["ok"]


@pytest.mark.parametrize("workers", [0, 10_000])
def test_more_workers_than_devices_are_refused(fake_run, tmp_path, workers):
    calls = fake_run(lambda _: "ok")
    with pytest.raises(InputError, match="workers must be between 1 and"):
        sweep.run_experiments(sweep.grid(seed=[0]), tmp_path, workers=workers)
    assert calls == []


# --- command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lorra"], "Did you mean 'lora'"),
        (["--dataset", "digit"], "Did you mean 'digits'"),
        (["--dataset", "folder:/nowhere/at/all"], "no such folder"),
        (["--backbone", "demo_vi"], "Did you mean 'demo_vit'"),
        (["--checkpointing", "statik"], "Did you mean 'static'"),
        (["--budget", "many"], "'many' is not a size"),
        (["--budget", "-2GB"], "expected at least one argument"),
        (["--budget=-2GB"], "'-2GB' is not a size"),
        (["--budget", "1MB"], "smaller than the weights alone"),
        (["--epochs", "ten"], "invalid int value"),
        (["--pretrained", "maybe"], "neither true nor false"),
        (["--batchsize", "8"], "did you mean --batch-size?"),
        (["--epoch", "8"], "unrecognized arguments: --epoch 8; did you mean --epochs?"),
        (["--method", "full", "linear", "--rank", "4"], "rank is an option of lora, dora"),
        (["--method", "lora", "--rank", "0"], "rank must lie between"),
        (["--backbone", "resnet18", "--pretrained", "false", "--method", "qlora"], "adapts linear layers"),
        (["--backbone", "vit_small_patch16_224.nope", "--pretrained", "false"], "timm cannot build"),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_written(tmp_path, capsys, arguments, message):
    runs = tmp_path / "runs"
    try:
        status = main(["run", "--runs", str(runs), "--figures", str(tmp_path / "figures"), *arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_on_a_folder_that_does_not_exist_is_an_error(tmp_path, capsys):
    missing = tmp_path / "missing"
    assert main(["report", "--runs", str(missing)]) == 2
    assert f"{missing} does not exist" in capsys.readouterr().err and not missing.exists()


@pytest.mark.parametrize(
    "arguments", [["report", "--out", "x"], ["ranking", "--run", "x"], ["plan", "--epoch"]]
)
def test_flags_are_not_abbreviated(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_names_every_preset_and_what_each_option_means(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", "--help"])
    assert ", ".join(presets()) in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--gap INT ... steps from one choice of the subspace to the next (default 50)" in text
    for owners, meaning in {
        "lora, dora, adalora": "rank of the updates",
        "lokr": "rank of the second",
    }.items():
        section = text.split(f"options of --method {owners}:")[1].split("options of")[0]
        assert f"--rank INT ... {meaning}" in section


def test_an_option_goes_to_the_methods_that_have_it():
    experiments = sweep.grid(method=["lora", "full", "galore"], rank=[2, 4])
    found = [(e.method, e.options.get("rank")) for e in experiments]
    assert found == [("lora", 2), ("lora", 4), ("full", None), ("galore", 2), ("galore", 4)]


def test_plan_predicts_a_step_by_either_kind_of_strategy(tmp_path, capsys):
    common = ["plan", "--method", "linear", "--batch-size", "4", "--num-classes", "10", "--budget", "1GB"]
    assert main([*common, "--checkpointing", "none"]) == 0
    assert "predicted peak" in capsys.readouterr().out
    assert main([*common, "--figures", str(tmp_path)]) == 0
    assert "planned" in capsys.readouterr().out
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["memory_over_step.png", "recomputation_vs_budget.png"]
    assert main([*common, "--checkpointing", "none", "--figures", str(tmp_path)]) == 2
    assert "has none" in capsys.readouterr().err


def test_plan_counts_the_classes_of_the_data_set(tmp_path, capsys, monkeypatch):
    for kind in ("cat", "dog", "owl"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / kind / f"{number}.png")
    planned = []

    def step(experiment, classes):
        planned.append(classes)
        return TrainingStep(experiment, classes)

    monkeypatch.setattr("toolkit.forecast.forecasts.TrainingStep", step)
    common = ["plan", "--method", "linear", "--batch-size", "4", "--checkpointing", "none"]
    for data in (f"folder:{tmp_path}", "textures", "cifar100"):  # cifar100 is not there, its number is known
        assert main([*common, "--dataset", data]) == 0
    assert main([*common, "--num-classes", "7"]) == 0
    assert main(common) == 0
    assert planned == [3, 15, 100, 7, 100]
    capsys.readouterr()
    assert main([*common, "--dataset", "textures", "--num-classes", "7"]) == 2
    assert "leave one out" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_planning_shows_its_phase_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with phases("profiling", after=0) as begin:
        begin()
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(InputError), phases("profiling", after=60) as begin:
        begin()
        raise InputError("long before the bar")
    assert sys.stderr.getvalue() == ""
    with phases("profiling", "solving", after=0) as begin:
        begin()
        begin()
        while "solving" not in sys.stderr.getvalue():
            time.sleep(0.01)
    assert sys.stderr.getvalue().endswith(" \r")  # removed


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"toolkit {toolkit.__version__}\n"


def test_a_file_is_not_a_folder_of_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "--runs", str(tmp_path / "file" / "runs"), "--method", "linear"]) == 2
    assert "(Not a directory); name another folder" in capsys.readouterr().err


def test_packed_weights_are_checked_as_packed():
    """Packed to four bits they fit where they would not in full."""
    fits = toolkit.Experiment(method="qlora", batch_size=16, budget="1.8 MB")
    assert set(sweep.check_runnable([fits])) == {"digits"}
    with pytest.raises(InputError, match="smaller than the weights alone"):
        sweep.check_runnable([fits.variant(method="full")])


def test_an_error_is_one_line(fake_run, tmp_path):
    def behaviour(experiment):
        raise PapermillExecutionError(3, 1, "", "AcceleratorError", "CUDA error\nCompile with\n", "")

    fake_run(behaviour)
    sweep.run_experiments(sweep.grid(seed=[0]), tmp_path)
    assert toolkit.load_records(tmp_path).error.tolist() == ["AcceleratorError: CUDA error Compile with"]


def test_relative_folders_are_resolved_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert toolkit.Experiment(dataset="folder:photos").dataset == f"folder:{tmp_path / 'photos'}"


def test_damaged_weights_stop_the_command_line(tmp_path, capsys, monkeypatch):
    damaged = tmp_path / "demo_vit.safetensors"
    damaged.write_bytes(b"no weights")
    monkeypatch.setattr(demo, "DATA", tmp_path)
    assert main(["run", "--runs", str(tmp_path / "runs"), "--method", "linear"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_continued_after_an_update_still_ends_with_its_report(
    fake_run, tmp_path, capsys, monkeypatch
):
    """Runs of two versions are kept apart, and nothing that was finished is withheld."""
    fake_run(lambda _: "ok")
    file = tmp_path / "sweep.yaml"
    for seeds, code in ((1, "before"), (2, "after")):
        file.write_text(f"grid: {{method: [linear]}}\nseeds: {seeds}\n")
        monkeypatch.setattr("toolkit.measure.environment.code_sha256", lambda code=code: code)
        assert main(["sweep", str(file), "--runs", str(tmp_path / "runs")]) == 0
    assert "E2" in capsys.readouterr().out
    assert "E2" in (tmp_path / "runs" / "report.html").read_text()


@pytest.mark.long  # the README's first command does the same, eight times
def test_one_run_from_end_to_end(tmp_path, capsys):
    """A kernel is started: the notebook trains, leaves its record, and the report makes the figures."""
    command = [
        "run", "--runs", str(tmp_path / "runs {x}"), "--figures", str(tmp_path / "figures"),
        "--method", "linear",
        "--checkpointing", "static", "--epochs", "1", "--budget", "18 MiB",
    ]  # fmt: skip
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "linear" in output and "record.json" in output
    (record_path,) = (tmp_path / "runs {x}").glob("*/record.json")
    record = json.loads(record_path.read_text())
    assert record["run"]["status"] == "ok" and record["quality"]["test_top1_pct"] > 15
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    executed = nbformat.read(record_path.parent / "1_finetune.ipynb", as_version=4)
    pictures = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    written = record_path.stat().st_mtime_ns
    experiment = toolkit.Experiment(**record["config"])
    assert sweep.run_experiments([experiment], tmp_path / "runs {x}") == []
    assert record_path.stat().st_mtime_ns == written, "the second call skips what is done"
