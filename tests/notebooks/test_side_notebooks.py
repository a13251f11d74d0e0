"""The notebooks of side methods and of dense prediction run from top to bottom, without finished runs."""

import pytest

from toolkit.batch.sweep import execute_notebook

SMALL = {
    "side_adaptation": {"epochs": 1, "methods": "lora,losa,dtl", "batch_size": 8},
    "dense_prediction": {"epochs": 1, "methods": "e3va", "cost_methods": "lora,e3va"},
}


@pytest.mark.parametrize(
    "name", ["side_adaptation", pytest.param("dense_prediction", marks=pytest.mark.long)]
)
def test_notebook_runs_small(name, tmp_path):
    figures = tmp_path / "figures"
    execute_notebook(
        name, tmp_path / "out.ipynb", SMALL[name] | {"runs": str(tmp_path), "figures": str(figures)}
    )
    assert {path.stem for path in figures.iterdir()} >= {
        "side_adaptation": {"side_memory", "side_memory_steps"}, "dense_prediction": {"dense_predictions"}
    }[name]  # fmt: skip
