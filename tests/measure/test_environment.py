"""Which runs count as measured in one environment."""

import pytest
import torch

from toolkit.measure.environment import environment


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99),
        lambda patch: patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
        lambda patch: patch.setattr(torch.backends.cudnn, "benchmark", True),
        lambda patch: patch.setattr("toolkit.measure.environment.code_sha256", lambda: "edited"),
        lambda patch: patch.setattr("toolkit.measure.environment._version", lambda name: "0"),
    ],
)
def test_settings_that_make_runs_incomparable_change_their_environment(monkeypatch, change):
    before = environment("cpu")
    assert environment("cpu") == before
    with monkeypatch.context() as patch:
        change(patch)
        assert environment("cpu")["env_hash"] != before["env_hash"]


def test_a_new_commit_of_the_same_code_keeps_the_environment(monkeypatch):
    before = environment("cpu")["env_hash"]
    monkeypatch.setattr("toolkit.measure.environment._git", lambda: {"git_sha": "new", "git_dirty": True})
    assert environment("cpu")["env_hash"] == before
