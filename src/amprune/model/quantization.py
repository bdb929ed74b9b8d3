"""How weights are quantised: what config.json says of it, which library they need, what `quantize` recorded."""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from amprune.errors import CheckpointError, MissingDependencyError, QuantizationError, UnsupportedModelError, required
from amprune.model.files import stored_tensors
from amprune.model.writer import RECORDS
from amprune.records import Count, Rule, read, read_object

RECORD = "quantization.json"
_AGAIN = "the record is damaged: quantise the model again"
_PACKAGES = {"compressed-tensors": "compressed-tensors", "gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq"}
"""Of methods of others; what amprune quantises with is an extra of it."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the part of a config.json that tells how the weights are quantised; None where they are not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return found if isinstance(found, Mapping) else {"quant_method": str(found)}


def quantization_words(quantization: Mapping[str, Any]) -> str:
    """Names the type of quantised weights and the library, such as `int8 (torchao)` or `nf4 (bitsandbytes)`."""
    method = str(quantization.get("quant_method", "unknown"))
    stated = re.search(r"(int|float)\d+(?=weight)", str(quantization.get("quant_type", "")).lower())
    bits = quantization.get("bits")
    kind = stated[0] if stated else f"{bits} bits" if isinstance(bits, int) else None
    if quantization.get("load_in_8bit"):
        kind = "int8"
    if quantization.get("load_in_4bit"):
        kind = str(quantization.get("bnb_4bit_quant_type", "4 bits"))
    return f"{kind} ({method})" if kind else method


def require_library(method: str, what: str) -> None:
    """Refuses to go on without the library that runs weights of a method, where it is one that is known."""
    required(what, method)
    package = _PACKAGES.get(method)
    if package is not None and find_spec(package.replace("-", "_")) is None:
        raise MissingDependencyError(f"{what} needs {package}, which is not installed here: `pip install {package}`")


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses what `quantize` wrote where the weights themselves are needed, and names what it was made from."""
    if (quantization := quantization_of(config)) is None:
        return
    try:
        source = read_object(folder / RECORDS / RECORD).get("quantized_from")
    except CheckpointError:  # another tool has quantised it
        _check_needed(folder, quantization)
        return
    if isinstance(source, str):
        raise UnsupportedModelError(
            f"{folder}: the checkpoint is quantised to {quantization_words(quantization)}, and its full-precision "
            f"weights are needed here. Give {source}, which it was made from, in its place: prune and recover first, "
            "quantise last"
        )


def _check_needed(folder: Path, quantization: Mapping[str, Any]) -> None:
    """Tells of an entry that was left beside weights that are not quantised."""
    dtypes = {str(tensor.header.dtype).removeprefix("torch.") for tensor in stored_tensors(folder).values()}
    if dtypes <= {"float32", "bfloat16", "float16"}:
        raise UnsupportedModelError(
            f"{folder}: config.json has a quantization_config ({quantization_words(quantization)}), but the weights "
            f"are {' and '.join(sorted(dtypes))}, as of a model that is not quantised; if so, remove that entry"
        )


@dataclass(frozen=True)
class Quantization:
    """The content of `quantization.json`."""

    quantized_from: str
    """What was quantised."""
    type: str
    """int8 or int4."""
    numbers: str
    """What a stored number is: int8, nf4."""
    group_size: Count | None
    """Inputs of an output that share a scale; None where all do."""
    library: str
    quantized: Count
    """How many of the `parameters` are quantised."""
    parameters: Count
    bytes_before: Count
    bytes_after: Count
    """Of all weights on disk, scales included."""
    errors: Annotated[Mapping[str, float], Rule("an object with a number for each block", bool)]
    """By decoder block, the share of the quantised weights' Frobenius norm that quantising changed."""
    logit_difference: float
    """To the unquantised model: a root mean square in standard deviations of its logits, in float64."""
    loaded_difference: float
    """Between stock transformers and the stored weights in float64, as above."""
    tolerance: float
    """What the latter had to stay below."""
    computed_in: str
    """The dtype in which transformers computed."""
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"format": 1, **vars(self), "error_mean": self.mean_error, "error_max": max(self.errors.values())}

    @property
    def mean_error(self) -> float:
        """The mean over decoder blocks of the relative error."""
        return statistics.fmean(self.errors.values())


def is_quantized(folder: Path) -> bool:
    """Tells whether a checkpoint says that amprune quantised it."""
    return (folder / RECORDS / RECORD).is_file()


def read_quantization(folder: Path) -> Quantization:
    """Reads the record that a quantised checkpoint carries; raises QuantizationError where it is missing or damaged."""
    return read(Quantization, folder / RECORDS / RECORD, error=QuantizationError, remedy=_AGAIN, format=1)


def quantization_sentences(found: Quantization) -> tuple[str, ...]:
    """Says how a model was quantised, what that did to it, what was shown, and what loads it."""
    scale = f"a scale for every {found.group_size} weights" if found.group_size else "a scale for each output"
    return (
        f"Quantised from {found.quantized_from} to {found.type} ({found.numbers}, {scale}, as {found.library} has it), "
        f"without calibration: {found.quantized:,} of {found.parameters:,} weights; embeddings, norms and the "
        f"language-model head stay as they were. {found.bytes_after / 1e6:,.1f} MB of weights, from "
        f"{found.bytes_before / 1e6:,.1f} MB.",
        f"Quantising changed the weights of a block by {found.mean_error:.2%} of their norm on average "
        f"({max(found.errors.values()):.2%} at most) and the logits by {found.logit_difference:.2g} of their standard "
        "deviation, root mean square on random tokens.",
        f"Verified: the logits of stock transformers are those of the stored weights, to {found.loaded_difference:.1e} "
        f"of their standard deviation in {found.computed_in} (tolerance {found.tolerance:g}).",
        f"Loading it needs {found.library} (pip install {found.library}).",
    )
