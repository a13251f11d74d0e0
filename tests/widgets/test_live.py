"""Views of a run: what they show, and that pausing, stopping and their own failures leave the run intact."""

import dataclasses
import functools
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from jupyter_client.manager import start_new_kernel

import toolkit
from toolkit.training import progress as progress_module
from toolkit.training.progress import Plain, Progress, ProgressView, View, batch
from toolkit.training.step import Steps
from toolkit.widgets import live
from toolkit.widgets.live import LiveView, live_view

NOW = Progress(
    step=6, total_steps=24, epoch=2, epochs=8, loss=1.5, score_pct=50.0, peak_bytes=12 * 2**20,
    budget_bytes=16 * 2**20, seconds=75.0, energy_joules=None, energy_source="none",
    energy_reason="no <sensor> & no counter", seconds_left=3725.0,
)  # fmt: skip
ROW = {"epoch": 1, "train_loss": 2.0, "train_top1_pct": 30.0, "val_loss": 1.9, "val_top1_pct": 35.0}


def experiment(**parameters):
    defaults = {"epochs": 2, "batch_size": 32, "budget": "1GB", "device": "cpu", "checkpointing": "none"}
    return toolkit.Experiment(**defaults | parameters)


@pytest.fixture
def every_step(monkeypatch):
    """Views see all steps."""
    monkeypatch.setattr(progress_module, "SHOW_SECONDS", 0)
    monkeypatch.setattr(progress_module, "SHOW_SHARE", float("inf"))


@pytest.fixture
def notebook(monkeypatch):
    """Pretend to be an interactive notebook; returns what it displays."""
    shown = []
    monkeypatch.setattr(live, "display", shown.append)
    return shown


class Clock:
    """A meter's clock that moves by one second per look."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1
        return self.now


class Scripted(View):
    """Calls `script[step]` after that step; notes what it is shown."""

    def __init__(self, script=None):
        self.script, self.seen, self.rows, self.message = script or {}, [], [], None

    def step(self, progress):
        self.seen.append(progress)
        self.script.get(progress.step, lambda: None)()

    def epoch(self, progress, row):
        self.rows.append(row)

    def end(self, progress, message):
        self.last, self.message = progress, message


def test_a_view_sees_the_whole_run(demo_model, few_digits, every_step):
    view = Scripted()
    result = toolkit.fit(demo_model(), few_digits, experiment(), view=view)
    assert [p.step for p in view.seen] == [1, 2, 3, 4, 5, 6] and [p.epoch for p in view.seen] == [1] * 3 + [
        2
    ] * 3
    assert view.rows == result.history and view.message == "finished: 6 steps"
    # Equal batches: the losses of an epoch's steps average to its loss.
    assert sum(p.loss for p in view.seen[:3]) / 3 == pytest.approx(result.history[0]["train_loss"])
    assert sum(p.score_pct for p in view.seen[3:]) / 3 == pytest.approx(result.history[1]["train_top1_pct"])
    last = view.last
    assert (last.peak_bytes, last.budget_bytes) == (result.peak_bytes, 10**9)
    assert last.seconds == result.windows["fit"]["seconds"]
    assert last.energy_joules is None and last.energy_reason == result.windows["fit"]["reason"]


def test_a_pause_counts_only_in_its_own_window(demo_model, few_digits, every_step):
    """Pauses within an epoch and at its end, each of 1000 seconds by the meter's clock."""

    def train(view, clock):
        meter = toolkit.Meter("cpu", gpu=None, cpu=None, clock=clock, poll_seconds=None)
        model = demo_model()
        return toolkit.fit(model, few_digits, experiment(), meter=meter, view=view), model.state_dict()

    class Pauses(Scripted):
        waited_at = ()

        def wait(self, progress):
            self.waited_at += (progress.step,)
            threading.Thread(target=self.resume).start()

        def resume(self):
            clock.now += 1000
            self.paused = False

    clock, view = Clock(), Pauses()
    view.script = dict.fromkeys((2, 3), lambda: setattr(view, "paused", True))
    result, weights = train(view, clock)
    expected, expected_weights = train(Scripted(), Clock())
    assert view.waited_at == (2, 3) and result.status == "ok"
    assert result.windows["pause"]["seconds"] >= 2000 and "pause" not in expected.windows
    assert result.windows["fit"]["seconds"] < 500 and result.train_seconds < 500
    assert view.last.seconds == result.windows["fit"]["seconds"]
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    assert result.history == expected.history


def stop_at_once(view):
    view.stop_wanted = True


def pause_then_stop(view):
    view.paused, view.wait = True, lambda progress: stop_at_once(view)


