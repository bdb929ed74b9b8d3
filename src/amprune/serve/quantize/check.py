"""What was stored, against the source, and what stock transformers computes with it."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amprune.errors import QuantizationError
from amprune.model.files import opened, stored_tensors
from amprune.model.loading import loaded_model
from amprune.model.reader import Checkpoint, identical
from amprune.prove.comparison import compare, finite, hold, logits_of, probe_ids, probe_logits
from amprune.running import Progress
from amprune.serve.quantize.schemes import Scheme

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.15}
"""How far logits computed in a dtype may lie from those of the stored weights in float64: a root mean square, in
standard deviations. Rounding to bfloat16 moves those of SmolLM2-135M by 0.05; a wrong scale, order or shape by about
1."""


Parts = Mapping[str, tuple[str, ...]]
"""The names that each weight's packed tensors have in the file."""


def check_quantized(
    base: Checkpoint, folder: Path, parts: Parts, scheme: Scheme, *, device: str | None, progress: Progress
) -> dict[str, Any]:
    """Holds three things: stored weights are near those of the source, the rest is the same, and the folder loads.

    Source and stored weights are streamed module by module; the quantised model is loaded whole, by stock transformers.
    Returns the figures of the record.
    """
    written = _unpacked(base, folder, parts, scheme)
    with progress("Comparing", len(base) + 3) as advance:
        errors = _errors(base, written, parts, scheme, advance)
        expected = _finite(probe_logits(base), "the model to quantise")
        advance(1)
        stored = _finite(probe_logits(written), "the quantised model")
        advance(1)
        with loaded_model(folder, device=device) as model:
            loaded = _finite(logits_of(model, probe_ids(base)), "the quantised model, as transformers loads it,")
            dtype = str(model.dtype).removeprefix("torch.")
        advance(1)
    tolerance = TOLERANCES[scheme.rounds_to or dtype]
    difference = hold(
        compare(loaded, stored).mean, tolerance, QuantizationError,
        f"the logits that transformers computes with {folder} differ from those of the weights stored in it",
        f"{tolerance} in {dtype}; is {scheme.library} sound on this machine?",
    )  # fmt: skip
    return {
        "errors": errors, "logit_difference": compare(stored, expected).mean, "loaded_difference": difference,
        "tolerance": tolerance, "computed_in": dtype,
    }  # fmt: skip


def _unpacked(base: Checkpoint, folder: Path, parts: Parts, scheme: Scheme) -> Checkpoint:
    """Opens the tensors that lie in a written folder, packed ones as what they stand for."""
    stored, names_of = stored_tensors(folder), {base.stored_name(name): name for name in base}
    packed = {part for names in parts.values() for part in names}
    plain = {names_of.get(name, name): tensor for name, tensor in stored.items() if name not in packed}

    def unpack(name: str) -> torch.Tensor:
        found = {}
        for part in parts[name]:
            with opened(stored[part].file) as file:
                found[part] = file.get_tensor(stored[part].name)
        return scheme.unpack(name, found, base.header(name).shape)

    return Checkpoint(folder, base.config, base.architecture, plain, {name: partial(unpack, name) for name in parts})


def _finite(logits: torch.Tensor, what: str) -> torch.Tensor:
    return finite(logits, QuantizationError(f"{what} gives logits that are not finite"))


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
