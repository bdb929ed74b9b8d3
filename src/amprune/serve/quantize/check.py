"""What was stored, against the source, and what stock transformers computes with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from amprune.errors import QuantizationError
from amprune.model.architecture import quiet_transformers
from amprune.model.files import opened, stored_tensors
from amprune.model.loading import input_device, loaded_model
from amprune.model.reader import Checkpoint, identical
from amprune.prove.logits import probe_ids, probe_logits
from amprune.running import Progress, no_progress
from amprune.serve.quantize.schemes import Scheme
from amprune.serve.quantize.write import Parts

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.15}
"""How far logits computed in a dtype may lie from those of the stored weights in float64: a root mean square, in
standard deviations. Rounding to bfloat16 moves those of SmolLM2-135M by 0.05; a wrong scale, order or shape by about
1."""


@dataclass(frozen=True)
class Findings:
    """What quantising did to a model, and that stock transformers computes with the result what is stored."""

    errors: Mapping[str, float]
    """By decoder block, the share of the quantised weights' Frobenius norm that quantising changed."""
    logit_difference: float
    """To the unquantised model: a root mean square in standard deviations of its logits, in float64."""
    loaded_difference: float
    """Between stock transformers and the stored weights in float64, as above."""
    tolerance: float
    computed_in: str


class _Unpacked(Checkpoint):
    """The tensors that lie in a written folder, packed ones as what they stand for."""

    def __init__(self, base: Checkpoint, folder: Path, parts: Parts, scheme: Scheme) -> None:
        vars(self).update(vars(base))
        stored, names_of = stored_tensors(folder), {base.stored_name(name): name for name in base}
        self.folder = folder
        self._parts = {name: {part: stored[part] for part in names} for name, names in parts.items()}
        self._scheme = scheme
        packed = {part for names in parts.values() for part in names}
        self._stored = {names_of.get(name, name): tensor for name, tensor in stored.items() if name not in packed}
        self._shapes = {name: base.header(name).shape for name in parts}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return super().__getitem__(name)
        found = {}
        for part, tensor in self._parts[name].items():
            with opened(tensor.file) as file:
                found[part] = file.get_tensor(tensor.name)
        return self._scheme.unpack(name, found, self._shapes[name])

    def resolve(self, name: str) -> str:
        return name if name in self._parts else super().resolve(name)


def check_quantized(
    base: Checkpoint,
    folder: Path,
    parts: Parts,
    scheme: Scheme,
    *,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Findings:
    """Holds three things: stored weights are near those of the source, the rest is the same, and the folder loads.

    Source and stored weights are streamed module by module; the quantised model is loaded whole, by stock transformers.

    Raises:
        QuantizationError: one of them does not hold.
        CheckpointError: stock transformers cannot load the folder.
    """
    written = _Unpacked(base, folder, parts, scheme)
    with progress("Comparing", len(base) + 3) as advance:
        errors = _errors(base, written, parts, scheme, advance)
        expected = _finite(probe_logits(base), "the model to quantise")
        advance(1)
        stored = _finite(probe_logits(written), "the quantised model")
        advance(1)
        with loaded_model(folder, device=device) as model:
            loaded = _finite(_logits(model, base), "the quantised model, as transformers loads it,")
            dtype = str(model.dtype).removeprefix("torch.")
        advance(1)
    difference, tolerance = _distance(loaded, stored), TOLERANCES[scheme.rounds_to or dtype]
    if not difference <= tolerance:
        raise QuantizationError(
            f"the logits that transformers computes with {folder} differ from those of the weights stored in it by "
            f"{difference:.1e} of their standard deviation, more than {tolerance} in {dtype}; is {scheme.library} "
            "sound on this machine?"
        )
    return Findings(errors, _distance(stored, expected), difference, tolerance, dtype)


def _errors(base: Checkpoint, written: Checkpoint, parts: Parts, scheme: Scheme, advance: Any) -> dict[str, float]:
    """Returns the relative Frobenius error of every decoder block, and of each quantised layer outside of them."""
    blocks = [base.architecture.block(layer) for layer in range(base.shape.num_layers)]
    squares: dict[str, list[float]] = {block: [0.0, 0.0] for block in blocks}
    for name in base:
        dense, found = base[name], written[name]
        if name in parts:
            lost, whole = (float(t.double().square().sum()) for t in (found.double() - dense.double(), dense))
            if not math.sqrt(lost) <= scheme.largest_error * math.sqrt(whole):
                raise QuantizationError(
                    f"quantising changed {name} by {math.sqrt(lost / whole) if whole else lost:.1%} of its norm, more "
                    f"than {scheme.largest_error:.0%}: are its weights finite, and is the disk sound?"
                )
            block = next((block for block in blocks if name.startswith(f"{block}.")), name)
            sums = squares.setdefault(block, [0.0, 0.0])
            sums[0] += lost
            sums[1] += whole
        elif not identical(found, dense):
            raise QuantizationError(f"{written.folder}: tensor {name} is not that of the source; is the disk sound?")
        advance(1)
    return {block: math.sqrt(lost / whole) if whole else 0.0 for block, (lost, whole) in squares.items()}


def _logits(model: PreTrainedModel, base: Checkpoint) -> torch.Tensor:
    with torch.inference_mode(), quiet_transformers():
        found: torch.Tensor = model(input_ids=probe_ids(model, base.positions).to(input_device(model))).logits
    return found.double().cpu()


def _finite(logits: torch.Tensor, what: str) -> torch.Tensor:
    if not torch.isfinite(logits).all():
        raise QuantizationError(f"{what} gives logits that are not finite")
    return logits


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.std())
