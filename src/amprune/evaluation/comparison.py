"""Two models on the same items: the paired difference and what it may be worth."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from amprune.evaluation.records import Record


@dataclass(frozen=True)
class Difference:
    """What a model gains or loses against the baseline, on the same items."""

    value: float
    """Model minus baseline; of a latency, baseline over model."""
    standard_error: float | None
    n: int
    quartiles: tuple[float, float] | None = None
    """Of the ratios of a latency, pair by pair."""
    p_value: float | None = None
    """Of zero-shot accuracy: exact McNemar test, two-sided."""


def paired(record: Record, baseline: Record) -> Difference | None:
    """Compares two records of the same measurement; None where their items are not the same.

    - accuracy: mean of the differences, question by question; standard error of that mean; McNemar's exact test;
    - perplexity: difference of the two perplexities; standard error by the delta method over windows;
    - latency: median of `baseline / model`, run by run, with the quartiles: a speedup.
    """
    same = record.items_hash is not None and record.items_hash == baseline.items_hash
    if not same or not record.items or len(record.items) != len(baseline.items):
        return None
    if record.measurement == "latency":
        return _speedup(record.items, baseline.items)
    if record.metric == "perplexity":
        return _perplexity_difference(record, baseline)
    differences = [ours - theirs for ours, theirs in zip(record.items, baseline.items, strict=True)]
    binary = set(record.items) | set(baseline.items) <= {0.0, 1.0}
    return Difference(
        value=statistics.fmean(differences),
        standard_error=standard_error(differences),
        n=len(differences),
        p_value=_mcnemar(differences) if binary else None,
    )


def average(values: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Returns the unweighted mean of figures of different tasks and its standard error, tasks being independent.

    Takes (value, standard error) pairs, of accuracies or of paired differences alike.
    """
    errors = [error for _, error in values if error is not None]
    mean = statistics.fmean(value for value, _ in values)
    return mean, math.hypot(*errors) / len(values) if len(errors) == len(values) else None


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _speedup(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    ratios = [baseline / model for model, baseline in zip(ours, theirs, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return Difference(
        value=statistics.median(ratios),
        standard_error=standard_error(ratios),
        n=len(ratios),
        quartiles=(quartiles[0], quartiles[2]),
    )


def _perplexity_difference(record: Record, baseline: Record) -> Difference:
    changes = [
        record.value * ours - baseline.value * theirs for ours, theirs in zip(record.items, baseline.items, strict=True)
    ]
    return Difference(record.value - baseline.value, standard_error(changes), len(changes))


def _mcnemar(differences: Sequence[float]) -> float:
    """Two-sided exact binomial test of wins against losses among the questions on which the models differ."""
    from scipy.stats import binomtest

    wins, losses = (sum(1 for value in differences if value == sign) for sign in (1.0, -1.0))
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
