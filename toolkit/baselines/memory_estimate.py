"""An estimate of the device memory that evaluating a baseline takes, before anything is downloaded.

Weights are counted on the architecture (see `architectures`); for the rest, the passes of an evaluation run
on fake tensors, which have shapes and storages but no memory and no arithmetic, while `TensorMemory` records
the peak.  Of a language model two blocks run; the others do the same and only add their keys and values.

Assumed: fused attention without a matrix of scores where the model allows it (Gemma 2 does not, and is
counted with the matrix); prompts and class names as long as CLIP's tokenizer, which comes with open_clip,
makes them, unless their lengths are given: other tokenizers differ by some tokens.  Not counted: the features
that a probe is fitted to, or kNN compares with; CUDA's own memory; the allocator's losses between tensors.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.backbones import data_config
from toolkit.baselines.architectures import FEATURES_PX, architecture
from toolkit.baselines.contrastive import PROMPTS_AT_ONCE
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.generative import capped, packed_layers, prompt_text
from toolkit.baselines.prompts import check_classes, question
from toolkit.baselines.registry import BASELINES, FOUR_BIT_FORMS, baseline_named
from toolkit.baselines.trie import LOGITS_BYTES
from toolkit.budget import TensorMemory, format_bytes, parse_bytes, tensors_of
from toolkit.budget.fakes import on_fake_tensors
from toolkit.budget.memory import rounded
from toolkit.errors import InputError
from toolkit.methods.qlora import BLOCK_SIZES

_PREFERENCE = {"cpu": ("fp32", "bf16", *FOUR_BIT_FORMS), "cuda": ("bf16", *FOUR_BIT_FORMS)}
# Of activations, and of weights that are not packed.
_DTYPES = {"fp32": torch.float32} | dict.fromkeys(("bf16", *FOUR_BIT_FORMS), torch.bfloat16)
TOKENS_PER_CLASS = 2  # by CLIP's tokenizer the names of DTD have 1.96 on average, those of CIFAR-100 1.19
_BLOCKS = 2  # Gemma 2 has two kinds of blocks in turn, the others one


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak device memory of an evaluation in bytes, by purpose."""

    weights_bytes: int  # parameters, buffers, scales of packed weights; a contrastive model's classifier
    cache_bytes: int  # keys and values of image, prompt and class names
    activation_bytes: int  # the batch and the rest, such as a packed weight that is unpacked to compute

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.activation_bytes


@functools.cache
def estimate(
    name: str,
    form: str,
    *,
    batch_size: int = 1,
    classes: int = 100,
    image_size: int = FEATURES_PX,
    class_tokens: int | None = None,
) -> MemoryEstimate:
    """Memory for evaluating the baseline `name` with weights in `form` and `batch_size` images at a time.

    contrastive: the larger of two phases, the text tower that writes the classifier of `classes` columns
    and the image tower that uses it.  features: the backbone on images of `image_size` pixels a side.
    generative: image tower, pass of the prompt, pass of all class names (see `trie`); images of one tile.
    `class_tokens`: of all class names together, which bounds the nodes of their trie; estimated by default.
    """
    if form == "fp16":  # takes the same, but not all CPU kernels have it
        form = "bf16"
    model, baseline = architecture(name, image_size), baseline_named(name)
    if baseline.family == "contrastive":
        return contrastive_estimate(model, form, batch_size, classes)
    if baseline.family == "features":
        return features_estimate(model, form, batch_size)
    prompt_tokens = estimated_tokens(prompt_text(baseline.kind, question("digits")))
    nodes = TOKENS_PER_CLASS * classes if class_tokens is None else class_tokens
    return generative_estimate(model, form, batch_size, prompt_tokens, nodes)


