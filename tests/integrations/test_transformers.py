"""Budgets in the Trainer of transformers."""

import logging
import warnings

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from peft import LoraConfig, get_peft_model  # noqa: E402
from programs import Run, Watch, held  # noqa: E402

from toolkit.integrations.transformers import BudgetCallback  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
    logging.disable(logging.NOTSET)


class _WatchSteps(transformers.TrainerCallback):
    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.watch.step_begins(model)


def _program(tmp_path, make_model, data, collate=None, **arguments):
    def program(budget):
        watch, model = Watch(), make_model()
        callbacks = [_WatchSteps(watch)] + ([] if budget is None else [BudgetCallback(budget)])
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=4, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no", **{"save_strategy": "no", **arguments},
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            settings,
            train_dataset=data,
            eval_dataset=data[:8],
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return Run(model, watch.training_ends(), getattr(callbacks[-1], "handle", None))

    return program


def _pictures(pixels: int = 32) -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, pixels, pixels, generator=draw), "labels": i % 3} for i in range(32)
    ]


def _vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, image_size=32,
            patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def _swin():
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=64, patch_size=4, embed_dim=24, depths=[2, 4], num_heads=[2, 4], window_size=4,
            num_labels=3,
        )
    )  # fmt: skip


def _bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=200, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256
        )
    )


def _llama_lora():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=200, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=160,
        )
    )  # fmt: skip
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def _texts(lengths, of_tokens: bool = False) -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 200, (length,), generator=draw) for length in lengths]
    return [{"input_ids": ids, "labels": ids if of_tokens else i % 2} for i, ids in enumerate(texts)]


def _pad(examples: list[dict]) -> dict:
    longest = max(len(each["input_ids"]) for each in examples)

    def padded(values, by: int) -> torch.Tensor:
        return torch.stack([F.pad(value, (0, longest - len(value)), value=by) for value in values])

    ids, labels = ([each[key] for each in examples] for key in ("input_ids", "labels"))
    ones = [torch.ones_like(value) for value in ids]
    of_tokens = isinstance(labels[0], torch.Tensor)
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded(ones, 0),
        "labels": padded(labels, -100) if of_tokens else torch.tensor(labels),
    }


PROGRAMS = {
    "vit": (_vit, _pictures(), {}),
    "vit-accumulation-2": (_vit, _pictures(), {"gradient_accumulation_steps": 2}),
    "vit-saved-and-evaluated": (
        _vit, _pictures(),
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    ),
    "bert-dynamic-padding": (_bert, _texts(range(20, 84, 2)), {"collate": _pad}),
}  # fmt: skip
LONG = {
    "vit-bf16": (_vit, _pictures(), {"bf16": True}),
    "vit-label-smoothing": (_vit, _pictures(), {"label_smoothing_factor": 0.1}),
    "swin": (_swin, _pictures(64), {}),
    "llama-lora-dynamic-padding": (_llama_lora, _texts(range(20, 84, 2), of_tokens=True), {"collate": _pad}),
}


@pytest.mark.parametrize("name", [*PROGRAMS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_trainer_keeps_its_budget(name, tmp_path):
    make_model, data, arguments = (PROGRAMS | LONG)[name]
    run = held(_program(tmp_path, make_model, data, **arguments), share=0.75)
    assert run.handle.departures == 0
