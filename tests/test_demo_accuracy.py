"""What the embedded default promises, with the default parameters and the published weights."""

import pytest

import toolkit


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_digits_reach_95_percent_as_the_mean_of_three_seeds(digits, method):
    accuracies = []
    for seed in range(3):
        experiment = toolkit.Experiment(method=method, seed=seed, device="cpu")
        toolkit.seed_everything(seed)
        model = toolkit.build_backbone("demo_vit", len(digits.classes))
        model = toolkit.adapt(model, method, **experiment.method_options)
        result = toolkit.fit(model, digits, experiment)
        accuracies.append(toolkit.test(model, digits, experiment, result).top1_pct)
    assert sum(accuracies) / 3 >= 95
