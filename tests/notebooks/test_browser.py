"""JupyterLab in a real browser, used as a person does: by its buttons and sliders.

Screenshots are in `.pytest_cache/d/screenshots`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from playwright.sync_api import Page, sync_playwright

from toolkit.files import NOTEBOOKS

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium here: apt install chromium"
)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip
PATIENCE_SECONDS = 600


class Lab:
    """A page of JupyterLab, which shows `folder`."""

    def __init__(self, page: Page, address: str, token: str, folder: Path, screenshots: Path):
        self.page, self.address, self.token = page, address, token
        self.folder, self.screenshots = folder, screenshots

    def open(self, name: str, **parameters: object) -> None:
        """Open a copy of a notebook with these parameters and wait for its kernel."""
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        for key, value in parameters.items():
            cell.source, count = re.subn(rf"^({key}: \w+) = .*$", rf"\1 = {value!r}", cell.source, flags=re.M)
            assert count == 1, key
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        self.page.goto(f"{self.address}/lab/tree/{name}.ipynb?token={self.token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_selector("text=/\\| Idle/")  # cells that are run earlier are dropped

    def run_all(self) -> None:
        self.page.click("text=Run >> nth=0")
        self.page.click('[data-command="runmenu:run-all"]')

    def wait_until_done(self) -> None:
        self.page.wait_for_function(
            "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))"
        )

    def button(self, text: str):
        return self.page.locator(f'button.jupyter-button:has-text("{text}")')

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=str(self.screenshots / f"{name}.png"))


@pytest.fixture
def lab(tmp_path, request) -> Iterator[Lab]:
    folder = tmp_path
    (folder / "notebooks").mkdir()
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false"}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings", "IPYTHONDIR": "ipython",
           "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "TOOLKIT_RUNS": "runs"}  # fmt: skip
    environment = os.environ | {name: str(folder / value) for name, value in own.items()}
    command = [
        sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'notebooks'}",
        "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with (
        open(folder / "server.log", "w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1200, "height": 1400})
            page.set_default_timeout(1000 * PATIENCE_SECONDS)
            _wait_for(port, server)
            yield Lab(page, address, token, folder / "notebooks", request.config.cache.mkdir("screenshots"))
        finally:
            browser.close()
            server.terminate()


def _wait_for(port: int, server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError("JupyterLab did not start; see its server.log")


def test_notebooks_are_moved_paused_and_stopped_in_the_browser(lab, record_property):
    """One lab for both notebooks: starting it takes longer than either."""
    explore(lab, record_property)
    train(lab)


def explore(lab: Lab, record_property) -> None:
    """Move the slider, read the changed prediction, press the button."""
    chosen = lab.folder / "chosen.yaml"
    sizes = {"batch_size": 16, "micro_batch_size": 16}  # one size to profile
    lab.open("2_plan", **sizes, chosen=str(chosen), map_backbones="demo_vit", map_methods="linear")
    lab.run_all()
    lab.button("Use this budget").wait_for()
    lab.wait_until_done()
    said = lab.page.locator(".jp-OutputArea-output", has_text="from slider to picture").text_content()
    median_ms = int(re.search(r"(\d+) ms", said)[1])
    record_property("from slider to picture under JupyterLab, median of 20 moves in ms", median_ms)
    table = lab.page.locator(".widget-html-content table").last
    table.scroll_into_view_if_needed()
    before = table.inner_text()
    lab.screenshot("explorer-before")
    handle = lab.page.locator(".jupyter-widgets .noUi-handle").first
    handle.focus()
    for _ in range(5):
        handle.press("ArrowLeft")
    lab.page.wait_for_function(
        "before => [...document.querySelectorAll('.widget-html-content table')].at(-1).innerText != before",
        arg=before,
    )
    time.sleep(0.2)  # the last step of the slider may be on its way
    lab.page.wait_for_selector("text=/\\| Idle/")
    lab.screenshot("explorer-after")
    lab.button("Use this budget").click()
    lab.page.locator(".widget-html-content pre", has_text="1_finetune.ipynb").wait_for()
    lab.screenshot("explorer-chosen")
    parameters = yaml.safe_load(chosen.read_text())
    assert parameters["batch_size"] == 16 and parameters["checkpointing"] == "planned"
    peak = re.search(r"planned\s+([\d.]+) (\w+)", table.inner_text())
    assert peak, "the table names the plan's peak"


def train(lab: Lab) -> None:
    """Train, pause, resume, stop and save; running again resumes from there."""
    lab.open("1_finetune", epochs=200, method="linear", checkpointing="none")
    lab.run_all()
    lab.button("Pause").wait_for()

    def step() -> int:
        text = lab.page.locator(".widget-html-content", has_text="step").first.inner_text()
        return int(re.search(r"step ([\d,]+)", text)[1].replace(",", ""))

    def wait_beyond(count: int) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while step() <= count and time.monotonic() < end:
            time.sleep(0.1)
        assert step() > count

    wait_beyond(10)
    lab.button("Pause").scroll_into_view_if_needed()
    lab.screenshot("finetune-training")
    lab.button("Pause").click()
    lab.button("Resume").wait_for()
    end, paused_at, shown = time.monotonic() + PATIENCE_SECONDS, None, step()
    while shown != paused_at:  # the step that was under way, and its message
        assert time.monotonic() < end, "it does not pause"
        time.sleep(0.7)
        paused_at, shown = shown, step()
    lab.screenshot("finetune-paused")
    lab.button("Resume").click()
    wait_beyond(paused_at)
    lab.button("Stop and save").click()
    lab.page.wait_for_selector("text=/interrupted: \\d+ steps/")
    lab.screenshot("finetune-stopped")
    lab.wait_until_done()
    lab.run_all()
    lab.page.wait_for_selector("text=/resumed at step \\d+/")
    lab.button("Stop and save").click()
    lab.wait_until_done()
