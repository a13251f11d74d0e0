import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import toolkit
from toolkit.budget import find_blocks
from toolkit.errors import InputError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch16_224", [f"blocks.{i}" for i in range(12)]),
        # 2 MBConv and 2 + 6 + 2 transformer blocks, not the four stages
        (
            "tiny_vit_21m_224",
            [f"stages.{s}.blocks.{i}" for s, n in enumerate((2, 2, 6, 2)) for i in range(n)],
        ),
        ("resnet18", [f"layer{s}.{i}" for s in (1, 2, 3, 4) for i in (0, 1)]),
    ],
)
def test_blocks_of_known_backbones(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert list(find_blocks(model)) == expected


def test_adapters_do_not_change_the_blocks(demo_model):
    plain, wrapped = find_blocks(demo_model()), find_blocks(demo_model("lora"))
    assert list(plain) == [f"blocks.{i}" for i in range(4)]
    assert [name.removeprefix("base_model.model.") for name in wrapped] == list(plain)


def test_a_lora_layer_inside_a_sequential_is_not_a_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))})
                for _ in range(2)
            )
            self.blocks = nn.Sequential(*(_Residual() for _ in range(3)))
            self.head = nn.Linear(4, 2)

        def get_classifier(self):
            return self.head

    model = toolkit.adapt(Net(), "lora", rank=2)
    assert [name.split(".")[-2:] for name in find_blocks(model)] == [["blocks", str(i)] for i in range(3)]


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x):
        return x + self.mlp(x)


def test_models_without_repeated_modules_are_refused():
    with pytest.raises(InputError, match="no repeated"):
        find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def test_the_budget_package_needs_nothing_but_torch():
    code = (
        "import sys, toolkit.budget; print(sorted({'timm', 'peft', 'pandas', 'skimage'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
