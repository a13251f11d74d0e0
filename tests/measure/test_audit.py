"""The audit's figures against those that are known."""

import pytest

from toolkit.measure.published_counters import double_count, sam_winners


def test_the_published_log_is_a_fifth_too_high():
    table = double_count()
    published = table.loc["as its meter adds: both"]
    assert published.joules == pytest.approx(81_379.68) and published.seconds == pytest.approx(523.29)
    assert published["joules too high %"] == pytest.approx(21.5, abs=0.05)
    assert published["seconds too high %"] == pytest.approx(22.2, abs=0.05)


def test_the_verdict_of_sam_depends_on_the_version():
    winners = sam_winners((0.9, 440_000), (0.8865, 330_000), range(1, 6))
    assert set(winners.loc["VideoClassificationTest"]) == {1}
    assert set(winners.loc["cifar100_vits16_repro/src"]) == {2}
    assert winners.loc["cifar100_vits16_repro/legacy"].nunique() == 2
