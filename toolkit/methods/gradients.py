"""A check that all trained parameters get a gradient, on fake tensors, where nothing is computed."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from toolkit.backbones import data_config
from toolkit.budget.fakes import on_fake_tensors, swept
from toolkit.errors import InputError, one_line
from toolkit.methods.batch_norms import set_train_mode

# Image sizes that are tried, in pixels, where a model does not declare its own.
_SIZES = (224, 32, 64, 28, 96, 128, 256, 299, 384)


@swept
def check_gradients(model: nn.Module) -> str:
    """Freeze the trained parameters of an adapted `model` that its outputs do not depend on: mask tokens,
    auxiliary heads.  A model that does not declare the size of its images, and cannot have the usual one,
    declares the first that it runs on from then on.

    Returns why this could not be found out, "" if it could: not every model runs on fake images.  Raises
    `InputError` if they belong to an adapter, or to a layer that has dropout in front of its adapter and is
    never called.
    """
    found, why_not = None, ""  # parameters without a gradient, and modules that are not called
    for size in _sizes_of(model):
        try:
            found = _one_pass(model, size)
            break
        except Exception as error:  # a model may raise anything
            why_not = one_line(error)
    if found is None:
        return why_not
    adapted = hasattr(model, "peft_config")
    if size != data_config(model)["input_size"]:
        (model.get_base_model() if adapted else model).pretrained_cfg = {"input_size": size}
    if adapted:
        _check_adapters(model.get_base_model(), *(_below_peft(names) for names in found))
    for name in found[0]:
        model.get_parameter(name).requires_grad_(False)
    return ""


def _below_peft(names: set[str]) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in names}


def _check_adapters(model: nn.Module, idle: set[str], uncalled: set[str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer  # peft imports transformers, which takes seconds

    kind, remedy = type(model).__name__, "leave the layer out by targets, whose pattern matches whole names"
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    unread = {name for name in layers if any(other.startswith(f"{name}.") for other in idle)}
    for name, layer in layers.items():
        if name in unread:
            raise InputError(
                f"nothing that {kind} computes in training depends on {name}; {remedy}, as "
                f"{_leaving_out(unread, layers.keys() - unread)!r} does."
            )
        dropouts = getattr(layer, "lora_dropout", {}).values()
        if name in uncalled and not all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            raise InputError(
                f"{kind} reads the weight of {name} without calling the layer, so dropout in front of its "
                f"update cannot act; choose dropout 0, or {remedy}."
            )


def _leaving_out(unread: set[str], others: set[str]) -> str:
    """A pattern of all names but those in the largest parts of the model that hold `unread` layers alone."""
    left_out = set()
    for name in unread:
        path = name.split(".")
        parts = (".".join(path[:depth]) for depth in range(1, len(path)))
        apart = (part for part in parts if not any(other.startswith(f"{part}.") for other in others))
        left_out.add(next(apart, name).replace(".", "[.]"))
    return f"(?!({'|'.join(sorted(left_out))})([.]|$)).*"


def _sizes_of(model: nn.Module) -> list[tuple[int, int, int]]:
    """Image sizes to try: the model's own if it declares one."""
    if getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None):
        return [data_config(model)["input_size"]]
    return [(3, size, size) for size in _SIZES]


def _one_pass(model: nn.Module, size: tuple[int, int, int]) -> tuple[set[str], set[str]]:
    """Names of the trained parameters without a gradient in a training step, and of modules never called."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    images = torch.zeros(2, *size, dtype=weight.dtype, device=weight.device)
    uncalled = {name for name, _ in model.named_modules()}
    with on_fake_tensors(model, images) as fake:
        set_train_mode(model)
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: uncalled.discard(name))
        outputs = model(fake)
        outputs = getattr(outputs, "logits", outputs)
        values = [t.float().sum() for t in tree_iter(outputs) if isinstance(t, torch.Tensor)]
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(sum(values), list(trained.values()), allow_unused=True)
    return {name for name, gradient in zip(trained, found) if gradient is None}, uncalled
