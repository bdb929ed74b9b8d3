"""Importance scores as a value and as a file; see `docs/artifacts.md`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amprune.errors import ScoresError
from amprune.shape import ModelShape

Scores = npt.NDArray[np.float32]
_FORMAT = 1
_FIELDS = {"fingerprint": str, "criterion": str, "calibration": dict, "settings": dict}


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
class ImportanceScores:
    """Scores of a whole model, with what is needed to plan from them alone."""

    layers: tuple[LayerScores, ...]
    shape: ModelShape
    fingerprint: str
    """Identifies the weights that were scored."""
    criterion: str
    calibration: dict[str, Any]
    settings: dict[str, Any]
    """Dtype and device of the forward pass, and package versions."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file; the same scores give the same bytes."""
        tensors = {}
        for index, layer in enumerate(self.layers):
            for name in ("heads", "groups", "neurons"):
                tensors[f"layers.{index}.{name}"] = np.ascontiguousarray(getattr(layer, name), dtype=np.float32)
        header = {
            "format": _FORMAT,
            "shape": self.shape.to_dict(),
            "fingerprint": self.fingerprint,
            "criterion": self.criterion,
            "calibration": self.calibration,
            "settings": self.settings,
        }
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One metadata key: safetensors writes several in no fixed order.
            path.write_bytes(save(tensors, metadata={"amprune": json.dumps(header, sort_keys=True)}))
        except OSError as error:
            raise ScoresError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ImportanceScores":
        """Reads a score file.

        Raises:
            ScoresError: the file is missing, damaged, or no score file.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = _header(file.metadata() or {}, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError) as error:  # numpy has no bfloat16
            raise ScoresError(f"cannot read the scores {path}: {error}; make them with `amprune score`") from error
        shape = ModelShape.from_dict(header["shape"], where=str(path), error=ScoresError)
        return cls(
            layers=tuple(_layer(tensors, index, shape, path) for index in range(shape.num_layers)),
            shape=shape,
            **{name: header[name] for name in _FIELDS},
        )


def _header(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(metadata["amprune"])
        known = header["format"] == _FORMAT
    except (KeyError, TypeError, ValueError, RecursionError):
        known = False
    if not known:
        raise ScoresError(f"{path} is no score file of amprune (format {_FORMAT}); make it with `amprune score`")
    for name, kind in (("shape", dict), *_FIELDS.items()):
        if not isinstance(header.get(name), kind):
            raise ScoresError(f"{path}: the field {name} of its metadata is missing or damaged; score again")
    return header


def _layer(tensors: dict[str, Any], index: int, shape: ModelShape, path: str | os.PathLike[str]) -> LayerScores:
    sizes = {
        "heads": shape.num_attention_heads,
        "groups": shape.num_key_value_heads,
        "neurons": shape.intermediate_size,
    }
    for name, size in sizes.items():
        key = f"layers.{index}.{name}"
        found = tensors.get(key)
        if found is None or found.shape != (size,) or found.dtype != np.float32:
            state = "is missing" if found is None else f"is {found.dtype} of shape {found.shape}"
            raise ScoresError(f"{path}: {key} {state}, expected float32 of shape ({size},); score again")
        if not np.isfinite(found).all():
            raise ScoresError(f"{path}: {key} holds values that are not finite; score again")
    return LayerScores(**{name: tensors[f"layers.{index}.{name}"] for name in sizes})
