"""What the embedded default promises, with the default parameters and the published weights."""

import pytest

import toolkit


@pytest.mark.long
@pytest.mark.parametrize("backbone", ["demo_vit", "demo_cnn"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_digits_reach_95_percent_as_the_mean_of_three_seeds(digits, backbone, method):
    accuracies = []
    for seed in range(3):
        experiment = toolkit.Experiment(backbone=backbone, method=method, seed=seed, device="cpu")
        toolkit.seed_everything(seed)
        model = toolkit.build_backbone(backbone, len(digits.classes))
        model = toolkit.adapt(model, method, **experiment.method_options)
        result = toolkit.fit(model, digits, experiment)
        accuracies.append(toolkit.test(model, digits, experiment, result).top1_pct)
    assert sum(accuracies) / 3 >= 95
