import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toolkit
from toolkit.errors import InputError
from toolkit.methods import DENSE_METHODS, METHODS
from toolkit.methods.learning_rates import TABLE, hyperparameters


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "method": st.sampled_from(["full", "linear", "bitfit", "lora"]),
            "checkpointing": st.sampled_from(["none", "static", "threshold"]),
            "budget": st.integers(1, 2**40).map(str),
            "epochs": st.integers(1, 1000),
            "lr": st.floats(0, 1),
            "seed": st.integers(0, 2**31 - 1),
            "pretrained": st.booleans(),
        },
    )
)
def test_law_json_round_trip_keeps_the_identity(parameters):
    experiment = toolkit.Experiment(**parameters)
    again = toolkit.Experiment(**json.loads(json.dumps(experiment.to_dict())))
    assert again == experiment and again.id == experiment.id and again.name == experiment.name


def test_every_parameter_is_part_of_the_identity():
    changed = {
        "dataset": "textures", "backbone": "vit_small", "pretrained": False, "method": "full",
        "checkpointing": "static", "budget": "1GB", "threshold": 0.5, "lora_rank": 4, "lora_alpha": 8,
        "lora_dropout": 0.1, "lora_targets": "x", "clip_rank": True, "depthwise": "freeze",
        "batch_norm": "updated", "epochs": 1, "batch_size": 8, "micro_batch_size": 4, "lr": 0.5,
        "weight_decay": 0.0, "warmup_fraction": 0.0, "precision": "bf16", "seed": 1,
    }  # fmt: skip
    of_methods = {
        "qlora": {"double_quantisation": True},
        "galore": {"galore_rank": 4, "galore_gap": 4, "galore_scale": 0.5, "galore_spectrum": 0.5},
        "losa": {
            "side_rank": 4, "side_taps": 2, "losa_start": "first", "losa_mixer": "tokens",
            "four_bit_backbone": True, "feature_cache": "1GB",
        },
        "lst": {"side_reduction": 4, "lst_init": "random"},
        "dtl": {"dtl_feedback": 1, "dtl_backprop": False},
    }  # fmt: skip
    fields = set(toolkit.Experiment().to_dict())
    assert set(changed).union(*of_methods.values()) == fields - {"device", "head"}  # their one value here
    assert (
        toolkit.Experiment(dataset="mosaics").id != toolkit.Experiment(dataset="mosaics", head="upernet").id
    )
    for method, own in {"lora": changed, **of_methods}.items():
        ids = {toolkit.Experiment(**{"method": method, name: value}).id for name, value in own.items()}
        assert len(ids | {toolkit.Experiment(method=method).id}) == len(own) + 1


def test_options_that_a_method_does_not_have_make_no_other_run():
    linear = toolkit.Experiment(method="linear")
    assert toolkit.Experiment(method="linear", lora_rank=4, galore_gap=7, batch_norm="frozen") == linear
    assert toolkit.Experiment(method="full", batch_norm="updated") == toolkit.Experiment(method="full")
    assert toolkit.Experiment(method="full", batch_norm="frozen").batch_norm == "frozen"


def test_equal_budgets_are_the_same_experiment():
    assert toolkit.Experiment(budget="1 GiB").id == toolkit.Experiment(budget=2**30).id


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"checkpointing": "adaptive"}, "Valid: none, static, threshold"),
        ({"precision": "int8"}, "fp32"),
        ({"budget": "lots"}, "budget 'lots'"),
        ({"budget": -5}, "budget '-5'"),
        ({"epochs": 0}, "epochs must lie between"),
        ({"epochs": "10"}, "epochs must be int, got '10'"),
        ({"epochs": True}, "epochs must be int"),
        ({"lr": float("nan")}, "lr must lie"),
        ({"batch_size": 8, "micro_batch_size": 9}, "micro_batch_size must lie between 0 and 8"),
        ({"precision": "fp16", "device": "cpu"}, "needs a GPU"),
        ({"depthwise": "traim"}, "Did you mean 'train'"),
        ({"batch_norm": "on"}, "Valid: auto, frozen, updated"),
        ({"losa_start": "middle"}, "losa_start"),
        ({"method": "dtl", "batch_norm": "updated"}, "choose 'frozen'"),
        ({"dataset": "digit_scenes"}, "'planned' cannot predict detectors"),
        ({"head": "fpn"}, "dataset 'digits' is for classification"),
        ({"dataset": "mosaics", "head": "retinanet"}, "unknown head for segmentation 'retinanet'"),
        ({"dataset": "mosaics", "method": "losa"}, "for segmentation choose 'e3va'"),
        ({"method": "e3va"}, "is for dense tasks"),
        ({"dataset": "coco", "head": "mask_rcnn", "checkpointing": "none"}, "'faster_rcnn'"),
        ({"method": "lora", "feature_cache": "1GB"}, "choose linear or losa or lst"),
        ({"method": "losa", "feature_cache": "much"}, "budget 'much'"),
        ({"dataset": "mosaics", "method": "linear", "feature_cache": "1GB"}, "is for classification"),
        ({"galore_spectrum": 2}, "galore_spectrum must lie between"),
    ],
)
def test_bad_values_are_named(parameters, message):
    with pytest.raises(InputError, match=message):
        toolkit.Experiment(**parameters)


def test_from_namespace_takes_its_fields_only_and_misses_none():
    namespace = toolkit.Experiment(seed=3).to_dict() | {"runs": "", "plt": object()}
    assert toolkit.Experiment.from_namespace(namespace) == toolkit.Experiment(seed=3)
    del namespace["lr"]
    with pytest.raises(InputError, match="lacks lr"):
        toolkit.Experiment.from_namespace(namespace)


def test_folder_names_are_safe():
    name = toolkit.Experiment(dataset="folder:/home/x/../y z$\n", backbone="a/b").name
    assert all(c.isalnum() or c in "-_" for c in name)


def test_every_method_has_a_learning_rate_with_a_source():
    for backbone in ("demo_vit", "vit_small", "vim_small", "resnet18"):
        for method in METHODS:
            row = hyperparameters(backbone, method)
            assert 0 < row.lr < 1 and row.source
            dataset = "mosaics" if method in DENSE_METHODS else "digits"
            assert toolkit.Experiment(dataset=dataset, backbone=backbone, method=method).lr == row.lr
    assert all(set(rows) <= set(METHODS) for rows in TABLE.values()) and set(TABLE["default"]) == set(METHODS)
    assert toolkit.Experiment(method="full", lr=0.5).lr == 0.5


def test_a_shrunk_backbone_has_no_weights_to_load():
    assert not toolkit.Experiment(backbone="small:vit_small").pretrained
