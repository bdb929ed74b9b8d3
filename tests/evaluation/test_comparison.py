"""Paired differences, held to scipy and to a bootstrap."""

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from amprune.evaluation.comparison import average, paired, standard_error
from amprune.evaluation.records import Record


def record(measurement: str, metric: str, items: list[float], value: float | None = None, **options: Any) -> Record:
    mean = statistics.fmean(items) if value is None else value
    common: dict[str, Any] = {"model": "m", "task": "t", "unit": "u", "items_hash": "same", **options}
    return Record(measurement=measurement, metric=metric, value=mean, items=tuple(items), n=len(items), **common)


def accuracy(items: list[float], **options: Any) -> Record:
    return record("zero_shot", "acc", items, **options)


def perplexity(losses: list[float]) -> Record:
    return record("perplexity", "perplexity", losses, math.exp(statistics.fmean(losses)))


def random_losses(n: int = 80, seed: int = 0) -> tuple[list[float], list[float]]:
    """Losses of two models on the same windows: hard windows are hard for both."""
    draw = random.Random(seed)
    ours = [draw.gauss(3.0, 0.4) for _ in range(n)]
    return ours, [loss + draw.gauss(0.3, 0.1) for loss in ours]


@pytest.mark.parametrize(
    "same",
    [accuracy([1, 0, 1, 1]), perplexity([2.0, 3.0, 2.5]), record("zero_shot", "exact_match", [0.5, 0.25])],
    ids=lambda found: found.metric,
)
def test_a_model_does_not_differ_from_itself(same: Record) -> None:
    found = paired(replace(same, model="other"), same)
    assert found is not None
    assert (found.value, found.standard_error, found.n) == (0, 0, len(same.items))
    assert found.p_value == (1.0 if same.metric == "acc" else None)


def test_a_latency_against_itself_is_a_speedup_of_one() -> None:
    same = record("latency", "total", [1.0, 1.5, 2.0])
    found = paired(same, same)
    assert found is not None
    assert (found.value, found.quartiles, found.standard_error) == (1, (1, 1), 0)


def test_accuracy_by_mcnemars_exact_test() -> None:
    # 9 questions won, 2 lost, the others answered alike.
    ours = [1.0] * 9 + [0.0] * 2 + [1.0] * 5 + [0.0] * 4
    theirs = [0.0] * 9 + [1.0] * 2 + [1.0] * 5 + [0.0] * 4
    found = paired(accuracy(ours), accuracy(theirs))
    assert found is not None
    assert found.value == pytest.approx(7 / 20)
    assert found.p_value == pytest.approx(binomtest(9, 11).pvalue)
    assert found.p_value == pytest.approx(2 * sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11)
    assert found.n == 20


def test_the_standard_error_of_a_difference_is_that_of_the_paired_t_test() -> None:
    draw = random.Random(1)
    ours, theirs = ([float(draw.random() < share) for _ in range(200)] for share in (0.6, 0.5))
    found = paired(accuracy(ours), accuracy(theirs))
    expected = ttest_rel(ours, theirs)
    assert found is not None
    assert found.standard_error is not None
    assert found.value / found.standard_error == pytest.approx(expected.statistic)


def test_losing_is_as_significant_as_winning() -> None:
    ours, theirs = accuracy([1, 1, 1, 0, 1, 1]), accuracy([0, 0, 0, 1, 1, 1])
    won, lost = paired(ours, theirs), paired(theirs, ours)
    assert won is not None
    assert lost is not None
    assert (won.value, won.p_value) == (-lost.value, lost.p_value)


def test_figures_that_are_not_zero_or_one_have_no_p_value() -> None:
    found = paired(record("zero_shot", "f1", [0.5, 1, 0]), record("zero_shot", "f1", [0, 1, 0]))
    assert found is not None
    assert found.p_value is None
    assert found.value == pytest.approx(1 / 6)


def bootstrap(ours: list[float], theirs: list[float]) -> float:
    """Returns the spread of the difference of perplexities over windows drawn with replacement."""
    draw, pairs = np.random.default_rng(0), np.array([ours, theirs])
    picks = draw.integers(len(ours), size=(4000, len(ours)))
    first, second = np.exp(pairs[:, picks].mean(axis=2))
    return float(np.std(first - second))


def test_the_error_of_a_perplexity_difference_agrees_with_a_bootstrap() -> None:
    theirs, ours = random_losses()
    found = paired(perplexity(ours), perplexity(theirs))
    assert found is not None
    assert found.value == pytest.approx(math.exp(statistics.fmean(ours)) - math.exp(statistics.fmean(theirs)))
    assert found.standard_error == pytest.approx(bootstrap(ours, theirs), rel=0.2)
    unpaired = math.hypot(
        *(math.exp(statistics.fmean(losses)) * (standard_error(losses) or 0) for losses in (ours, theirs))
    )
    assert found.standard_error < unpaired / 2


def test_a_speedup_is_the_median_of_the_ratios_run_by_run() -> None:
    ours, theirs = record("latency", "total", [1.0, 2.0, 4.0, 1.0]), record("latency", "total", [2.0, 3.0, 4.0, 4.0])
    found = paired(ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(1.75)  # of 1, 1.5, 2 and 4
    assert found.quartiles == pytest.approx((1.375, 2.5))
    single = paired(record("latency", "total", [1.0]), record("latency", "total", [2.0]))
    assert single is not None
    assert (single.value, single.quartiles, single.standard_error) == (2, (2, 2), None)


@pytest.mark.parametrize(
    "other",
    [
        accuracy([1, 0, 1], items_hash="other"),
        accuracy([1, 0, 1], items_hash=None),
        accuracy([1, 0]),
        accuracy([], value=0.5),
    ],
    ids=["other items", "unknown items", "fewer items", "no items"],
)
def test_other_items_are_not_paired(other: Record) -> None:
    mine = accuracy([1, 1, 1])
    assert paired(mine, other) is None
    assert paired(other, mine) is None
    assert paired(other, other) is None or other.items_hash is not None


def test_the_average_of_tasks() -> None:
    assert average([(0.5, 0.03), (0.7, 0.04)]) == pytest.approx((0.6, 0.025))
    assert average([(0.5, 0.03), (0.7, None)]) == (pytest.approx(0.6), None)


def test_the_standard_error_of_a_single_value_is_unknown() -> None:
    assert standard_error([3.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
