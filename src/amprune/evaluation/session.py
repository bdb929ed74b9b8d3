"""One run of `evaluate`: what it was asked for, what is done, where and with which versions."""

import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from amprune.evaluation.identity import Subject
from amprune.evaluation.records import Evaluation, Record
from amprune.records import go_on

logger = logging.getLogger(__name__)
_PACKAGES = ("amprune", "torch", "transformers", "tokenizers", "lm-eval", "codecarbon")


@dataclass(frozen=True)
class Session:
    """Keeps records as they come, so that a run can go on where it was interrupted."""

    path: Path
    evaluation: Evaluation
    device: str
    done: list[str]
    """Labels of what this run, or the interrupted one that it goes on with, has finished."""

    def keep(self, label: str, records: Mapping[str, Iterable[Record]]) -> None:
        """Saves the records of one measurement, by model; `label` is then done."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        for model, found in records.items():
            common: dict[str, Any] = {"model": model, "device": self.device, "versions": versions(), "time": now}
            self.evaluation.add(replace(record, **common) for record in found)
        self.done.append(label)
        self.evaluation.save(self.path)

    def finish(self) -> Evaluation:
        """Marks the run as finished: the same request then measures anew."""
        self.evaluation.unfinished = None
        self.evaluation.save(self.path)
        return self.evaluation


def open_session(path: Path, subjects: Sequence[Subject], request: dict[str, Any], *, device: str) -> Session:
    """Reads the file when it is there and finds what an interrupted run of the same request had finished."""
    evaluation = Evaluation.load(path) if path.exists() else Evaluation()
    for subject in subjects:
        evaluation.add_model(subject.entry)
    models = {subject.name: subject.entry.sha256 for subject in subjects}
    run = go_on(evaluation.unfinished, {**request, "device": device, "models": models})
    if run.done:
        logger.info("going on with an interrupted run; done already: %s", ", ".join(run.done))
    evaluation.unfinished = run.begun()
    evaluation.save(path)
    return Session(path, evaluation, device, run.done)


def device_name(device: str) -> str:
    """Returns what a device is: the processor and its threads, or the accelerator."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({_processor()}, {threads} thread{'' if threads == 1 else 's'})"


@lru_cache
def versions() -> dict[str, str]:
    """Returns the versions that can change a figure."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
