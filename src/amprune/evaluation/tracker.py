"""CodeCarbon, kept quiet and offline, and what it says of how it finds the energy of each part of a machine."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from amprune.errors import EvaluationError, reason


@dataclass(frozen=True)
class Method:
    """How CodeCarbon finds the energy of a part of the machine."""

    text: str
    measured: bool
    """From a counter or a sensor, not from a model."""


@contextmanager
def open_tracker(*, device: str, country: str) -> Iterator[Any]:
    """Starts a tracker of CodeCarbon that talks to nobody, and stops it whatever happens.

    Tasks are used and not the periodic measurement, for they read the counters at both ends: a block may be shorter
    than the interval of 15 s. The only thread is that which samples power once a second within a block.
    """
    with _silent() as hidden, tempfile.TemporaryDirectory(prefix="amprune-") as folder:
        tracker = _made(hidden, device=device, country=country, folder=folder)
        try:
            yield tracker
        finally:
            tracker.stop()


def _made(hidden: list[BaseException], *, device: str, country: str, folder: str) -> Any:
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.input import DataSource

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
    ask(tracker.get_detected_hardware)
    return tracker


def ask(call: Callable[[], Any]) -> Any:
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


def tracked_parts(tracker: Any, device: str) -> dict[str, Method]:
    """Returns, of every part whose energy counts, how CodeCarbon finds it and whether it is measured."""
    on_cpu = device.startswith("cpu")
    found: dict[str, Method] = {}
    for hardware in tracker._hardware:
        part, method = part_and_method(hardware)
        chosen = getattr(hardware, "gpu_ids", None) != [] and not on_cpu
        if part != "gpu" or chosen:
            found[part] = method
    if "gpu" not in found and not on_cpu:
        raise EvaluationError(
            f"CodeCarbon reads no power of {device}; it needs nvidia-smi and nvidia-ml-py, or amdsmi, and "
            "CUDA_VISIBLE_DEVICES as numbers"
        )
    return found


def part_and_method(hardware: Any) -> tuple[str, Method]:
    """Returns cpu, gpu or ram, and the method, of an object that CodeCarbon reads."""
    kind = type(hardware).__name__
    if kind == "RAM":
        return "ram", Method("CodeCarbon's model of memory modules", measured=False)
    if kind == "CPU":
        return "cpu", _cpu_method(hardware)
    if kind == "GPU":
        return "gpu", _gpu_method(hardware)
    return hardware.chip_part.lower(), Method(f"sensors of the chip ({kind})", measured=True)


def _cpu_method(cpu: Any) -> Method:
    measured = {
        "intel_rapl": "RAPL counters of the whole package",
        "windows_emi": "energy meters of Windows",
        "intel_power_gadget": "Intel Power Gadget",
    }
    if cpu._mode in measured:
        return Method(measured[cpu._mode], measured=True)
    watts = f"{cpu._tdp:g} W that CodeCarbon assumes for {cpu._model!r}"
    if cpu._mode == "constant":
        return Method(f"constant model, half of the {watts}", measured=False)
    if cpu._mode != "cpu_load":
        return Method(f"CodeCarbon's {cpu._mode} model, {watts} at full load", measured=False)
    load = "processor time of this process" if cpu._tracking_mode == "process" else "load of the machine"
    return Method(f"model by {load}, {watts} at full load", measured=False)


def _gpu_method(gpu: Any) -> Method:
    ids = {str(entry) for entry in gpu._get_gpu_ids()}
    devices = [device for device in gpu.devices.devices if str(device.gpu_index) in ids]
    api = "NVML" if any(type(device).__name__ == "NvidiaGPUDevice" for device in devices) else "AMD SMI"
    sampled = any(device.last_energy is None for device in devices)
    names = ", ".join(sorted({device._gpu_name for device in devices}))
    return Method(f"{api} {'power sampled every second' if sampled else 'energy counter'} ({names})", measured=True)
