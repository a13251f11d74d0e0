"""One model of every timm family, and of torchvision, under every method: what trains gets a finite gradient,
merging keeps the logits, and a step is planned.  `-m "not faults"` runs them all."""

import functools
from collections import namedtuple

import pytest
import timm
import torch
import torchvision
from short_runs import experiment

import toolkit
from toolkit.errors import InputError
from toolkit.methods import METHODS, merge, set_train_mode

# The smallest model of each timm family that reads images of 64 pixels; others: name -> pixels.
MODELS = """
beit_base_patch16_224 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c
dpn48b edgenext_xx_small efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0
efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
inception_next_atto lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet poolformer_s12
gmlp_ti16_224 lcnet_035 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge
nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny
regnetx_004_tv repghostnet_050 repvit_m1 res2next50 resnest50d test_resnet resnetv2_18 rexnet_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224
vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 dla34
""".split()  # noqa: SIM905
LARGER = {
    "halonet26t": 256, "crossvit_tiny_240": 240, "deepseek_vit_412m": 224, "efficientformer_l1": 224,
    "gemma4_vit_570m_enc": 96, "inception_resnet_v2": 96, "inception_v3": 96, "inception_v4": 96,
}  # fmt: skip
TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 64,
    "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 32,
    "vit_b_32": 64,
}  # fmt: skip
# A dozen with less depth or width, each for a kind: weights read past forward, several heads, names alike.
SMALL = {
    "beit_base_patch16_224": {"embed_dim": 64, "num_heads": 2, "depth": 2},
    "eva02_tiny_patch14_224": {"embed_dim": 64, "num_heads": 2, "depth": 2},
    "swinv2_tiny_window8_256": {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 64, "num_heads": 2, "depth": 2},
    "test_vit": {}, "test_resnet": {}, "test_convnext": {}, "test_nfnet": {}, "test_efficientnet": {},
    "starnet_s050": {}, "repghostnet_050": {},
}  # fmt: skip
ADAPTERS = ("lora", "dora", "adalora", "ia3", "lokr", "qlora")
SIDES = ("losa", "lst", "dtl")
PARTS = ("linear", "bitfit", "norm", "full")
# Of the default run: each family meets one adapter, in turns, and these meet all, and side networks.
EVERY = ("beit_base_patch16_224", "swinv2_tiny_window8_256")


def build(name: str, small: bool) -> tuple[torch.nn.Module, int]:
    """A model with random weights for images of so many pixels."""
    toolkit.seed_everything(0)
    kind, _, name = name.rpartition(":")
    if kind:
        pixels = TORCHVISION[name]
        sizes = {"image_size": pixels} if name.startswith("vit") else {}
        sizes |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, num_classes=5, **sizes), pixels
    pixels = LARGER.get(name, 64)
    sizes = SMALL[name] if small else {}
    create = functools.partial(timm.create_model, name, num_classes=5, **sizes)
    try:
        model = create(img_size=pixels)
    except TypeError:  # any size will do
        model = create()
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"input_size": (3, pixels, pixels)}
    return model, pixels


def cells():
    names = [*MODELS, *LARGER, *(f"torchvision:{name}" for name in TORCHVISION)]
    quick = [*SMALL, "torchvision:mobilenet_v3_small"]
    for name in names:
        for m, method in enumerate((*ADAPTERS, *SIDES, *PARTS)):
            turn = quick.index(name) % len(ADAPTERS) if name in quick else None
            usual = turn is not None and (m == turn or (name in EVERY and method not in PARTS))
            yield pytest.param(name, method, marks=[] if usual else [pytest.mark.long])


@pytest.mark.parametrize("name, method", cells())
def test_what_counts_as_trained_trains_or_is_refused(name, method):
    model, pixels = build(name, small=name in SMALL)
    images, labels = torch.randn(2, 3, pixels, pixels), torch.tensor([0, 1])
    options = {"clip_rank": True} if "clip_rank" in METHODS[method].options.names() else {}
    try:
        model = toolkit.adapt(model, method, **options)
    except InputError as error:
        assert any(remedy in str(error) for remedy in ("choose", "targets", "get_classifier")), error
        return
    assert not model.unchecked
    set_train_mode(model)
    outputs = model(images)
    getattr(outputs, "logits", outputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        parameter.grad = None
    try:
        assert toolkit.plan(model, "1TB", (images, labels), strategy="none").peak_bytes > 0
    except InputError as error:
        assert "measure" in str(error) or "cannot" in str(error)
    if method in ADAPTERS:
        _merging_keeps_the_logits(model.eval(), images)


def _merging_keeps_the_logits(model: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        before = model(images)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
        adapted = model(images)
        merged = merge(model).eval()(images)
    assert not torch.allclose(adapted, before)
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-4 * float(adapted.abs().max()))


def test_dropout_cannot_act_on_a_weight_that_is_read():
    model, _ = build("beit_base_patch16_224", small=True)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv without calling .* choose dropout 0"):
        toolkit.adapt(model, "lora", dropout=0.1)


def test_torchs_fast_path_in_evaluation_reads_the_adapted_weights():
    class Net(torch.nn.Module):
        lora_targets = r"encoder\.(linear\d|self_attn\.out_proj)"

        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 16, 8, 8)
            self.encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
            self.head = torch.nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    model = toolkit.adapt(Net(), "lora")
    assert not model.unchecked
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, 32, 32)
    with_gradients = model.eval()(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), with_gradients)