def pause_then_interrupt(view):
    view.paused, view.wait = True, lambda progress: os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_resumes_bit_for_bit(demo_model, few_digits, every_step, tmp_path):
    e = experiment(method="lora", options={"dropout": 0.2})
    reference = demo_model("lora", dropout=0.2)
    toolkit.fit(reference, few_digits, e)
    expected = reference.state_dict()

    for stop in (stop_at_once, pause_then_stop, pause_then_interrupt):
        view, folder = Scripted(), tmp_path / stop.__name__
        view.script = {2: functools.partial(stop, view)}
        model = demo_model("lora", dropout=0.2)
        result = toolkit.fit(model, few_digits, e, folder=folder, view=view)
        assert (result.status, result.steps) == ("interrupted", 2), stop.__name__
        assert view.message.startswith("stopped after step 2 of 6") and "is saved" in view.message
        model, again = demo_model("lora", dropout=0.2), Scripted()
        assert toolkit.fit(model, few_digits, e, folder=folder, view=again).status == "ok"
        assert [p.step for p in again.seen] == [3, 4, 5, 6]
        trained = model.state_dict()
        assert all(torch.equal(trained[name], expected[name]) for name in expected), stop.__name__


def test_a_stop_without_a_folder_says_that_nothing_is_saved(demo_model, few_digits, every_step):
    view = Scripted({1: lambda: setattr(view, "stop_wanted", True)})
    assert toolkit.fit(demo_model(), few_digits, experiment(), view=view).steps == 1
    assert "nothing is saved" in view.message


def test_a_broken_view_costs_its_picture_and_not_the_run(demo_model, few_digits, every_step, capsys):
    def fail():
        view.paused = True
        raise ZeroDivisionError("no picture")

    view = Scripted({2: fail})
    result = toolkit.fit(demo_model(), few_digits, experiment(), view=view)
    assert result.status == "ok" and result.steps == 6 and len(view.seen) == 2
    assert capsys.readouterr().out.count("the view failed (ZeroDivisionError: no picture)") == 1


def test_an_error_in_the_run_ends_the_view(demo_model, few_digits, every_step, monkeypatch):
    def stumble(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Steps, "_passes", stumble)
    view = Scripted()
    with pytest.raises(RuntimeError):
        toolkit.fit(demo_model(), few_digits, experiment(), view=view)
    assert view.message == "RuntimeError: shapes cannot be multiplied"


