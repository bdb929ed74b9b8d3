"""The energy of generating, through CodeCarbon: what is measured, what is modelled, and which is which."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from amprune.errors import EvaluationError
from amprune.evaluation.tracker import Method, Tracking, ask, open_tracker, tracked_parts
from amprune.running import Progress, no_progress

Run = Callable[[], int]
"""Generates, and returns how many tokens."""

MODELLED = (
    "power is modelled by CodeCarbon, not measured: two models that load the machine alike differ in energy just as "
    "they differ in time"
)


@dataclass(frozen=True)
class Part:
    """The energy of one part of the machine."""

    name: str
    """cpu, gpu or ram."""
    method: str
    """How CodeCarbon came by it."""
    measured: bool
    """From a counter or a sensor, not from a model."""
    watt_hours: float


@dataclass(frozen=True)
class Energy:
    """The energy of generating with one model."""

    watt_hours_per_1000_tokens: float
    """Of all blocks together."""
    tokens: int
    seconds: float
    watt_hours: float
    co2_kg: float
    """By CodeCarbon, for the electricity of the country."""
    parts: tuple[Part, ...]
    items: tuple[float, ...]
    """Watt-hours per 1000 tokens of each block, in the order of time: the blocks of models that were interleaved are
    paired by their place."""

    @property
    def watts(self) -> float:
        """The mean power."""
        return self.watt_hours * 3600 / self.seconds

    @property
    def standard_error(self) -> float | None:
        """Of `items`; None of a single block."""
        return statistics.stdev(self.items) / len(self.items) ** 0.5 if len(self.items) > 1 else None

    @property
    def measured_share(self) -> float:
        """The share of the energy that was measured, from 0 to 1; the rest is modelled."""
        return sum(part.watt_hours for part in self.parts if part.measured) / self.watt_hours

    @property
    def method(self) -> str:
        """How each part of the energy was found, in words."""
        return "; ".join(f"{part.name}: {part.method}" for part in self.parts)

    @property
    def note(self) -> str:
        """What a reader must know before comparing two of these."""
        share = self.measured_share
        if share == 0:
            return MODELLED
        return f"{share:.0%} of the energy was measured, the rest is modelled by CodeCarbon ({self.method})"


@dataclass(frozen=True)
class _Block:
    """One stretch of calls that CodeCarbon watched; energies in Wh."""

    tokens: int
    seconds: float
    energy: dict[str, float]
    co2_kg: float

    @property
    def watt_hours(self) -> float:
        return sum(self.energy.values())


def measured_energy(
    run: Run,
    *,
    device: str,
    country: str = "USA",
    blocks: int = 5,
    block_seconds: float = 10.0,
    warmup: int = 1,
    tracking: Tracking = "process",
    progress: Progress = no_progress,
) -> Energy:
    """Measures the energy of one model; the arguments are those of `interleaved_energy`."""
    return interleaved_energy(
        {"model": run},
        device=device,
        country=country,
        blocks=blocks,
        block_seconds=block_seconds,
        warmup=warmup,
        tracking=tracking,
        progress=progress,
    )["model"]


def interleaved_energy(
    runs: Mapping[str, Run],
    *,
    device: str,
    country: str = "USA",
    blocks: int = 5,
    block_seconds: float = 10.0,
    warmup: int = 1,
    tracking: Tracking = "process",
    progress: Progress = no_progress,
) -> dict[str, Energy]:
    """Measures the energy of several models in turns, so that a machine that grows warm or busy favours none.

    A block calls one model until `block_seconds` are over. Every round has a block of each model, and every other
    round goes backwards. Nothing is sent, and nothing is left on the disk.

    Args:
        runs: by name, what generates and returns the number of its tokens once they exist.
        device: where the models run, in the words of torch. Of `cpu` the energy is that of CPU and RAM; of `cuda:1`
            also that of this GPU, and of no other.
        country: three letters, for CO2 alone.
        blocks: blocks of each model.
        block_seconds: how long a block is at least.
        warmup: calls of each model beforehand that are not measured.
        tracking: `process` models CPU and RAM by what this process uses, `machine` by what the machine uses. It
            decides nothing where power is measured: counters know no processes.
        progress: who watches.
    """
    _check(runs, blocks=blocks, block_seconds=block_seconds, warmup=warmup, tracking=tracking)
    found: dict[str, list[_Block]] = {name: [] for name in runs}
    with open_tracker(device=device, country=country, tracking=tracking) as tracker:
        methods = tracked_parts(tracker, device)
        for name, run in runs.items():
            for _ in range(warmup):
                _tokens(name, run)
        with progress("Measuring energy", blocks * len(runs)) as advance:
            for name in _turns(list(runs), blocks):
                found[name].append(_block(tracker, name, runs[name], seconds=block_seconds, parts=list(methods)))
                advance(1)
    return {name: _energy(done, methods) for name, done in found.items()}


def _check(runs: Mapping[str, Run], *, blocks: int, block_seconds: float, warmup: int, tracking: str) -> None:
    if not runs:
        raise EvaluationError("there is no model to measure the energy of; give at least one")
    if blocks < 1 or warmup < 0 or not 0 < block_seconds < float("inf"):
        raise EvaluationError(
            f"cannot measure energy in {blocks} blocks of {block_seconds} s after {warmup} calls; expected at least "
            "one block, a positive number of seconds, and no negative number of calls"
        )
    if tracking not in get_args(Tracking):
        raise EvaluationError(f"tracking is {tracking!r}, expected 'process' or 'machine'")


def _turns(names: list[str], rounds: int) -> Iterator[str]:
    """Yields names round by round, every other round backwards: a steady drift costs all the same."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def _block(tracker: Any, name: str, run: Run, *, seconds: float, parts: list[str]) -> _Block:
    tokens = 0
    ask(tracker.start_task)
    start = time.perf_counter()
    while not tokens or time.perf_counter() - start < seconds:
        tokens += _tokens(name, run)
    elapsed = time.perf_counter() - start
    data = ask(tracker.stop_task)
    energy = {part: 1000 * float(getattr(data, f"{part}_energy", 0)) for part in parts}
    missing = [part for part, watt_hours in energy.items() if not watt_hours > 0]
    if missing:
        raise EvaluationError(
            f"CodeCarbon found no energy of {' and '.join(missing)} in {elapsed:.3g} s of {name}; measure longer "
            "blocks, or run `codecarbon detect` to see what it knows of this machine"
        )
    co2_per_watt_hour = data.emissions / data.energy_consumed / 1000
    return _Block(tokens=tokens, seconds=elapsed, energy=energy, co2_kg=co2_per_watt_hour * sum(energy.values()))


def _tokens(name: str, run: Run) -> int:
    tokens = run()
    if tokens < 1:
        raise EvaluationError(f"{name} generated {tokens} tokens, expected at least one; energy per token is undefined")
    return tokens


def _energy(blocks: list[_Block], methods: dict[str, Method]) -> Energy:
    tokens = sum(block.tokens for block in blocks)
    watt_hours = sum(block.watt_hours for block in blocks)
    return Energy(
        watt_hours_per_1000_tokens=1000 * watt_hours / tokens,
        tokens=tokens,
        seconds=sum(block.seconds for block in blocks),
        watt_hours=watt_hours,
        co2_kg=sum(block.co2_kg for block in blocks),
        parts=tuple(
            Part(part, method.text, method.measured, sum(block.energy[part] for block in blocks))
            for part, method in methods.items()
        ),
        items=tuple(1000 * block.watt_hours / block.tokens for block in blocks),
    )