def test_a_model_that_cannot_be_checked_says_so():
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.head(x)

    assert "not checked that all get a gradient" in str(toolkit.summarize(toolkit.adapt(Rows(), "full")))


def test_parameters_that_nothing_depends_on_do_not_count_as_trained():
    model, _ = build("test_vit", small=True)
    model.mask_token = torch.nn.Parameter(torch.zeros(8))
    assert "mask_token" not in toolkit.summarize(toolkit.adapt(model, "full")).names


def test_auxiliary_heads_of_training_do_not_train(few_digits):
    Outputs = namedtuple("Outputs", ["logits", "aux_logits"])

    class Net(torch.nn.Module):  # as torchvision's GoogLeNet and Inception
        def __init__(self):
            super().__init__()
            self.stem, self.conv = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Conv2d(8, 8, 3)
            self.aux, self.fc = torch.nn.Linear(8, 10), torch.nn.Linear(8, 10)

        def forward(self, x):
            features = self.stem(x).relu()
            logits = self.fc(self.conv(features).mean((2, 3)))
            return Outputs(logits, self.aux(features.mean((2, 3)))) if self.training else logits

    model = toolkit.adapt(Net(), "full")
    before = model.aux.weight.clone()
    result = toolkit.fit(model, few_digits, experiment(epochs=1, method="full", backbone="mine"))
    assert result.status == "ok" and torch.equal(model.aux.weight, before)
    assert not any(name.startswith("aux") for name in toolkit.summarize(model).names)


def test_adapters_that_only_an_auxiliary_head_reads_are_refused_with_a_pattern_that_works():
    model = torchvision.models.googlenet(num_classes=5, init_weights=False)
    with pytest.raises(InputError, match=r"depends on aux1\.conv\.conv; .* as '(.*)' does") as refusal:
        toolkit.adapt(model, "lora")
    pattern = str(refusal.value).split("'")[1]
    adapted = toolkit.adapt(
        torchvision.models.googlenet(num_classes=5, init_weights=False), "lora", targets=pattern
    )
    names = toolkit.summarize(adapted).names
    assert "aux" not in " ".join(names) and any("inception5b" in name for name in names)


def test_a_model_gets_images_of_a_size_that_it_can_read(few_digits):
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.fc = torch.nn.Linear(3 * 28 * 28, 8), torch.nn.Linear(8, 10)

        def forward(self, x):
            return self.fc(self.hidden(x.flatten(1)).relu())

    for method, options in {"full": {}, "lora": {"targets": "hidden"}}.items():
        model = toolkit.adapt(Rows(), method, **options)
        run = experiment(epochs=1, method=method, backbone="mine")
        assert toolkit.fit(model, few_digits, run).status == "ok"


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "full"])
def test_modules_may_have_the_names_that_adapters_use(method):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.merge, self.base_layer = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
            self.head, self.merged = torch.nn.Linear(16, 16), False

        def forward(self, x):
            return x + self.base_layer(self.head(self.merge(x)).relu())

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = torch.nn.Conv2d(3, 16, 8, 8), torch.nn.Sequential(Block(), Block())
            self.active_adapters, self.model = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
            self.merge, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 5)
            self.forward = self.compute

        def compute(self, x):
            x = self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1)
            return self.head(self.merge(self.model(self.active_adapters(x))))

    toolkit.seed_everything(0)
    model, images = toolkit.adapt(Net(), method), torch.randn(2, 3, 32, 32)
    assert not model.unchecked and toolkit.plan(model, "1GB", (images, torch.tensor([0, 1]))).peak_bytes > 0
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if method == "full":
        return
    for layer in ("merge", "base_layer", "head"):
        assert any(f"blocks.1.{layer}." in name for name in toolkit.summarize(model).names)
    _merging_keeps_the_logits(model.eval(), images)


@pytest.mark.parametrize("method", [*ADAPTERS, *SIDES, "linear"])
def test_an_encoder_without_a_classifier_is_refused_as_such(method):
    def unsupported(features):  # as timm's Gemma4VitEncoder
        raise NotImplementedError

    model, _ = build("test_vit", small=True)
    model.reset_classifier(0)
    model.forward_head = unsupported
    with pytest.raises(InputError, match="no classifier to train: give it a get_classifier"):
        toolkit.adapt(model, method)
