"""The package as a library: quick to import, known to editors, at home outside of a checkout, extensible."""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

import toolkit
from toolkit import __main__ as command_line
from toolkit import experiment, files
from toolkit.errors import InputError
from toolkit.methods import METHODS


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_that_is_slow(flag):
    program = f"""
        import sys
        from toolkit.__main__ import main
        try:
            main(["{flag}"])
        except SystemExit as exit:
            assert exit.code == 0
        slow = {{"torch", "numpy", "pandas", "matplotlib", "papermill"}} & set(sys.modules)
        assert not slow, slow
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert toolkit.__version__ in done.stdout or "report" in done.stdout


def test_public_names_exist():
    assert all(getattr(toolkit, name) for name in toolkit.__all__) and {*toolkit.__all__} <= {*dir(toolkit)}
    with pytest.raises(AttributeError):
        toolkit.nothing  # noqa: B018


def test_an_installed_package_finds_its_files_and_writes_to_the_current_folder(tmp_path, monkeypatch):
    """Next to `lib/.../toolkit` the installer puts `share/toolkit`, whatever the prefix."""
    installed = tmp_path / "prefix" / "lib" / "python3" / "site-packages" / "toolkit"
    (tmp_path / "prefix" / "share" / "toolkit" / "notebooks").mkdir(parents=True)
    installed.mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("TOOLKIT_RUNS", "TOOLKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("elsewhere", shutil.copy(files.__file__, installed))
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert files.CHECKOUT and not elsewhere.CHECKOUT
    assert tmp_path / "prefix" / "share" / "toolkit" / "notebooks" == elsewhere.NOTEBOOKS
    assert tmp_path / "work" / "runs" == elsewhere.RUNS
    assert tmp_path / "cache" / "toolkit" / "downloads" == elsewhere.DOWNLOADS


PLUGIN = """
from toolkit.methods import METHODS
METHODS["of_a_plugin"] = METHODS["linear"]
"""


def test_a_plugin_is_known_here_and_to_processes_started_from_here(tmp_path, monkeypatch):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TOOLKIT_PLUGINS", "")
    monkeypatch.setenv("PYTHONPATH", "before")
    arguments = ["run", "--plugin", str(tmp_path / "my_plugin.py"), "--method", "of_a_plugin"]
    command_line._load_plugins(arguments)
    assert arguments == ["run", "--method", "of_a_plugin"]
    assert os.environ["TOOLKIT_PLUGINS"] == "my_plugin"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "before"]
    try:
        experiment._load_plugins()
        assert experiment.Experiment(method="of_a_plugin").method == "of_a_plugin"
    finally:
        METHODS.pop("of_a_plugin", None)
        sys.modules.pop("my_plugin", None)


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv("TOOLKIT_PLUGINS", "no_such_module")
    with pytest.raises(InputError, match="plugin 'no_such_module' cannot be imported"):
        experiment._load_plugins()
