"""Exact likelihoods of all class names in two passes through a generative vision-language model.

Class names share prefixes, so their tokens form a trie.  One forward pass of image and prompt fills the
cache; a second holds every inner node of the trie at once, packed into one sequence in which a node sees the
prompt, its ancestors and itself, at the position of its depth.  The log-probabilities are those of one pass
per class, for hardly more than the cost of the prompt's pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from toolkit.baselines.generative import VisionLanguageModel
from toolkit.errors import InputError, check_name

AGGREGATIONS = ("sum", "mean", "pmi", "sibling")
LOGITS_BYTES = 64 * 2**20  # of float32 logits at a time: 257,000 tokens take 1 MiB per node and image


class Trie:
    """Token sequences, merged as far as they start the same way.

    Node 0 is the root; the others, each a token after its parent, are ordered by depth and, within one, by
    parent, so that the children of consecutive parents are consecutive.

    `tokens`, `parents`, `depths`: int64 (nodes,), 0 at the root.  `inner`: int64, the nodes with children,
    the root first.  `paths`: int64 (classes, longest), each class's nodes from the first token to the
    last, then zeros.  `lengths`: int64 (classes,), in tokens.

    Raises `InputError` if a candidate is another, or its start: the two are then not alternatives.
    """

    def __init__(self, candidates: list[list[int]]):
        beginnings = {tuple(ids[:end]) for ids in candidates for end in range(1, len(ids) + 1)}
        nodes = [(), *sorted(beginnings, key=lambda node: (len(node), node))]
        index = {node: position for position, node in enumerate(nodes)}
        parents = [0, *(index[node[:-1]] for node in nodes[1:])]
        inner = sorted(set(parents))
        ends = {index[tuple(ids)] for ids in candidates}
        if len(ends) < len(candidates) or not ends.isdisjoint(inner):
            raise InputError("two classes are the same tokens, or one begins with the other; rename one.")
        self.tokens = torch.tensor([0, *(node[-1] for node in nodes[1:])])
        self.parents = torch.tensor(parents)
        self.depths = torch.tensor([len(node) for node in nodes])
        self.inner = torch.tensor(inner)
        self.lengths = torch.tensor([len(ids) for ids in candidates])
        self.paths = torch.zeros(len(candidates), int(self.lengths.max()), dtype=torch.long)
        for path, ids in zip(self.paths, candidates):
            path[: len(ids)] = torch.tensor([index[tuple(ids[:end])] for end in range(1, len(ids) + 1)])

    def sees(self) -> torch.Tensor:
        """Whether the row's node may see the column's: bool (n, n) for the n inner nodes below the root.

        A node sees its ancestors and itself.
        """
        packed = self.inner[1:].tolist()
        column = {node: index for index, node in enumerate(packed)}
        sees = torch.eye(len(packed), dtype=torch.bool)
        for row, node in enumerate(packed):
            parent = int(self.parents[node])
            if parent:
                sees[row] |= sees[column[parent]]  # an earlier row, complete by now
        return sees


def score_trie(vlm: VisionLanguageModel, inputs: Mapping[str, torch.Tensor], trie: Trie) -> torch.Tensor:
    """Log-probability of every node's token, given its ancestors and each image: float32 (B, nodes).

    0 at the root.  `inputs`: the result of `vlm.inputs`, on the model's device.
    """
    prefill = vlm.hidden(inputs)
    hidden = prefill.last_hidden_state[:, -1:]  # (B, 1, width), the root's
    packed = trie.inner[1:]
    if len(packed):
        batch, prefix = inputs["input_ids"].shape
        device, dtype = hidden.device, hidden.dtype
        sees = torch.cat([torch.ones(len(packed), prefix, dtype=torch.bool), trie.sees()], dim=1).to(device)
        # An additive mask, because Gemma 2's eager attention adds it.
        mask = torch.zeros(sees.shape, dtype=dtype, device=device)
        mask.masked_fill_(~sees, torch.finfo(dtype).min)
        positions = vlm.first_position + prefix + trie.depths[packed] - 1
        after = vlm.hidden(
            {"input_ids": trie.tokens[packed].expand(batch, -1).to(device)},
            attention_mask=mask.expand(batch, 1, -1, -1),
            position_ids=positions.expand(batch, -1).to(device),
            past_key_values=prefill.past_key_values,  # modified in place, not used again
        )
        hidden = torch.cat([hidden, after.last_hidden_state], dim=1)  # (B, inner, width)
    return _log_probabilities(vlm, hidden, trie)


def _log_probabilities(vlm: VisionLanguageModel, hidden: torch.Tensor, trie: Trie) -> torch.Tensor:
    """The table of `score_trie` from the inner nodes' last states (B, inner, width), a chunk at a time."""
    slots = torch.searchsorted(trie.inner, trie.parents[1:])  # of each node's parent in `hidden`
    step = max(1, LOGITS_BYTES // (4 * hidden.shape[0] * vlm.vocabulary))
    columns = [hidden.new_zeros(hidden.shape[0], 1, dtype=torch.float32)]
    for start in range(0, hidden.shape[1], step):
        logits = vlm.logits(hidden[:, start : start + step]).float()  # (B, step, vocabulary)
        first, last = torch.searchsorted(slots, torch.tensor([start, start + step])).tolist()
        parents = slots[first:last].to(hidden.device) - start
        states = hidden[:, start : start + step][:, parents]
        chosen = vlm.logits_of(states, trie.tokens[1 + first : 1 + last])
        columns.append(chosen - logits.logsumexp(-1)[:, parents])
    return torch.cat(columns, dim=1)


def aggregate(table: torch.Tensor, trie: Trie, how: str, null: torch.Tensor | None = None) -> torch.Tensor:
    """Scores float32 (B, classes) from the table (B, nodes) of `score_trie`.

    `sum`: log-probability of the whole name, terminator included.  `mean`: that per token.  `pmi`: the sum
    minus the same for `null`, the table (1, nodes) of an image without content, which removes how likely a
    name is by itself (Holtzman et al. 2021, arXiv 2104.08315, eq. 2).  `sibling`: the sum if each step
    chooses only among the trie's continuations, as in constrained decoding; these are probabilities of the
    classes, so their exponentials sum to 1.
    """
    if how == "pmi":
        return aggregate(table, trie, "sum") - aggregate(null, trie, "sum")
    if how == "sibling":
        table = _among_siblings(table, trie)
    total = table[:, trie.paths.to(table.device)].sum(-1)  # the root's zeros pad short names
    return total / trie.lengths.to(table.device) if how == "mean" else total


def _among_siblings(table: torch.Tensor, trie: Trie) -> torch.Tensor:
    """The table with each node's probability divided by that of all children of its parent."""
    parents = trie.parents[1:].to(table.device).expand(len(table), -1)
    children = table[:, 1:]
    largest = torch.full_like(table, -torch.inf).scatter_reduce(1, parents, children, "amax")
    shares = (children - largest.gather(1, parents)).exp()
    total = torch.zeros_like(table).scatter_add(1, parents, shares).gather(1, parents)
    among = children - largest.gather(1, parents) - total.log()
    return torch.cat([torch.zeros_like(table[:, :1]), among], dim=1)


class TrieClassifier(nn.Module):
    """Classifies by the likelihood of each class name as the answer to `question`.

    `forward`: `vlm.inputs` of B images, on the model's device -> float32 scores (B, classes), combined by
    `aggregation` (see `aggregate`).  `choices`: accuracy in % of each aggregation that `choose` tried.

    Raises `InputError` for names that are the same tokens, and, if the vocabulary was pruned, for an
    aggregation other than `sibling`: the others need the probabilities of the removed tokens.
    """

    def __init__(
        self, vlm: VisionLanguageModel, question: str, names: list[str], aggregation: str = "sibling"
    ):
        super().__init__()
        self.vlm, self.question = vlm, question
        self.trie = Trie(vlm.candidates(question, names))
        self.offered = ("sibling",) if vlm.pruned else AGGREGATIONS
        self.aggregation = check_name("aggregation", aggregation, self.offered)
        self.choices: dict[str, float] = {}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._aggregated(score_trie(self.vlm, inputs, self.trie), self.aggregation)

    def choose(self, batches: Iterable) -> None:
        """Choose the most accurate aggregation on validation `batches` of `(inputs, labels)`.

        Among equals, the first in `offered`.  One pass serves all.
        """
        hits, total = dict.fromkeys(self.offered, 0), 0
        for inputs, labels in batches:
            table = score_trie(self.vlm, inputs.to(self.vlm.device), self.trie)
            for how in self.offered:
                hits[how] += int((self._aggregated(table, how).argmax(1).cpu() == labels).sum())
            total += len(labels)
        self.choices = {how: 100 * count / total for how, count in hits.items()}
        self.aggregation = max(self.choices, key=self.choices.get)

    def _aggregated(self, table: torch.Tensor, how: str) -> torch.Tensor:
        return aggregate(table, self.trie, how, self._null if how == "pmi" else None)

    @functools.cached_property
    def _null(self) -> torch.Tensor:
        return score_trie(self.vlm, self.vlm.null_inputs(self.question).to(self.vlm.device), self.trie)
