"""Budgets in Lightning's Trainer."""

import logging
import warnings

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

lightning = pytest.importorskip("lightning")
from programs import Run, Watch, held  # noqa: E402

from toolkit.integrations.lightning import BudgetCallback  # noqa: E402


class _Classifier(lightning.LightningModule):
    """Its step calls the network, not the module itself."""

    def __init__(self):
        super().__init__()
        self.network = VisionTransformer(
            img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, num_classes=10
        )

    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class _WatchSteps(lightning.Callback):
    def __init__(self):
        self.watch = Watch()

    def on_train_batch_start(self, trainer, module, batch, index):
        self.watch.step_begins(module, *batch)

    def on_train_end(self, trainer, module):
        self.peak_bytes = self.watch.training_ends()


def test_lightning_keeps_its_budget_where_the_step_calls_a_submodule():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 3, 32, 32, generator=draw), torch.randint(0, 10, (64,), generator=draw)

    def program(budget):
        model, watching = _Classifier(), _WatchSteps()
        callbacks = [watching] + ([] if budget is None else [BudgetCallback(budget)])
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            lightning.Trainer(
                max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
            ).fit(model, loader)  # fmt: skip
        return Run(model, watching.peak_bytes, getattr(callbacks[-1], "handle", None))

    held(program, share=0.75)
