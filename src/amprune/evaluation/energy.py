"""The energy of generating, through CodeCarbon: what is measured, what is modelled, and which is which."""

import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from amprune.errors import EvaluationError
from amprune.evaluation.latency import as_run
from amprune.evaluation.records import Record
from amprune.evaluation.tracker import Method, ask, open_tracker, tracked_parts
from amprune.model.latency import LatencySettings, Timed, dtype_of, generation_run
from amprune.model.llama_cpp import LlamaCppModel
from amprune.model.loading import input_device
from amprune.running import Progress, no_progress
from amprune.settings import EvaluationSettings

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


def energy_records(
    models: Mapping[str, Timed], case: LatencySettings, asked: EvaluationSettings, progress: Progress
) -> dict[str, list[Record]]:
    """Watt-hours of generating in one case, by model; `items_hash` tells which models were interleaved."""
    devices = [input_device(model) for model in models.values() if not isinstance(model, LlamaCppModel)]
    runs = {name: generation_run(model, case) for name, model in models.items()}
    found = interleaved_energy(
        runs, device=str(devices[0]) if devices else "cpu", country=asked.country, block_seconds=asked.energy_seconds,
        progress=progress,
    )  # fmt: skip
    together, records = uuid.uuid4().hex, {}
    for name, energy in found.items():
        run = as_run(case, models[name])
        settings = {**run.to_dict(), "dtype": dtype_of(models[name]), "country": asked.country}
        records[name] = [
            Record(
                measurement="energy", task=run.label, metric="energy", value=energy.watt_hours_per_1000_tokens,
                unit="Wh per 1,000 tokens", n=len(energy.items), standard_error=energy.standard_error,
                settings=settings, seed=case.seed, items=energy.items, items_hash=together, note=energy.note,
            )
        ]  # fmt: skip
    return records


def interleaved_energy(
    runs: Mapping[str, Run],
    *,
    device: str,
    country: str = EvaluationSettings.country,
    blocks: int = 5,
    block_seconds: float = EvaluationSettings.energy_seconds,
    progress: Progress = no_progress,
) -> dict[str, Energy]:
    """Measures the energy of several models in turns, so that a machine that grows warm or busy favours none.

    A block calls one model until `block_seconds` are over; each model is called once beforehand. Every round has a
    block of each model, and every other round goes backwards. Nothing is sent, and nothing is left on the disk.

    `device` is where the models run, in the words of torch: for `cpu` the energy is that of CPU and RAM, for `cuda:1`
    also that of this GPU, and of no other. `country` matters to CO2 alone.
    """
    if not runs:
        raise EvaluationError("there is no model to measure the energy of; give at least one")
    if blocks < 1 or not 0 < block_seconds < float("inf"):
        raise EvaluationError(
            f"cannot measure energy in {blocks} blocks of {block_seconds} s; expected at least one block and a "
            "positive number of seconds"
        )
    found: dict[str, list[_Block]] = {name: [] for name in runs}
    with open_tracker(device=device, country=country) as tracker:
        methods = tracked_parts(tracker, device)
        for name, run in runs.items():
            _tokens(name, run)
        with progress("Measuring energy", blocks * len(runs)) as advance:
            for name in _turns(list(runs), blocks):
                found[name].append(_block(tracker, name, runs[name], seconds=block_seconds, parts=list(methods)))
                advance(1)
    return {name: _energy(done, methods) for name, done in found.items()}


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