def form_and_batch(
    experiment: BaselineExperiment, classes: Sequence[str] = ("a", "b")
) -> tuple[str, int, int | None]:
    """Form of the weights, images at a time and predicted peak bytes, from the architecture alone.

    The form `auto` is the first of fp32 (on the CPU), bf16, and for generative models nf4 and nf4_pruned that
    fits the budget with one image at a time; the batch is halved until it fits.  `classes`: names; without
    them the prediction is a lower bound.  It covers the passes over images and class names: features that a
    probe is fitted to, and kNN's, come on top.  Nothing is predicted (None) for weights from a folder, whose
    `auto` form is the first.

    Raises `InputError` for unusable names, and if no form, or not the one that was asked for, fits the
    budget.
    """
    check_classes(classes)
    forms = [form for form in _PREFERENCE[experiment.device] if form in experiment.entry.forms]
    if experiment.protocol == "generate":  # answers need every token
        forms.remove("nf4_pruned")
    if experiment.form != "auto":
        forms = [experiment.form]
    if experiment.source:
        return forms[0], experiment.batch_size, None
    sizes = {"classes": len(classes), "image_size": experiment.image_size}
    if experiment.family == "generative":
        sizes["class_tokens"] = sum(map(estimated_tokens, classes))

    def peak_bytes(form: str, batch_size: int = 1) -> int:
        return estimate(experiment.baseline, form, batch_size=batch_size, **sizes).total_bytes

    form = next((form for form in forms if peak_bytes(form) <= experiment.budget_bytes), None)
    if form is None:
        form = min(forms, key=peak_bytes)
        need, limit = format_bytes(peak_bytes(form)), format_bytes(experiment.budget_bytes)
        raise InputError(
            f"{experiment.baseline!r} needs {need} of device memory with weights in {form}, above the budget "
            f"of {limit}; raise the budget or choose a model that `python -m toolkit baselines` shows to fit."
        )
    batch_size = experiment.batch_size
    while peak_bytes(form, batch_size) > experiment.budget_bytes:
        batch_size //= 2
    return form, batch_size, peak_bytes(form, batch_size)


def estimate_table(budget: int | str = "2GB", names: Iterable[str] | None = None) -> pd.DataFrame:
    """Estimates for the baselines `names` (default: all), in all their forms, for one image at a time.

    GB are 10^9 bytes.  `fits`: within `budget`.
    """
    limit = parse_bytes(budget)
    rows = []
    for name in BASELINES if names is None else names:
        parameters = sum(p.numel() for p in architecture(name).parameters())
        baseline = baseline_named(name)
        for form in baseline.forms:
            one = estimate(name, form)
            rows.append(
                {
                    "baseline": name,
                    "licence": baseline.license + (" (asks for consent)" if baseline.gated else ""),
                    "form": form,
                    "parameters_M": parameters / 1e6,
                    "weights_GB": one.weights_bytes / 1e9,
                    "cache_GB": one.cache_bytes / 1e9,
                    "activations_GB": one.activation_bytes / 1e9,
                    "total_GB": one.total_bytes / 1e9,
                    "fits": one.total_bytes <= limit,
                }
            )
    return pd.DataFrame(rows)


def estimated_tokens(text: str) -> int:
    """Length of `text` by CLIP's tokenizer, without start and end: an estimate for other models."""
    return len(_clip_tokenizer().encode(text))


@functools.cache
def _clip_tokenizer():
    import open_clip  # here, because it takes seconds to import

    return open_clip.SimpleTokenizer()


def weights_bytes(model: nn.Module, form: str, kept_tokens: int | None = None) -> int:
    """Bytes of `model`'s parameters and buffers in `form`, each rounded up as the allocator does.

    `kept_tokens`: the rows of embedding and logits that are left if these are pruned.
    """
    itemsize = _DTYPES[form].itemsize
    packed = {layer.weight for layer in packed_layers(model).values()} if form in FOUR_BIT_FORMS else set()
    pruned = set()
    if kept_tokens is not None:
        pruned = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    total = 0
    for tensor in {*model.parameters(), *model.buffers()}:
        if tensor in packed:
            total += nf4_bytes(tensor)
        else:
            elements = kept_tokens * tensor.shape[1] if tensor in pruned else tensor.numel()
            total += rounded(elements * (itemsize if tensor.is_floating_point() else tensor.itemsize))
    return total


