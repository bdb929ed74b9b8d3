"""The energy of generating, through CodeCarbon: what is measured, what is modelled, and which is which."""

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from amprune.errors import EvaluationError, reason
from amprune.evaluation.comparison import standard_error
from amprune.evaluation.latency import as_run, check_case
from amprune.evaluation.measurement import Job
from amprune.evaluation.records import Record
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
    watt_hours: float = 0


@dataclass(frozen=True)
class Energy:
    """The energy of generating with one model."""

    tokens: int
    seconds: float
    co2_kg: float
    """By CodeCarbon, for the electricity of the country."""
    parts: tuple[Part, ...]
    items: tuple[float, ...]
    """Watt-hours per 1000 tokens of each block, in the order of time: the blocks of models that were interleaved are
    paired by their place."""

    @property
    def watt_hours(self) -> float:
        """Of all blocks together."""
        return sum(part.watt_hours for part in self.parts)

    @property
    def watt_hours_per_1000_tokens(self) -> float:
        """Of all blocks together."""
        return 1000 * self.watt_hours / self.tokens

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


def energy_jobs(cases: Sequence[LatencySettings], asked: EvaluationSettings) -> list[Job]:
    """Returns a job a case."""
    return [
        Job(f"energy: {case.label}", partial(energy_records, case, asked), joint=True, check=partial(check_case, case))
        for case in cases
    ]


