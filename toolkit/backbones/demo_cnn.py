"""`demo_cnn`: a CNN small enough for a laptop's CPU, the convolutional sibling of `demo_vit`.

A plain timm `EfficientNet` of the blocks of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).
`notebooks/pretrain_demo_backbone.ipynb` made the weights: `demo_cnn` on formula images, and from it two
source models for distribution shift, fully fine-tuned on a clean data set and published with their heads:
what a shift costs them, and what adapting to it wins back, is measured from there.
"""

from __future__ import annotations

from timm.models.efficientnet import EfficientNet, decode_arch_def
from torch import nn

from toolkit.backbones.demo import DATA_CONFIG, load_demo_weights
from toolkit.errors import InputError
from toolkit.files import DATA

# Of the weight files under `data/`, by the name of the backbone.
SHA256 = {
    "demo_cnn": "d0004d320aa9f428e3bee80baa2e48abf2fc080edcb5c60be3dde6bb2ca03a3f",
    "demo_cnn_digits": "2e08da7e754c8b4dedcf248ba439c268f0429bef4797ebd6e364c44d93c6e70d",
    "demo_cnn_textures": "9f524816e2434a4fc449f24c3fc2b2daf86e1641a7d412567f8091ba0fcceac7",
}
SOURCE_CLASSES = {"demo_cnn_digits": 10, "demo_cnn_textures": 15}  # of the data set in the name

# timm's strings: inverted residuals, r repeats, k kernel, s stride, e expansion, c channels.  No block of
# another type, so that all of them count as blocks.  Most of the work is at 8 x 8 and 4 x 4 pixels, since
# depthwise convolutions of larger maps are slow on a CPU.
_BLOCKS = [["ir_r1_k3_s1_e3_c16"], ["ir_r2_k3_s2_e4_c32"], ["ir_r2_k3_s2_e4_c64"], ["ir_r1_k3_s1_e4_c96"]]


def build_demo_cnn(num_classes: int, pretrained: bool) -> nn.Module:
    """32 px images, maps of 16, 8 and 4 px, six inverted residuals: 0.15 M parameters."""
    model = EfficientNet(
        decode_arch_def(_BLOCKS), num_classes=num_classes, num_features=320, stem_size=16, act_layer=nn.ReLU6
    )
    model.pretrained_cfg = DATA_CONFIG
    if pretrained:
        load_demo_weights(model, DATA / "demo_cnn.safetensors", SHA256["demo_cnn"])
    return model


def build_source_model(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    """`demo_cnn` as it was after full fine-tuning on the clean data set in `name`, its head included.

    Raises `InputError` for pretrained weights and other than that data set's number of classes.
    """
    model = build_demo_cnn(num_classes, pretrained=False)
    if pretrained:
        if num_classes != SOURCE_CLASSES[name]:
            raise InputError(
                f"the pretrained {name!r} has a head for {SOURCE_CLASSES[name]} classes, the data set has "
                f"{num_classes}: take a data set of its classes, shifted or not, or backbone 'demo_cnn' "
                "with a new head."
            )
        load_demo_weights(model, DATA / f"{name}.safetensors", SHA256[name], head=True)
    return model