def nf4_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight (out, in) as `quantise` packs it with double quantisation.

    Two weights a byte; per block a scale of one byte, per 256 of these one in float32, and their mean; the
    tables of the 16 and 256 values that codes stand for (Dettmers et al. 2023, arXiv 2305.14314, section 3).
    """
    blocks = weight.numel() // _block_size(weight)
    sizes = (weight.numel() // 2, blocks, 4 * -(-blocks // 256), 4, 4 * 16, 4 * 256)
    return sum(map(rounded, sizes))


def _unpacked_bytes(weight: torch.Tensor) -> int:
    """Bytes of a packed weight while its layer computes: itself in bf16 and its scales in float32.

    Added to the peak, wherever that is, so that 4-bit forms are estimated a little high; on the CPU
    bitsandbytes unpacks inside one operator, where no counter sees it.
    """
    return rounded(2 * weight.numel()) + rounded(4 * weight.numel() // _block_size(weight))


def _block_size(weight: torch.Tensor) -> int:
    return next(size for size in BLOCK_SIZES if weight.shape[1] % size == 0)


@contextmanager
def _counted(
    model: nn.Module, dtype: torch.dtype, instead: dict[nn.Module, nn.Module] | None = None
) -> Iterator[tuple[nn.Module, TensorMemory]]:
    """A copy of `model` in `dtype` on fake tensors, and a memory that counts everything but its weights.

    `instead`: parts of `model` and their replacements in the copy.
    """
    replaced = {id(part): copy.deepcopy(other) for part, other in (instead or {}).items()}
    fake = copy.deepcopy(model, replaced).to(dtype)
    memory = TensorMemory(torch.device("cpu"))
    with on_fake_tensors(fake, ()), torch.no_grad():
        memory.track(tensors_of(fake))
        memory.allocated_bytes = memory.peak_bytes = 0
        with memory:
            yield fake, memory


def features_estimate(model: nn.Module, form: str, batch_size: int) -> MemoryEstimate:
    """`estimate` for a frozen backbone on images of its own size."""
    dtype = _DTYPES[form]
    with _counted(model, dtype) as (backbone, memory):
        images = torch.empty(batch_size, *data_config(model)["input_size"])
        backbone(images.to(dtype))
    return MemoryEstimate(weights_bytes(model, form), 0, memory.peak_bytes)


def contrastive_estimate(model: nn.Module, form: str, batch_size: int, classes: int) -> MemoryEstimate:
    """`estimate` for open_clip's `model`, of which one tower at a time is on the device."""
    dtype = _DTYPES[form]
    with _counted(model.visual, dtype) as (visual, memory):
        images = torch.empty(batch_size, 3, *model.visual.image_size)
        directions = F.normalize(visual(images.to(dtype)).float(), dim=-1)
    image_bytes = weights_bytes(model.visual, form)
    classifier_bytes = rounded(4 * directions.shape[1] * classes)
    classifying = MemoryEstimate(image_bytes + classifier_bytes, 0, memory.peak_bytes)
    with _counted(model, dtype, {model.visual: nn.Identity()}) as (text, memory):
        tokens = torch.empty(PROMPTS_AT_ONCE, model.context_length, dtype=torch.long)
        F.normalize(text.encode_text(tokens).float(), dim=-1)
    writing = MemoryEstimate(weights_bytes(model, form) - image_bytes, 0, memory.peak_bytes)
    return max(writing, classifying, key=lambda phase: phase.total_bytes)


def generative_estimate(
    model: nn.Module, form: str, batch_size: int, text_tokens: int, nodes: int
) -> MemoryEstimate:
    """`estimate` for a vision-language model of transformers; the trie has `nodes` inner nodes and a root."""
    dtype = _DTYPES[form]
    kept = text_tokens + nodes + 2 if form == "nf4_pruned" else None  # 2: the image's, the terminator
    vocabulary = kept or model.config.get_text_config().vocab_size
    peak, held, cache = _passes(model, dtype, batch_size, text_tokens, nodes)
    logits = _logits_bytes(model, dtype, batch_size, 1 + nodes, vocabulary)
    activations = max(peak, held + logits) - cache
    if form in FOUR_BIT_FORMS:
        activations += max(_unpacked_bytes(layer.weight) for layer in packed_layers(model).values())
    return MemoryEstimate(weights_bytes(model, form, kept), cache, activations)


