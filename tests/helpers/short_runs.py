"""Short training runs that several test files share."""

import torch

import toolkit
from toolkit.training.step import Steps


def experiment(**parameters):
    defaults = {"epochs": 2, "batch_size": 32, "budget": "1GB", "device": "cpu", "checkpointing": "none"}
    return toolkit.Experiment(**defaults | parameters)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Stop(Exception):
    """Stands for a kill: nothing after the step runs."""


def stop_after(monkeypatch, steps, error=Stop):
    """Raise instead of the step after `steps`."""
    original = Steps.run

    def step(self, images, targets, result):
        if result.steps == steps:
            raise error()
        return original(self, images, targets, result)

    monkeypatch.setattr(Steps, "run", step)
