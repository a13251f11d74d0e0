import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toolkit
from toolkit.errors import InputError
from toolkit.experiment import option_fields, upgrade
from toolkit.methods import METHODS


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


def test_every_parameter_and_option_is_part_of_the_identity():
    changed = {
        "dataset": "textures", "backbone": "vit_small", "pretrained": False, "method": "full",
        "checkpointing": "static", "budget": "1GB", "options": {"rank": 4}, "batch_norm": "updated",
        "epochs": 1, "batch_size": 8, "micro_batch_size": 4, "lr": 0.5, "weight_decay": 0.0,
        "warmup_fraction": 0.0, "precision": "bf16", "seed": 1, "resolution": 64,
    }  # fmt: skip
    assert set(changed) == set(toolkit.Experiment().to_dict()) - {"device", "head", "feature_cache"}
    ids = {toolkit.Experiment(**{name: value}).id for name, value in changed.items()}
    assert len(ids | {toolkit.Experiment().id}) == len(changed) + 1
    for other in ({"dataset": "mosaics"}, {"method": "linear"}):
        more = {"head": "upernet"} if "dataset" in other else {"feature_cache": "1GB"}
        assert toolkit.Experiment(**other).id != toolkit.Experiment(**other, **more).id
    values = {"targets": "x", "depthwise": "freeze", "tau": 0.5}
    for name, owners in option_fields().items():
        for owner, field in owners.items():
            kind = "method" if owner in METHODS else "checkpointing"
            common = {kind: owner, "dataset": "mosaics" if owner == "e3va" else "digits"}
            value = values.get(name, not field.default if field.type == "bool" else 0.5)
            value = 4 if field.type == "int" else value
            ids = {toolkit.Experiment(**common, options=o).id for o in ({}, {name: value})}
            assert len(ids) == 2, (owner, name)


def test_options_are_those_of_the_method_and_the_strategy_with_defaults_filled_in():
    experiment = toolkit.Experiment(method="galore", checkpointing="threshold", options={"gap": 20})
    assert experiment.options == {"rank": 32, "gap": 20, "scale": 1.0, "tau": 0.55}
    assert experiment.strategy.tau == 0.55 and experiment.method_options["gap"] == 20
    assert toolkit.Experiment(options={"rank": 8}) == toolkit.Experiment()


def test_flat_values_leave_out_options_of_other_methods_but_not_unknown_ones():
    linear = toolkit.Experiment(method="linear")
    assert toolkit.Experiment.flat(method="linear", rank=4, gap=7, batch_norm="frozen") == linear
    assert toolkit.Experiment.flat(rank=4, tau=0.5).options["rank"] == 4
    assert toolkit.Experiment.flat(**linear.flat_dict()) == linear
    with pytest.raises(InputError, match="Did you mean 'rank'"):
        toolkit.Experiment.flat(rnak=4)


def test_a_variant_keeps_the_options_that_both_methods_share():
    lora = toolkit.Experiment(options={"rank": 4}, checkpointing="threshold")
    assert lora.variant(method="dora").options["rank"] == 4
    assert lora.variant(method="galore").options["rank"] == 32
    assert "tau" not in lora.variant(checkpointing="none").options
    assert lora.variant(rank=2).options["rank"] == 2 and lora.options["rank"] == 4


def test_what_auto_means_for_batch_norms_is_the_same_run():
    assert toolkit.Experiment(method="full", batch_norm="updated") == toolkit.Experiment(method="full")
    assert toolkit.Experiment(method="full", batch_norm="frozen").batch_norm == "frozen"