def energy_records(
    case: LatencySettings, asked: EvaluationSettings, models: Mapping[str, Timed], progress: Progress
) -> dict[str, list[Record]]:
    """Watt-hours of generating in one case, by model; `items_hash` tells which models were interleaved."""
    devices = [input_device(model) for model in models.values() if not isinstance(model, LlamaCppModel)]
    found = interleaved_energy(
        {name: generation_run(model, case) for name, model in models.items()},
        device=str(devices[0]) if devices else "cpu",
        country=asked.country,
        block_seconds=asked.energy_seconds,
        progress=progress,
    )
    session, records = uuid.uuid4().hex, {}
    for name, energy in found.items():
        run = as_run(case, models[name])
        settings = {**run.to_dict(), "dtype": dtype_of(models[name]), "country": asked.country}
        records[name] = [
            Record(
                measurement="energy", task=run.label, metric="energy", value=energy.watt_hours_per_1000_tokens,
                unit="Wh per 1,000 tokens", n=len(energy.items), standard_error=standard_error(energy.items),
                settings=settings, seed=case.seed, items=energy.items, items_hash=session, note=energy.note,
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
    found: dict[str, list[Energy]] = {name: [] for name in runs}
    with _tracker(device=device, country=country) as tracker:
        parts = _parts(tracker, device)
        for name, run in runs.items():
            _tokens(name, run)
        with progress("Measuring energy", blocks * len(runs)) as advance:
            for number in range(blocks):
                # Every other round backwards: a steady drift costs all the same.
                for name in runs if number % 2 == 0 else reversed(list(runs)):
                    found[name].append(_block(tracker, name, runs[name], seconds=block_seconds, parts=parts))
                    advance(1)
    return {
        name: Energy(
            tokens=sum(block.tokens for block in done),
            seconds=sum(block.seconds for block in done),
            co2_kg=sum(block.co2_kg for block in done),
            parts=tuple(
                replace(part, watt_hours=sum(block.parts[index].watt_hours for block in done))
                for index, part in enumerate(parts)
            ),
            items=tuple(block.watt_hours_per_1000_tokens for block in done),
        )
        for name, done in found.items()
    }


def _block(tracker: Any, name: str, run: Run, *, seconds: float, parts: Sequence[Part]) -> Energy:
    """Measures one stretch of calls."""
    tokens = 0
    _ask(tracker.start_task)
    start = time.perf_counter()
    while not tokens or time.perf_counter() - start < seconds:
        tokens += _tokens(name, run)
    elapsed = time.perf_counter() - start
    data = _ask(tracker.stop_task)
    used = [replace(part, watt_hours=1000 * float(getattr(data, f"{part.name}_energy", 0))) for part in parts]
    if missing := [part.name for part in used if not part.watt_hours > 0]:
        raise EvaluationError(
            f"CodeCarbon found no energy of {' and '.join(missing)} in {elapsed:.3g} s of {name}; measure longer "
            "blocks, or run `codecarbon detect` to see what it knows of this machine"
        )
    co2_per_watt_hour = data.emissions / data.energy_consumed / 1000
    co2 = co2_per_watt_hour * sum(part.watt_hours for part in used)
    return Energy(tokens=tokens, seconds=elapsed, co2_kg=co2, parts=tuple(used), items=())


def _tokens(name: str, run: Run) -> int:
    tokens = run()
    if tokens < 1:
        raise EvaluationError(f"{name} generated {tokens} tokens, expected at least one; energy per token is undefined")
    return tokens


# CodeCarbon, kept quiet and offline, and what it says of how it finds the energy of each part of a machine


@contextmanager
def _tracker(*, device: str, country: str) -> Iterator[Any]:
    """Starts a tracker of CodeCarbon that talks to nobody, and stops it whatever happens.

    Tasks are used and not the periodic measurement, for they read the counters at both ends: a block may be shorter
    than the interval of 15 s. The only thread is that which samples power once a second within a block.
    """
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.input import DataSource

    with _silent() as hidden, tempfile.TemporaryDirectory(prefix="amprune-") as folder:
        source: Any = DataSource
        if country not in source().get_global_energy_mix_data():
            raise EvaluationError(
                f"CodeCarbon knows no country {country!r}; expected an ISO code of three letters, as USA, BRA or FRA"
            )
        tracker: Any = OfflineEmissionsTracker(
            country_iso_code=country,
            tracking_mode="process",  # CPU and RAM are modelled by what this process uses; counters know no processes
            gpu_ids=_gpu_ids(device),
            output_dir=folder,
            output_methods=[],
            output_handlers=[],
            emissions_endpoint=None,
            electricitymaps_api_token="",  # not None, for which a configuration file may have one
            allow_multiple_runs=True,  # the alternative is a lock file
            log_level="warning",
        )
        if hidden:  # it swallows the errors of its constructor, and breaks afterwards
            raise _cannot(hidden[-1]) from hidden[-1]
        _ask(tracker.get_detected_hardware)
        try:
            yield tracker
        finally:
            tracker.stop()


def _ask(call: Callable[[], Any]) -> Any:
    """Calls CodeCarbon, which raises all sorts of errors on machines that it does not know."""
    try:
        return call()
    except Exception as error:
        raise _cannot(error) from error


def _cannot(error: BaseException) -> EvaluationError:
    return EvaluationError(
        f"CodeCarbon cannot measure on this machine: {reason(error)}; run `codecarbon detect` to see what it finds"
    )


def _gpu_ids(device: str) -> list[str] | None:
    """Returns the GPU as the driver counts; torch counts those that CUDA_VISIBLE_DEVICES lists."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if number and not number.isdigit():
        raise EvaluationError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:0'")
    index = int(number or 0)
    return [visible[index] if index < len(visible) else str(index)]


@contextmanager
def _silent() -> Iterator[list[BaseException]]:
    """Keeps what CodeCarbon logs from the terminal, and yields the exceptions that it hides in there."""
    logger = logging.getLogger("codecarbon")
    hidden: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            hidden.append(record.exc_info[1])
        return False

    logger.addFilter(keep)
    try:
        yield hidden
    finally:
        logger.removeFilter(keep)


def _parts(tracker: Any, device: str) -> list[Part]:
    """Returns every part whose energy counts."""
    on_cpu = device.startswith("cpu")
    found: dict[str, Part] = {}
    for hardware in tracker._hardware:
        part = part_of(hardware)
        chosen = getattr(hardware, "gpu_ids", None) != [] and not on_cpu
        if part.name != "gpu" or chosen:
            found[part.name] = part
    if "gpu" not in found and not on_cpu:
        raise EvaluationError(
            f"CodeCarbon reads no power of {device}; it needs nvidia-smi and nvidia-ml-py, or amdsmi, and "
            "CUDA_VISIBLE_DEVICES as numbers"
        )
    return list(found.values())


def part_of(hardware: Any) -> Part:
    """Returns how energy is found of an object that CodeCarbon reads; none is read yet."""
    kind = type(hardware).__name__
    if kind == "RAM":
        return Part("ram", "CodeCarbon's model of memory modules", measured=False)
    if kind == "CPU":
        return _cpu(hardware)
    if kind != "GPU":
        return Part(hardware.chip_part.lower(), f"sensors of the chip ({kind})", measured=True)
    ids = {str(entry) for entry in hardware._get_gpu_ids()}
    devices = [device for device in hardware.devices.devices if str(device.gpu_index) in ids]
    api = "NVML" if any(type(device).__name__ == "NvidiaGPUDevice" for device in devices) else "AMD SMI"
    sampled = any(device.last_energy is None for device in devices)
    names = ", ".join(sorted({device._gpu_name for device in devices}))
    method = f"{api} {'power sampled every second' if sampled else 'energy counter'} ({names})"
    return Part("gpu", method, measured=True)


def _cpu(cpu: Any) -> Part:
    measured = {
        "intel_rapl": "RAPL counters of the whole package",
        "windows_emi": "energy meters of Windows",
        "intel_power_gadget": "Intel Power Gadget",
    }
    if cpu._mode in measured:
        return Part("cpu", measured[cpu._mode], measured=True)
    watts = f"{cpu._tdp:g} W that CodeCarbon assumes for {cpu._model!r}"
    if cpu._mode == "constant":
        return Part("cpu", f"constant model, half of the {watts}", measured=False)
    if cpu._mode != "cpu_load":
        return Part("cpu", f"CodeCarbon's {cpu._mode} model, {watts} at full load", measured=False)
    load = "processor time of this process" if cpu._tracking_mode == "process" else "load of the machine"
    return Part("cpu", f"model by {load}, {watts} at full load", measured=False)
