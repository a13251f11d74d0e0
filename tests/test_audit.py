"""The audit's figures against those that are known."""

import pytest

from toolkit.audit import category_maxima, double_count, flop_over_count, sam_winners


def test_the_published_log_is_a_fifth_too_high():
    table = double_count()
    published = table.loc["as its meter adds: both"]
    assert published.joules == pytest.approx(81_379.68) and published.seconds == pytest.approx(523.29)
    assert published["joules too high %"] == pytest.approx(21.5, abs=0.05)
    assert published["seconds too high %"] == pytest.approx(22.2, abs=0.05)


@pytest.mark.parametrize(
    ("name", "published", "full", "lora", "seems", "is_"),
    [
        ("resnet18", 10.74, 10.72, 6.91, 35.4, 35.5),
        ("mobilenetv2_100", 12.39, 1.87, 1.28, 89.4, 31.4),
        ("mobilenetv3_large_100", 11.87, 1.36, 0.94, 91.9, 30.9),
    ],
)
def test_savings_of_lora_on_edge_networks(name, published, full, lora, seems, is_):
    """An independent recount of the same profiler's figures: GFLOP within 1 %, savings within 0.4 points."""
    table = flop_over_count([name]).set_index("counter")
    assert table.loc["published", "full"] == pytest.approx(published, rel=0.01)
    assert table.loc["corrected", "full"] == pytest.approx(full, rel=0.01)
    assert table.loc["corrected", "lora"] == pytest.approx(lora, rel=0.01)
    assert table.loc["published", "saved %"] == pytest.approx(seems, abs=0.3)
    assert table.loc["corrected", "saved %"] == pytest.approx(is_, abs=0.4)
    assert table.loc["toolkit", "saved %"] == pytest.approx(is_, abs=0.5)


@pytest.mark.parametrize(
    ("name", "by_maxima_1", "by_peak_1", "by_peak_16"),
    [("resnet18", 70.3, 69.9, 47.1), ("mobilenetv2_100", 33.6, 32.9, 11.3)],
)
def test_savings_of_memory_shrink_with_the_batch(name, by_maxima_1, by_peak_1, by_peak_16):
    """Counted bytes, so exact figures.  A recount elsewhere, of targets that are not known, has 73, 70 and
    48 % for ResNet-18, 29, 26 and 11 % for MobileNetV2."""
    table = category_maxima([name], [1, 16]).set_index("batch")
    for method in ("full", "lora"):
        excess = table[f"{method}: sum of maxima"] / table[f"{method}: peak"]
        assert (excess > 1.04).all() and (excess < 1.24).all()
    assert table.loc[1, "saved % by sum of maxima"] == pytest.approx(by_maxima_1, abs=0.2)
    assert table.loc[1, "saved % by peak"] == pytest.approx(by_peak_1, abs=0.2)
    assert table.loc[16, "saved % by peak"] == pytest.approx(by_peak_16, abs=0.2)


def test_the_verdict_of_sam_depends_on_the_version():
    winners = sam_winners((0.9, 440_000), (0.8865, 330_000), range(1, 6))
    assert set(winners.loc["VideoClassificationTest"]) == {1}
    assert set(winners.loc["cifar100_vits16_repro/src"]) == {2}
    assert winners.loc["cifar100_vits16_repro/legacy"].nunique() == 2
