"""Importance scores as a value and as a file; see `docs/artifacts.md`."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amprune.errors import ScoresError
from amprune.model.shape import ModelShape
from amprune.records import check_readable, parse, replaced

Scores = npt.NDArray[np.float32]
_FORMAT = 1


@dataclass(frozen=True)
class LayerScores:
    """Scores of one decoder layer: the higher, the more it adds to the residual stream."""

    heads: Scores
    """(num_attention_heads,): Eq. 8 for each query head."""
    groups: Scores
    """(num_key_value_heads,): Eq. 8 for the joint output of the query heads that read one key-value head."""
    neurons: Scores
    """(intermediate_size,): Eq. 9."""


@dataclass(frozen=True)
class InputMeans:
    """Mean inputs of one layer's two output projections over the calibration set."""

    attention: Scores
    """(num_attention_heads * head_dim,)"""
    mlp: Scores
    """(intermediate_size,)"""


@dataclass(frozen=True)
class _Header:
    """What the file's metadata says of the scores."""

    shape: ModelShape
    fingerprint: str
    criterion: str
    calibration: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of a whole model, with what is needed to plan from them alone."""

    layers: tuple[LayerScores, ...]
    """Empty where whole blocks were scored."""
    shape: ModelShape
    fingerprint: str
    """Identifies the weights that were scored."""
    criterion: str
    calibration: dict[str, Any]
    settings: dict[str, Any]
    """Dtype and device of the forward pass, and package versions."""
    blocks: Scores | None = None
    """(num_layers,): what each decoder block is worth; None where heads and neurons were scored."""
    input_means: tuple[InputMeans, ...] | None = None
    """One for each layer, where the criterion measures them; used by bias compensation."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file; the same scores give the same bytes."""
        tensors = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in self._named()}
        told = _Header(self.shape, self.fingerprint, self.criterion, self.calibration, self.settings)
        header = json.dumps({"format": _FORMAT, **asdict(told)}, sort_keys=True)
        with replaced(Path(path), error=ScoresError) as partial:
            # One metadata key: safetensors writes several in no fixed order.
            partial.write_bytes(save(tensors, metadata={"amprune": header}))

    def _named(self) -> Iterator[tuple[str, Scores]]:
        for index, layer in enumerate(self.layers):
            for name, values in vars(layer).items():
                yield f"layers.{index}.{name}", values
        for index, means in enumerate(self.input_means or ()):
            for name, values in vars(means).items():
                yield f"layers.{index}.{name}_inputs", values
        if self.blocks is not None:
            yield "blocks", self.blocks

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ImportanceScores":
        """Reads a score file.

        Raises:
            ScoresError: the file is missing, damaged, or no score file.
        """
        check_readable(Path(path), error=ScoresError, hint="; make it with `amprune score`")
        try:
            with safe_open(path, framework="numpy") as file:
                header = _header(file.metadata() or {}, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError) as error:  # numpy has no bfloat16
            raise ScoresError(f"cannot read the scores {path}: {error}; make them with `amprune score`") from error
        shape = header.shape
        shape.check_sums(where=str(path), error=ScoresError)
        layers = range(0 if "blocks" in tensors else shape.num_layers)
        has_means = any(name.endswith("_inputs") for name in tensors)
        return cls(
            layers=tuple(LayerScores(**_read(tensors, f"layers.{i}.", _unit_sizes(shape), path)) for i in layers),
            **vars(header),
            blocks=_read(tensors, "", {"blocks": shape.num_layers}, path)["blocks"] if "blocks" in tensors else None,
            input_means=tuple(_means(tensors, i, shape, path) for i in layers) if has_means else None,
        )


def _header(metadata: dict[str, str], path: str | os.PathLike[str]) -> _Header:
    try:
        content = json.loads(metadata["amprune"])
        known = content["format"] == _FORMAT
    except (KeyError, TypeError, ValueError, RecursionError):
        known = False
    if not known:
        raise ScoresError(f"{path} is no score file of amprune (format {_FORMAT}); make it with `amprune score`")
    return parse(_Header, content, where=f"{path}, metadata", error=ScoresError, remedy="score again", extra=False)


def _unit_sizes(shape: ModelShape) -> dict[str, int]:
    return {
        "heads": shape.num_attention_heads,
        "groups": shape.num_key_value_heads,
        "neurons": shape.intermediate_size,
    }


def _means(tensors: Mapping[str, Any], layer: int, shape: ModelShape, path: str | os.PathLike[str]) -> InputMeans:
    sizes = {
        "attention_inputs": shape.num_attention_heads * shape.head_dim,
        "mlp_inputs": shape.intermediate_size,
    }
    found = _read(tensors, f"layers.{layer}.", sizes, path)
    return InputMeans(attention=found["attention_inputs"], mlp=found["mlp_inputs"])


def _read(
    tensors: Mapping[str, Any], prefix: str, sizes: Mapping[str, int], path: str | os.PathLike[str]
) -> dict[str, Scores]:
    """Returns the named tensors, each held to be finite float32 of its size."""
    for name, size in sizes.items():
        key = f"{prefix}{name}"
        found = tensors.get(key)
        if found is None or found.shape != (size,) or found.dtype != np.float32:
            state = "is missing" if found is None else f"is {found.dtype} of shape {found.shape}"
            raise ScoresError(f"{path}: {key} {state}, expected float32 of shape ({size},); score again")
        if not np.isfinite(found).all():
            raise ScoresError(f"{path}: {key} holds values that are not finite; score again")
    return {name: tensors[f"{prefix}{name}"] for name in sizes}
