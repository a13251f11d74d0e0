"""Killed and interrupted runs continue where they were, bit for bit."""

import dataclasses
import os
import signal

import pytest
import torch
from short_runs import Stop, experiment, same, stop_after, weights
from simulated_gpu import SimulatedGpu, VirtualClock, meter_of

import toolkit
from toolkit.errors import InputError
from toolkit.training import loop, resume
from toolkit.training.resume import Snapshots
from toolkit.training.step import Steps


def test_energy_of_a_run_survives_a_kill(demo_model, few_digits, tmp_path, monkeypatch):
    """A simulated GPU of 100 W: joules per second stay what they are across two processes' meters."""
    clock = VirtualClock()

    def slow_model():
        model = demo_model()
        model.register_forward_pre_hook(lambda *_: clock.sleep(10))
        return model

    def meter():
        return meter_of(SimulatedGpu(clock, [(0, 100.0)]))

    e = experiment(epochs=3)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5)
        toolkit.fit(slow_model(), few_digits, e, folder=tmp_path, snapshot_seconds=0, meter=meter())
    first = Snapshots(tmp_path).newest()["result"]["windows"]
    second_meter = meter()
    with second_meter.window("whole") as whole:
        result = toolkit.fit(
            slow_model(), few_digits, e, folder=tmp_path, snapshot_seconds=0, meter=second_meter
        )
    assert result.resumes == 1
    (fit,) = whole.children
    second = {"fit": [fit], "train": [window for window in fit.children if window.name == "train"]}
    for name, windows in second.items():
        window = result.windows[name]
        assert window["source"] == "fake"
        for quantity in ("seconds", "energy_joules"):
            before, after = first[name][quantity], sum(getattr(w, quantity) for w in windows)
            assert before > 0 and window[quantity] == pytest.approx(before + after)
        assert window["energy_joules"] == pytest.approx(100 * window["seconds"], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("killed_at", [1, 3, 4, 7])
def test_resume_after_a_kill_is_bit_identical(
    demo_model, few_digits, monkeypatch, tmp_path, killed_at, precision
):
    """Three steps an epoch; killed in the first epoch, at an epoch's end, after it, and in the third."""
    e = experiment(
        method="lora",
        options={"dropout": 0.2},
        epochs=3,
        precision=precision,
        checkpointing="threshold",
        budget="14 MiB",
    )
    reference = demo_model("lora", dropout=0.2)
    expected = toolkit.fit(reference, few_digits, e)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, killed_at)
        toolkit.fit(demo_model("lora", dropout=0.2), few_digits, e, folder=tmp_path, snapshot_seconds=0)
    torch.rand(7)  # whatever the new process does before it resumes
    model = demo_model("lora", dropout=0.2)
    result = toolkit.fit(model, few_digits, e, folder=tmp_path, snapshot_seconds=0)

    assert result.resumes == 1 and result.steps == 9
    assert result.history == expected.history
    assert result.peak_bytes == expected.peak_bytes
    assert result.memory_trace == expected.memory_trace
    assert same(weights(model), weights(reference))


def test_finished_training_is_not_repeated(demo_model, few_digits, monkeypatch, tmp_path):
    first = toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path)
    stop_after(monkeypatch, first.steps)
    assert toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path).history == first.history


