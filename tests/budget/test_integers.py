"""Models whose path depends on the values of masks, lengths and labels are planned as they run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit import auto_checkpoint, plan
from toolkit.budget import TensorMemory


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x, mask):
        x = x + self.b(F.gelu(self.a(x)))
        return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


class Reader(nn.Module):
    """Cuts texts at the longest, masks what is padded, if anything, and ignores it in its loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(32, 16), nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 32)

    def forward(self, ids, mask, labels):
        longest = int(mask.sum(1).max())
        ids, mask, labels = ids[:, :longest], mask[:, :longest].bool(), labels[:, :longest]
        positions = torch.arange(longest)[None].expand(len(ids), -1)
        x = self.embedding(ids) + torch.where(positions % 2 == 0, 0.1, 0.2)[..., None]
        for layer in self.layers:
            x = layer(x, None if mask.all() else mask)
        return F.cross_entropy(self.head(x[mask]), labels[mask])


def texts(padded):
    mask = torch.ones(8, 24, dtype=torch.long)
    if padded:
        mask[:, 20:], mask[1, 5:] = 0, 0
    ids = torch.arange(8 * 24).view(8, 24) % 32
    return {"ids": ids, "mask": mask, "labels": ids}


def peak_and_gradients(model, batch):
    """Peak bytes of a step without an optimizer, and its gradients."""
    memory = TensorMemory(torch.device("cpu"))
    memory.track([*model.parameters(), *model.buffers(), *batch.values()])
    with memory:
        outputs = model(**batch)
        (outputs if isinstance(outputs, torch.Tensor) else outputs.loss).backward()
        del outputs
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return memory.peak_bytes, gradients


def check(model, batch):
    torch.manual_seed(0)
    plain_bytes, expected = peak_and_gradients(model, batch)
    with auto_checkpoint(model, plain_bytes * 3 // 4, batch, optimizer="sgd") as handle:
        batch = {name: tensor.clone() for name, tensor in batch.items()}
        torch.manual_seed(0)
        peak_bytes, gradients = peak_and_gradients(model, batch)
    assert peak_bytes <= plain_bytes * 3 // 4
    assert handle.departures == 0 and handle.plan.recompute_flops > 0
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("padded", [False, True])
def test_a_path_that_depends_on_masks_and_lengths(padded):
    check(Reader(), texts(padded))


def test_a_batch_without_values_gets_a_plan_as_far_as_no_value_is_read():
    class Shifting(Reader):
        def forward(self, ids, mask, labels):
            return super().forward(ids.roll(1, 1), torch.ones(8, 24, dtype=torch.long), labels)

    meta = {name: tensor.to("meta") for name, tensor in texts(False).items()}
    with_values = plan(Shifting(), "1GB", texts(False)).peak_bytes
    assert plan(Shifting(), "1GB", meta).peak_bytes == pytest.approx(with_values, rel=0.01)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["Bert", "T5"])
def test_text_models_of_transformers_run_as_planned(kind, padded):
    import transformers

    if kind == "Bert":
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.T5Config(
            vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    batch = texts(padded)
    check(
        model.train(), {"input_ids": batch["ids"], "attention_mask": batch["mask"], "labels": batch["labels"]}
    )
