"""What config.json says of quantised weights, which library they need, and why they are refused where they are."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amprune.errors import CheckpointError, MissingDependencyError, UnsupportedModelError, required
from amprune.model.writer import RECORDS
from amprune.records import read_object

RECORD = "quantization.json"
_PACKAGES = {"compressed-tensors": "compressed-tensors", "gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq"}
"""Of methods of others; what amprune quantises with is an extra of it."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the part of a config.json that tells how the weights are quantised; None where they are not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return found if isinstance(found, Mapping) else {"quant_method": str(found)}


def folder_quantization(folder: Path) -> Mapping[str, Any] | None:
    """Returns how the weights of a folder are quantised; None where they are not, or where there is no config.json."""
    file = folder / "config.json"
    return quantization_of(read_object(file)) if file.is_file() else None


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
    quantization = quantization_of(config)
    source = _source(folder) if quantization is not None else None
    if quantization is not None and source is not None:
        raise UnsupportedModelError(
            f"{folder}: the checkpoint is quantised to {quantization_words(quantization)}, and its full-precision "
            f"weights are needed here. Give {source}, which it was made from, in its place: prune and recover first, "
            "quantise last"
        )


def _source(folder: Path) -> str | None:
    try:
        found = read_object(folder / RECORDS / RECORD).get("quantized_from")
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None