@functools.cache
def _passes(
    model: nn.Module, dtype: torch.dtype, batch_size: int, text_tokens: int, nodes: int
) -> tuple[int, int, int]:
    """Run the passes of `trie.score_trie`, up to the last states of the trie's nodes.

    Returns bytes without weights: the peak, those held at the end, and those of the cache among them.  Every
    tensor lives as long as it does there.
    """
    base, blocks, side = model.model, model.get_decoder().layers, model.config.vision_config.image_size
    is_smol = hasattr(base, "connector")  # SmolVLM 1 and 2
    tower = (base.vision_model if is_smol else base.vision_tower).encoder.layers
    few = {blocks: blocks[:_BLOCKS], tower: nn.ModuleList([tower[0]] * len(tower))}
    more = len(blocks) / len(few[blocks]) - 1  # caches of the blocks that do not run, per cache that is made
    is_paligemma = model.config.model_type == "paligemma"
    if is_smol:
        image_tokens = base.image_seq_len
    else:
        config = model.config
        image_tokens = config.text_config.num_image_tokens if is_paligemma else config.image_seq_length
    with _counted(base, dtype, few) as (base, memory):
        images = torch.empty(batch_size, 3, side, side)
        mask = torch.empty(batch_size, side, side, dtype=torch.long)  # of SmolVLM's processor
        cast = images.to(dtype)
        ids = torch.empty(batch_size, text_tokens + image_tokens, dtype=torch.long)
        embedded = base.get_input_embeddings()(ids)
        if is_smol:
            outputs, features = _smol_features(base, cast, mask)
        else:
            outputs = base.get_image_features(cast)  # outlives the passes, as in the model
            features = torch.cat([*outputs.pooler_output])  # (all tokens, width)
        image_peak = memory.peak_bytes

        memory.reset_peak()
        embedded = embedded.masked_scatter((ids == 0)[..., None], features)
        # PaliGemma's prompt sees all of itself, for which transformers makes a mask.
        types = {"token_type_ids": ids} if is_paligemma else {}
        prefill = base(inputs_embeds=embedded, use_cache=True, **types)
        prompt_peak = memory.peak_bytes + more * _cache_bytes(prefill)
        del cast, embedded

        memory.reset_peak()
        packed = torch.empty(batch_size, nodes, dtype=torch.long)
        visible = torch.empty(nodes, ids.shape[1] + nodes, dtype=dtype)
        after = base(
            input_ids=packed,
            attention_mask=visible.expand(batch_size, 1, -1, -1),
            position_ids=packed,
            past_key_values=prefill.past_key_values,
            use_cache=True,
        )
        hidden = torch.cat([prefill.last_hidden_state[:, -1:], after.last_hidden_state], dim=1)
        cache = _cache_bytes(after)
        nodes_peak, held = memory.peak_bytes + more * cache, memory.allocated_bytes + more * cache
        del outputs, features, hidden  # not before
    return int(max(image_peak, prompt_peak, nodes_peak)), int(held), int(cache + more * cache)


def _smol_features(base: nn.Module, images: torch.Tensor, mask: torch.Tensor) -> tuple:
    """States of SmolVLM's image tower, which outlive the passes, and its tokens (all, width).

    The model's own path asks which tiles are empty, and whether the mask of patches hides any, which depends
    on values.  Here no tile is empty and nothing is hidden: all tiles and masks are copied, and attention
    runs without a mask.
    """
    tower, images, mask = base.vision_model, images.clone(), mask.clone()
    side = images.shape[-1] // tower.patch_size
    states = tower.embeddings(images, torch.empty(len(images), side, side, dtype=torch.bool))
    states = tower.post_layernorm(tower.encoder(inputs_embeds=states).last_hidden_state)
    return states, torch.cat([*base.connector(states)])


def _cache_bytes(outputs) -> int:
    """Bytes of the keys and values of the blocks that ran."""
    layers = outputs.past_key_values.layers[:_BLOCKS]
    return sum(rounded(tensor.nbytes) for layer in layers for tensor in (layer.keys, layer.values))


@functools.cache
def _logits_bytes(model: nn.Module, dtype: torch.dtype, batch_size: int, states: int, vocabulary: int) -> int:
    """Peak bytes of `trie`'s chunks of logits, on top of the states (B, states, width)."""
    text = model.config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)  # Gemma 2
    head = nn.Linear(text.hidden_size, vocabulary, bias=False, device="meta")
    step = max(1, LOGITS_BYTES // (4 * batch_size * vocabulary))
    with _counted(head, dtype) as (head, memory):
        hidden = torch.empty(batch_size, states, text.hidden_size, dtype=dtype)
        memory.reset_peak()
        held = memory.allocated_bytes
        for start in range(0, states, step):
            logits = capped(head(hidden[:, start : start + step]), cap).float()
            logits.logsumexp(-1)
        return memory.peak_bytes - held