def test_damaged_snapshot_falls_back_to_the_older_one(demo_model, few_digits, monkeypatch, tmp_path, capsys):
    e = experiment(epochs=2)
    reference = demo_model()
    toolkit.fit(reference, few_digits, e)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 4)
        toolkit.fit(demo_model(), few_digits, e, folder=tmp_path, snapshot_seconds=0)
    newest = sorted((tmp_path / "snapshots").glob("*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    model = demo_model()
    toolkit.fit(model, few_digits, e, folder=tmp_path)
    assert "damaged" in capsys.readouterr().out
    assert same(weights(model), weights(reference))


@pytest.mark.parametrize("position", [0.0, 0.3, 0.999])
def test_any_damage_to_a_snapshot_is_noticed(tmp_path, position):
    snapshots = Snapshots(tmp_path)
    snapshots.save(1, {"x": torch.arange(100.0)})
    path = tmp_path / "snapshots" / "step-00000001.pt"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 4
    path.write_bytes(content)
    assert snapshots.newest() is None
    path.write_bytes(content[: len(content) // 2])
    assert snapshots.newest() is None
    path.with_suffix(".json").write_text("{")
    assert snapshots.newest() is None


def test_snapshots_of_another_experiment_are_refused(demo_model, few_digits, tmp_path):
    toolkit.fit(demo_model(), few_digits, experiment(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match="another experiment"):
        toolkit.fit(demo_model(), few_digits, experiment(epochs=2), folder=tmp_path)
    with pytest.raises(InputError, match="another weights"):
        toolkit.fit(demo_model(pretrained=True), few_digits, experiment(epochs=1), folder=tmp_path)
    few_digits = dataclasses.replace(few_digits, hashes={**few_digits.hashes, "train": "other"})
    with pytest.raises(InputError, match="another train data"):
        toolkit.fit(demo_model(), few_digits, experiment(epochs=1), folder=tmp_path)


def test_a_folder_is_claimed_once(demo_model, few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "CLAIM_SECONDS", 0.1)
    with resume.claim(tmp_path), pytest.raises(InputError, match="another process"):
        toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path)


def test_interrupt_finishes_the_step_and_resumes(demo_model, few_digits, tmp_path, monkeypatch):
    e = experiment(epochs=2)
    reference = demo_model()
    toolkit.fit(reference, few_digits, e)
    original = Steps.run

    def step(self, images, targets, result):
        if result.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, images, targets, result)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "run", step)
        result = toolkit.fit(demo_model(), few_digits, e, folder=tmp_path)
    assert result.status == "interrupted" and result.steps == 4
    model = demo_model()
    assert toolkit.fit(model, few_digits, e, folder=tmp_path).status == "ok"
    assert same(weights(model), weights(reference))


def signalled_at(monkeypatch, steps, number):
    """Send a signal to this process before the step after `steps`."""
    original = Steps.run

    def step(self, images, targets, result):
        if result.steps == steps:
            os.kill(os.getpid(), number)
        return original(self, images, targets, result)

    monkeypatch.setattr(Steps, "run", step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_the_state_and_leaves_handlers_as_they_were(
    demo_model, few_digits, tmp_path, monkeypatch, number
):
    """A user's handler gets the signal when the state is saved; the default one would end the process."""
    e, reference, calls = experiment(epochs=2), demo_model(), []
    toolkit.fit(reference, few_digits, e)
    before = signal.signal(number, lambda *_: calls.append(Snapshots(tmp_path).newest()["result"]["steps"]))
    try:
        with monkeypatch.context() as patch:
            signalled_at(patch, 3, number)
            result = toolkit.fit(demo_model(), few_digits, e, folder=tmp_path, snapshot_seconds=1e9)
    finally:
        signal.signal(number, before)
    assert (result.status, result.error) == ("interrupted", f"stopped by {number.name}")
    assert calls == [4]
    model = demo_model()
    resumed = toolkit.fit(model, few_digits, e, folder=tmp_path)
    assert (resumed.status, resumed.resumes) == ("ok", 1)
    assert same(weights(model), weights(reference))


def test_a_stop_in_the_middle_of_a_validation_repeats_the_validation(
    demo_model, few_digits, tmp_path, monkeypatch
):
    e, reference = experiment(epochs=2, batch_size=16), demo_model()
    expected = toolkit.fit(reference, few_digits, e)
    original = loop.evaluate

    def evaluate(model, batches, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batches, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        result = toolkit.fit(demo_model(), few_digits, e, folder=tmp_path)
    assert (result.status, result.steps, result.history) == ("interrupted", 6, [])
    model = demo_model()
    assert toolkit.fit(model, few_digits, e, folder=tmp_path).history == expected.history
    assert same(weights(model), weights(reference))


def test_a_signal_before_the_first_step_ends_the_run_at_once(demo_model, few_digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "track", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        result = toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path)
    assert (result.status, result.steps) == ("interrupted", 0)


@pytest.mark.parametrize(
    ("save_seconds", "run_seconds", "most_lost"),
    [(0.01, 20, 1.5), (0.01, 36_000, 5.1), (0.1, 600, 5.1), (10, 3_600, 61), (300, 36_000, 61)],
)
def test_no_more_than_a_minute_or_a_twentieth_is_ever_lost(
    tmp_path, monkeypatch, save_seconds, run_seconds, most_lost
):
    """Steps of a hundredth of the run or half a second, on a clock of its own."""
    now, steps = [0.0], 10_000 if run_seconds > 1_000 else 100
    monkeypatch.setattr(resume.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(resume.torch, "save", lambda *_: now.__setitem__(0, now[0] + save_seconds))
    for name in ("write_atomically", "write_sealed", "sha256_of"):
        monkeypatch.setattr(resume, name, lambda *_: None)
    snapshots, saved_at, gaps = Snapshots(tmp_path, 5.0, steps), None, []
    for step in range(1, min(steps, 2_000)):
        now[0] += run_seconds / steps
        if snapshots.due(step):
            if saved_at is not None:
                gaps.append(now[0] - saved_at)
            snapshots.save(step, {})
            saved_at = now[0]
    assert len(gaps) > 3 and max(gaps) <= most_lost + run_seconds / steps
