"""Which model is measured: its name in the evaluation, its folder, and what it was when it was measured."""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from amprune.errors import CheckpointError, EvaluationError
from amprune.evaluation.records import ModelEntry
from amprune.model.architecture import check_claims, quiet_transformers
from amprune.model.files import read_front_matter, stored_tensors, weight_files, what_else
from amprune.model.gguf_file import GgufFile, read_gguf
from amprune.model.loading import loading_problems
from amprune.model.quantization import quantization_of, quantization_words, require_library
from amprune.model.source import open_source
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.records import read_object, resolved, sha256
from amprune.running import Progress, no_progress
from amprune.settings import EvaluationSettings, PathLike

logger = logging.getLogger(__name__)
_NAMED = re.compile(r"([^=/\\]+)=(.+)")


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    name: str
    folder: Path
    entry: ModelEntry
    positions: int | None
    """The longest sequence that the model was made for, where its config says."""
    gguf: GgufFile | None = None
    """The file that was given, of which `folder` holds the dequantised weights."""
    protected: tuple[Path, ...] = ()
    """What is never written to."""


def open_subjects(models: Sequence[PathLike], asked: EvaluationSettings, progress: Progress) -> tuple[Subject, ...]:
    """Finds the models, each MODEL or NAME=MODEL, and reads what identifies them."""
    if not models:
        raise EvaluationError("no model to measure; give one or more")
    for name in (names := names_of(models)):
        if names.count(name) > 1:
            raise EvaluationError(f"two models are called {name!r}; give them names: first={name} second=...")
    return tuple(_open(*_named(os.fspath(model)), asked, progress) for model in models)


def names_of(models: Sequence[PathLike]) -> list[str]:
    """Returns what an evaluation calls each MODEL or NAME=MODEL: NAME, the folder's own name, or the hub id."""
    return [_named(os.fspath(model))[0] for model in models]


def _named(model: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(model)
    if match and not Path(model).exists():
        return match.group(1), match.group(2)
    path = Path(model).expanduser()
    return (resolved(path).name if path.exists() else model), model


def _open(name: str, model: str, asked: EvaluationSettings, progress: Progress) -> Subject:
    file = Path(model).expanduser()
    gguf = read_gguf(file) if file.suffix.lower() == ".gguf" and file.is_file() else None
    source = open_source(model, revision=asked.revision, dtype=asked.dtype)
    config = read_object(source.folder / "config.json", hint=what_else(source.folder))
    quantization = quantization_of(config)
    if quantization is not None:
        require_library(str(quantization.get("quant_method")), f"{source.folder}, which is quantised,")
    check_claims(config, where=str(source.folder / "config.json"))
    parameters, positions = _parameters(source.folder)
    if quantization is None:  # the names of quantised weights are their library's; loading them tells what is missing
        _check_weights(source.folder)
    plan_file = source.folder / RECORDS / "plan.json"
    plan = PruningPlan.load(plan_file) if plan_file.is_file() else None
    front = read_front_matter(source.folder / "README.md")
    entry = ModelEntry(
        name=name,
        source=model,
        sha256=_hashes([file], progress)[0] if gguf else content_hash(source.folder, progress),
        model_type=str(config.get("model_type", "unknown")),
        dtype=gguf.type if gguf else quantization_words(quantization) if quantization else _dtype(source.folder),
        parameters=parameters,
        weight_bytes=sum(part.stat().st_size for part in ([file] if gguf else _weights(source.folder))),
        base_model=source.base_model or _first(front.get("base_model")),
        license=source.license or _first(front.get("license")),
        pruned=None if plan is None else {
            "ratio_target": plan.ratio_target, "ratio_actual": plan.ratio_actual,
            "shape_before": plan.shape_before.to_dict(), "shape_after": plan.shape_after.to_dict(),
            "provenance": dict(sorted({**plan.provenance, "options": plan.choices}.items())),
        },
    )  # fmt: skip
    return Subject(name, source.folder, entry, positions, gguf, source.protected)


def _dtype(folder: Path) -> str:
    """Returns the dtype of most tensors on disk."""
    dtypes = Counter(str(tensor.header.dtype).removeprefix("torch.") for tensor in stored_tensors(folder).values())
    return dtypes.most_common(1)[0][0] if dtypes else "unknown"


def _parameters(folder: Path) -> tuple[int, int | None]:
    """Counts on the meta device, from the config alone; returns the model's positions, too."""
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture fails in its own way
        why = " ".join(str(error).split())
        raise CheckpointError(f"{folder} is no causal language model of transformers: {why}") from error
    model.tie_weights()
    positions = getattr(model.config, "max_position_embeddings", None)
    return sum(parameter.numel() for parameter in model.parameters()), positions


def _check_weights(folder: Path) -> None:
    """Refuses weights that do not fill the model: transformers would draw the rest at random and measure that."""
    problems = loading_problems(folder)
    for kind in ("missing_keys", "mismatched_keys"):
        if names := problems.get(kind):
            raise CheckpointError(
                f"the weights in {folder} are not those of its config.json: {len(names)} tensors are "
                f"{kind.removesuffix('_keys')}, such as {names[0]}; download the checkpoint again"
            )
    if names := problems.get("unexpected_keys"):
        logger.warning("%s: transformers ignores %d tensors, such as %s", folder.name, len(names), names[0])


def content_hash(folder: Path, progress: Progress = no_progress) -> str:
    """Returns the SHA-256 of config.json and the weight files, read several at a time."""
    config, files = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(), _weights(folder)
    parts = [config, *(file.name for file in files), *_hashes(files, progress)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _weights(folder: Path) -> list[Path]:
    return [file for file, _ in weight_files(folder)]


def _hashes(files: Sequence[Path], progress: Progress) -> list[str]:
    with progress(f"Hashing {files[0].parent.name}"[:24], len(files)) as advance, ThreadPoolExecutor(4) as pool:

        def digest(file: Path) -> str:
            found = sha256(file)
            advance(1)
            return found

        return list(pool.map(digest, files))


def _first(value: object) -> str | None:
    found = value[0] if isinstance(value, list) and value else value
    return str(found) if found else None