def screen_with(view, monkeypatch, cost_seconds=0.0):
    """A screen on a clock that only moves by hand and by `cost_seconds` per picture."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    view.step = lambda progress: (view.seen.append(progress), setattr(clock, "now", clock.now + cost_seconds))
    screen, state = ProgressView(view, SimpleNamespace(wanted=False)), SimpleNamespace(step=0)
    screen.begin(
        lambda: dataclasses.replace(NOW, step=state.step, seconds=10.0 + 2.0 * state.step, seconds_left=None),
        [], False,
    )  # fmt: skip
    return screen, state, clock


@pytest.mark.parametrize(("cost_seconds", "pictures"), [(0.0, 4), (0.02, 1)])
def test_pictures_are_rare_and_cheap(monkeypatch, cost_seconds, pictures):
    """Steps of 10 ms for a second: four pictures, or what 2 % of the time are enough for."""
    view = Scripted()
    screen, _, clock = screen_with(view, monkeypatch, cost_seconds)
    start = clock.now
    while clock.now < start + 0.99:
        screen.step()
        clock.now += 0.01
    assert len(view.seen) == pictures


def test_time_left_is_told_once_the_slow_steps_are_over(monkeypatch, every_step):
    view = Scripted()
    screen, state, _ = screen_with(view, monkeypatch)
    for state.step in (1, 2, 4, 24):
        screen.step()
    assert [p.seconds_left for p in view.seen] == [None, None, 2.0 * 20, 0.0]


def test_without_a_person_one_line_per_epoch_is_printed(demo_model, few_digits, capsys, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setattr(live, "display", lambda _: pytest.fail("nothing to display"))
    toolkit.fit(demo_model(), few_digits, experiment(), view=live_view(experiment()))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines] == ["epoch 1/2:", "epoch 2/2:"] and "val" in lines[1]


def test_a_view_is_live_only_in_an_interactive_notebook(monkeypatch):
    for name in progress_module.FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(progress_module.sys.modules, "ipykernel", SimpleNamespace())
    assert type(live_view(experiment())) is Plain, "papermill's kernel"
    monkeypatch.setenv("JPY_SESSION_NAME", "finetune.ipynb")
    assert type(live_view(experiment())) is LiveView
    with batch():
        assert type(live_view(experiment())) is Plain, "a sweep's kernel that a live notebook started"
    assert type(live_view(experiment())) is LiveView


def test_the_bar_moves_in_a_terminal_and_ends_where_the_run_does(
    demo_model, few_digits, every_step, capsys, monkeypatch
):
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True, raising=False)
    toolkit.fit(demo_model(), few_digits, experiment())
    err = capsys.readouterr().err
    assert "epoch 2/2" in err and "6/6" in err and "loss " in err


def test_live_view_draws_the_run(demo_model, few_digits, every_step, notebook):
    view = LiveView(experiment())
    result = toolkit.fit(demo_model(), few_digits, experiment(), view=view)
    assert notebook == [view.widget]
    assert "step 6 of 6" in view.state.value and view.bar.value == view.bar.max == 6
    assert view.pause.disabled and view.stop.disabled and "finished: 6 steps" in view.message.value
    assert view.stop.description == "Stop", "there is no folder to save in"
    assert bytes(view.picture.value).startswith(b"\x89PNG")
    lines = [line.get_ydata() for axes in view.curves.axes for line in axes.lines]
    assert [len(line) for line in lines] == [6, 2, 6, 2]  # training and validation, of loss and accuracy
    assert lines[3][-1] == result.history[-1]["val_top1_pct"]
    assert "within the budget of 953.7 MiB" in view.state.value
    assert view.memory.value == result.peak_bytes and view.memory.bar_style == "info"


def test_live_view_pauses_goes_on_and_stops(demo_model, few_digits, every_step, notebook, tmp_path):
    """As by hand: pause in the first picture, go on from another thread, stop a step later."""
    said = []

    class Pressed(LiveView):
        def step(self, progress):
            super().step(progress)
            {1: self.pause, 2: self.stop}[progress.step].click()
            said.append(self.message.value)

        def wait(self, progress):
            super().wait(progress)
            said.append(self.message.value)
            assert self.pause.description == "Resume"
            threading.Thread(target=self.pause.click).start()

    view = Pressed(experiment())
    result = toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path, view=view)
    assert result.status == "interrupted" and result.steps == 2
    assert [any(word in text for word in ("pauses after", "paused:", "stops after")) for text in said] == [
        True
    ] * 3
    assert "state is saved" in view.message.value and view.stop.description == "Stop and save"
    assert toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path, view=view).status == "ok"


def test_live_view_shows_earlier_epochs_and_escapes_text(notebook):
    view = LiveView(experiment())
    view.begin(NOW, [ROW], saves=True)
    view.epoch(NOW, ROW | {"epoch": 2})
    assert "time 01:15, left 1:02:05" in view.state.value
    assert "– (no &lt;sensor&gt; &amp; no counter)" in view.state.value
    assert [len(axes.lines[1].get_xdata()) for axes in view.curves.axes] == [2, 2]
    view.end(NOW, "RuntimeError: <b>")
    assert "&lt;b&gt;" in view.message.value


@pytest.mark.parametrize(
    ("source", "text"),
    [("nvml_counter", "energy 1,234 J (GPU)"), ("fake", "energy 1,234 J (GPU, simulated)")],
)
def test_live_view_tells_measured_energy_from_simulated(notebook, source, text):
    view = LiveView(experiment())
    view.begin(dataclasses.replace(NOW, energy_joules=1234.4, energy_source=source), [], saves=True)
    assert text in view.state.value


def test_a_broken_budget_is_shown(notebook):
    view = LiveView(experiment())
    view.begin(dataclasses.replace(NOW, peak_bytes=20 * 2**20), [], saves=True)
    assert "20.0 MiB, over the budget of 16.0 MiB" in view.state.value
    assert view.memory.bar_style == "danger"


def test_curves_stay_short(notebook, monkeypatch):
    monkeypatch.setattr(live, "MOST_POINTS", 12)
    view = LiveView(experiment())
    view.begin(NOW, [], saves=True)
    for step in range(1, 51):
        view.step(dataclasses.replace(NOW, step=step, total_steps=50))
    assert 6 <= len(view.points) <= 12 and view.points[-1][0] == NOW.epochs
    assert view.points == sorted(view.points)


def test_a_click_reaches_a_busy_kernel():
    """As JupyterLab sends it: to a subshell, while a cell runs."""
    manager, client = start_new_kernel(extra_arguments=["--IPKernelApp.log_level=ERROR"])
    try:
        client.control_channel.send(client.session.msg("create_subshell_request", {}))
        subshell = client.get_control_msg(timeout=600)["content"]["subshell_id"]
        client.execute(BUSY_CELL)
        printed = message_of(client, "stream")["text"].split()
        click = client.session.msg(
            "comm_msg",
            {"comm_id": printed[0], "data": {"method": "custom", "content": {"event": "click"}}},
        )
        click["header"]["subshell_id"] = subshell
        client.shell_channel.send(click)
        assert message_of(client, "stream")["text"].split() == ["clicked", "while", "busy"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


BUSY_CELL = """
import time, ipywidgets
from toolkit.widgets.live import _answer_at_once
clicked = []
button = ipywidgets.Button(description="Pause")
button.on_click(clicked.append)
_answer_at_once(button)
print(button.comm.comm_id, flush=True)
end = time.monotonic() + 600
while not clicked and time.monotonic() < end:
    sum(range(10_000))
print("clicked while busy" if clicked else "not clicked", flush=True)
"""


def message_of(client, kind):
    """The content of the next message of this kind."""
    while True:
        message = client.get_iopub_msg(timeout=600)
        if message["msg_type"] == "error":
            pytest.fail("\n".join(message["content"]["traceback"]))
        if message["msg_type"] == kind:
            return message["content"]
