import sys

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from toolkit.errors import InputError


def test_a_notebook_shows_the_message_of_bad_input_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    hook = sys.excepthook
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    outcome = shell.run_cell("import toolkit\ntoolkit.build_backbone('demo_vi', 5)")
    assert isinstance(outcome.error_in_exec, InputError)
    shown = capsys.readouterr().out
    assert shown.startswith("InputError: unknown backbone 'demo_vi'. Did you mean 'demo_vit'?")
    assert "Traceback" not in shown
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out
    assert sys.excepthook is hook
