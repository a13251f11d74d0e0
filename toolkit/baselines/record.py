"""The record of a baseline: as a fine-tuned model's, with `prepare_*` for the work before the test."""

from __future__ import annotations

from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.prepared import Prepared
from toolkit.datasets import Splits
from toolkit.datasets.tasks import TASKS
from toolkit.measure import Window, total
from toolkit.measure.environment import installed_packages
from toolkit.measure.quantities import NOT_ENDED
from toolkit.methods import summarize
from toolkit.training.evaluation import Evaluation
from toolkit.training.record import (
    RunRecord,
    budget_mode,
    data_fields,
    energy_source,
    host_peak_bytes,
    no_test,
    run_fields,
)


def record_of(
    experiment: BaselineExperiment,
    splits: Splits,
    prepared: Prepared,
    evaluation: Evaluation | None,
) -> RunRecord:
    """Assemble the record of a baseline; `evaluation`: of the test split, None if that failed.

    `config` repeats baseline and protocol as `backbone` and `method`, so that one table holds baselines and
    fine-tuned models.
    """
    params_total = summarize(prepared.model).total if prepared.model else None
    env = prepared.environment
    test = evaluation.window if evaluation else Window("test", reason=NOT_ENDED)
    within = evaluation and max(prepared.peak_bytes, evaluation.peak_bytes) <= experiment.budget_bytes
    whole = RunRecord(
        run=run_fields(experiment, prepared.status, prepared.error) | {"started_at": prepared.started_at},
        config=experiment.config,
        data=data_fields(splits),
        quality={
            **(evaluation.fields if evaluation else no_test(TASKS["classification"])),
            "val_top1_pct": prepared.val_top1_pct,
            "unmatched_pct": prepared.unmatched_pct,
            "selection_rule": prepared.selection_rule,
            "weights_sha256": prepared.weights_sha256 or None,
            "params_total": params_total,
            "params_trainable": prepared.fitted,
        },
        time={
            "prepare_seconds": prepared.window.seconds,
            "test_seconds": evaluation and evaluation.seconds,
            "prepare_cached": prepared.cached,
        },
        energy={
            "energy_joules": total([prepared.window, test]).energy_joules,
            "energy_source": energy_source([prepared.window, test]),
            "prepare_joules": prepared.window.energy_joules,
            "test_energy_joules": test.energy_joules,
            "test_quantisation_joules": test.quantisation_joules,
            "test_energy_flags": ", ".join(test.flags),
        },
        memory={
            "prepare_peak_bytes": prepared.peak_bytes,
            "test_peak_bytes": evaluation and evaluation.peak_bytes,
            "host_peak_bytes": host_peak_bytes(),
            "memory_source": prepared.memory_source,
            "budget_mode": budget_mode(experiment, env["device_total_bytes"]),
            "within_budget": within,
            "predicted_peak_bytes": prepared.predicted_peak_bytes,
            "micro_batch_images": prepared.batch_size,
            "weights_form": prepared.form,
        },
        flops={"inference_macs_per_image": evaluation and evaluation.macs_per_image},
        env=env,
        packages=installed_packages(),
        curves={
            "choices": prepared.choices,
            "windows": {"prepare": prepared.window.to_dict()}
            | ({"test": evaluation.window.to_dict()} if evaluation else {}),
        },
    )
    whole.score(params_total, {"inference": "test"})
    prepare = prepared.window.reason
    sensors = {"energy_joules": prepare or test.reason, "prepare_joules": prepare}
    sensors |= dict.fromkeys(("test_energy_joules", "test_quantisation_joules"), test.reason)
    sensors["predicted_peak_bytes"] = "predictions are for published weights, not for a folder"
    whole.explain(sensors)
    return whole
