"""`demo_swin`: a Swin transformer small enough for a laptop's CPU, the hierarchical sibling of `demo_vit`.

A plain timm `SwinTransformer` (Liu et al. 2021, arXiv 2103.14030) for dense prediction: maps of four sizes,
windows with and without shift.  `notebooks/pretrain_demo_backbone.ipynb` made the weights, on formula images.
"""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer
from torch import nn

from toolkit.backbones.demo import DATA_CONFIG, load_demo_weights
from toolkit.files import DATA

WEIGHTS = DATA / "demo_swin.safetensors"
SHA256 = "af3792e5bb617e3c1a22e8a0425a799dfef8871a85b4125175d07416e2a9108b"


def build_demo_swin(num_classes: int, pretrained: bool) -> nn.Module:
    """32 px images in patches of 2: maps of 16, 8, 4 and 2 px of 24, 48, 96 and 192 channels, two blocks on
    each, 1.3 M parameters.

    Windows are of 4 x 4 px, on the last map of 2 x 2: no more than a map has at 32 px, so that the tables of
    relative positions stay as they are when `set_input_size` makes the images larger.
    """
    model = SwinTransformer(
        img_size=32,
        patch_size=2,
        embed_dim=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=(4, 4, 4, 2),
        drop_path_rate=0.0,
        weight_init="jax",  # by width: timm's usual 0.02 leaves branches this narrow without effect
    )
    model.reset_classifier(num_classes)  # that initialisation's is zero
    model.pretrained_cfg = DATA_CONFIG
    if pretrained:
        load_demo_weights(model, WEIGHTS, SHA256)
    return model
