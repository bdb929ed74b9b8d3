"""What a workload takes in hours, money, energy and CO2, from how fast a model generates."""

import math
from dataclasses import dataclass

from amprune.errors import EvaluationError
from amprune.settings import Workload


def check_workload(workload: Workload) -> Workload:
    """Refuses figures that no workload has."""
    for name in ("tokens_per_day", "days", "device_power"):
        _require(name, getattr(workload, name), positive=True)
    for name in ("price_per_hour", "grid_intensity"):
        _require(name, getattr(workload, name), positive=False)
    if workload.billing not in (allowed := ("exact", "started")):
        expected = " or ".join(map(repr, allowed))
        raise EvaluationError(f"billing is {workload.billing!r}, expected {expected}")
    return workload


@dataclass(frozen=True)
class Costs:
    """What a workload takes in its period."""

    hours: float
    """Of computing, not of billing."""
    money: float
    energy_kwh: float
    co2_kg: float


def costs(workload: Workload, *, tokens_per_second: float) -> Costs:
    """Returns what a workload takes at a speed, over all its days.

    - hours: `tokens_per_day / tokens_per_second / 3600 * days`;
    - energy: hours times the power of the device; CO2: energy times the intensity of the grid;
    - money: hours times the price, every day rounded up to whole hours where started hours are billed.
    """
    _require("tokens_per_second", tokens_per_second, positive=True)
    daily = workload.tokens_per_day / tokens_per_second / 3600
    hours = daily * workload.days
    billed = hours if workload.billing == "exact" else _started(daily) * workload.days
    energy = hours * workload.device_power / 1000
    return Costs(
        hours=hours,
        money=billed * workload.price_per_hour,
        energy_kwh=energy,
        co2_kg=energy * workload.grid_intensity,
    )


def saving(before: float, after: float) -> float:
    """Returns the share that is saved, `1 - after / before`: negative where it became more."""
    _require("the figure before", before, positive=True)
    _require("the figure after", after, positive=False)
    return 1 - after / before


def time_saved(speedup: float) -> float:
    """Returns the share of the time that a speedup saves, `1 - 1 / speedup`: 0.2 of 1.25."""
    _require("speedup", speedup, positive=True)
    return 1 - 1 / speedup


def _started(hours: float) -> int:
    """Rounds up to whole hours, but not for the sake of a rounding error."""
    return math.ceil(round(hours, 9))


def _require(name: str, value: float, *, positive: bool) -> None:
    bounded = value > 0 if positive else value >= 0
    if not (bounded and math.isfinite(value)):
        kind = "positive" if positive else "not negative"
        raise EvaluationError(f"{name} is {value}, expected a finite number that is {kind}")