def old(**changes):
    """Parameters as the previous schema recorded them, options of all methods side by side."""
    return {
        "dataset": "digits", "backbone": "demo_vit", "method": "lora", "checkpointing": "planned",
        "budget": "2000000000", "feature_cache": "", "threshold": 0.55, "lora_rank": 8, "lora_alpha": 16,
        "lora_dropout": 0.0, "lora_targets": "", "clip_rank": False, "depthwise": "train",
        "double_quantisation": False, "galore_rank": 32, "galore_gap": 50, "galore_scale": 1.0,
        "galore_spectrum": 0.0, "side_rank": 8, "side_reduction": 8, "side_taps": 0, "losa_start": "last",
        "losa_mixer": "both", "lst_init": "auto", "dtl_feedback": 0, "dtl_backprop": True,
        "four_bit_backbone": False, "seed": 3,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "today"),
    [
        ({}, {}),
        ({"lora_rank": 4, "lora_dropout": 0.1}, {"options": {"rank": 4, "dropout": 0.1}}),
        ({"method": "galore", "galore_rank": 4}, {"method": "galore", "options": {"rank": 4}}),
        ({"method": "losa", "side_taps": 2}, {"method": "losa", "options": {"taps": 2}}),
        (
            {"method": "dtl", "side_rank": 2, "four_bit_backbone": True},
            {"method": "dtl", "options": {"rank": 2, "four_bit": True}},
        ),
        ({"method": "lst", "lst_init": "random"}, {"method": "lst"}),
        (
            {"checkpointing": "threshold", "threshold": 0.7},
            {"checkpointing": "threshold", "options": {"tau": 0.7}},
        ),
        (
            {"method": "linear", "feature_cache": "1000"},
            {"method": "linear", "feature_cache": 1000},
        ),
    ],
)
def test_parameters_of_the_previous_schema_are_recognised(changes, today):
    experiment = toolkit.Experiment(**upgrade(old(**changes)))
    assert experiment == toolkit.Experiment(**today, seed=3)
    assert upgrade(experiment.to_dict()) == experiment.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "losa", "losa_start": "first"},
        {"method": "lst"},
        {"method": "galore", "galore_spectrum": 0.5},
    ],
)
def test_runs_by_removed_options_are_not_taken_for_others(changes):
    with pytest.raises(InputError, match="unknown option"):
        toolkit.Experiment(**upgrade(old(**changes)))


def test_equal_budgets_are_the_same_experiment():
    assert toolkit.Experiment(budget="1 GiB").id == toolkit.Experiment(budget=2**30).id


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"checkpointing": "adaptive"}, "Valid: none, static, threshold"),
        ({"precision": "int8"}, "fp32"),
        ({"budget": "lots"}, "'lots' is not a size"),
        ({"budget": -5}, "-5 is not a size"),
        ({"epochs": 0}, "epochs must lie between"),
        ({"epochs": "10"}, "epochs must be int, got '10'"),
        ({"epochs": True}, "epochs must be int"),
        ({"lr": float("nan")}, "lr must lie"),
        ({"batch_size": 8, "micro_batch_size": 9}, "micro_batch_size must lie between 0 and 8"),
        ({"precision": "fp16", "device": "cpu"}, "needs a GPU"),
        ({"options": {"depthwise": "traim"}}, "Did you mean 'train'"),
        ({"options": {"rnk": 4}}, "Did you mean 'rank'"),
        ({"options": {"gap": 4}}, "has no option 'gap'; options of that name: galore"),
        ({"options": {"rank": 0}}, "rank must lie between 1 and 4096"),
        ({"options": {"rank": "4"}}, "rank must be int"),
        ({"options": 4}, "must be a mapping"),
        ({"checkpointing": "threshold", "options": {"tau": 2}}, "tau must lie between"),
        ({"batch_norm": "on"}, "Valid: auto, frozen, updated"),
        ({"method": "dtl", "batch_norm": "updated"}, "choose 'frozen'"),
        ({"dataset": "digit_scenes"}, "'planned' cannot predict detectors"),
        ({"head": "fpn"}, "dataset 'digits' is for classification"),
        ({"dataset": "mosaics", "head": "retinanet"}, "unknown head for segmentation 'retinanet'"),
        ({"dataset": "mosaics", "method": "losa"}, "is for segmentation; choose 'e3va'"),
        ({"method": "e3va"}, "is for segmentation and detection"),
        ({"dataset": "coco", "head": "mask_rcnn", "checkpointing": "none"}, "'faster_rcnn'"),
        ({"method": "lora", "feature_cache": "1GB"}, "choose linear or losa or lst"),
        ({"method": "losa", "feature_cache": "much"}, "'much' is not a size"),
        ({"dataset": "mosaics", "method": "linear", "feature_cache": "1GB"}, "is for classification"),
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
        for name, method in METHODS.items():
            rate = method.learning_rate(backbone)
            assert 0 < rate.lr < 1 and rate.source
            dataset = "digits" if "classification" in method.tasks else "mosaics"
            assert toolkit.Experiment(dataset=dataset, backbone=backbone, method=name).lr == rate.lr
    assert METHODS["lora"].learning_rate("demo_vit").lr == 3e-3 != METHODS["lora"].learning_rate("x").lr
    assert toolkit.Experiment(method="full", lr=0.5).lr == 0.5


def test_a_shrunk_backbone_has_no_weights_to_load():
    assert not toolkit.Experiment(backbone="small:vit_small").pretrained
