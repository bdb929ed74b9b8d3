"""The types of quantised weights as data, the layers that are quantised, and the size of groups."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from amprune.errors import QuantizationError
from amprune.model.architecture import make_config, meta_model
from amprune.model.reader import Checkpoint
from amprune.serve.quantize import packing

_BLOCK = 32
"""Outputs that bitsandbytes' kernel for processors computes at a time."""
_ADVICE = "Prune with --neuron-multiple 64, or choose int8, which takes any width"


@dataclass(frozen=True)
class Scheme:
    """A type of quantised weights, and the library whose format it is."""

    type: str
    library: str
    """As pip and config.json know it."""
    numbers: str
    """What a stored number is."""
    group_sizes: tuple[int, ...]
    """Inputs of an output that may share a scale; none where all of them do."""
    defaults: tuple[int, ...]
    """Group sizes to try where none is asked for."""
    rounds_to: str | None
    """The dtype that the library may compute in whatever the model's is; None where it keeps to the model's."""
    largest_error: float
    """Share of a weight's Frobenius norm that quantising can cost it; more says that something is wrong."""
    pack: Callable[[str, torch.Tensor, int | None], dict[str, torch.Tensor]]
    unpack: Callable[[str, Mapping[str, torch.Tensor], tuple[int, ...]], torch.Tensor]
    metadata: Callable[[Mapping[str, torch.Tensor], Collection[str]], dict[str, str]]
    config: Callable[[list[str], torch.dtype], dict[str, Any]]


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(
        "int8", "torchao", "int8", (), (), None, 0.05,
        packing.pack_int8, packing.unpack_int8, packing.metadata_int8, packing.config_int8,
    ),
    "int4": Scheme(
        "int4", "bitsandbytes", "nf4", tuple(2**power for power in range(5, 13)), (64, 32), "bfloat16", 0.3,
        packing.pack_int4, packing.unpack_int4, lambda _tensors, _packed: {}, packing.config_int4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layers:
    """What of a model is quantised, and how."""

    scheme: Scheme
    shapes: Mapping[str, tuple[int, ...]]
    """Of the weights that are."""
    skipped: list[str]
    """Modules that transformers leaves alone."""
    group_size: int | None
    """Inputs of an output that share a scale; None where all do."""


def find_scheme(type: str) -> Scheme:
    """Returns the scheme of a type."""
    if type not in SCHEMES:
        raise QuantizationError(f"no type {type!r} to quantise to; choose {' or '.join(SCHEMES)}")
    return SCHEMES[type]


def find_layers(base: Checkpoint, scheme: Scheme, group_size: int | None) -> Layers:
    """Finds the linear layers that stock transformers takes for quantised, all but the head, and their group size."""
    if base.dtype == torch.float64:
        raise QuantizationError(
            f"{base.folder}: the weights are float64, which the libraries do not quantise; save the model in float32"
        )
    model = meta_model(make_config(base.config, where=str(base.folder)), where=str(base.folder))
    kept = getattr(model, "_keep_in_fp32_modules", None)
    skipped = sorted(HfQuantizer.get_modules_to_not_convert(model, None, kept))
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and should_convert_module(name, skipped):
            found[f"{name}.weight"] = tuple(module.weight.shape)
    if not found:
        raise QuantizationError(
            f"{base.folder}: transformers builds the projections of a {base.shape.model_type} from layers of another "
            "kind than torch.nn.Linear, which the libraries do not quantise; `amprune export --type q8_0` or q4_k_m "
            "quantises for llama.cpp"
        )
    return Layers(scheme, found, skipped, _group_size(group_size, found, scheme))


def _group_size(asked: int | None, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> int | None:
    """Returns how many inputs share a scale: as asked, else the first default that divides the rows of every weight."""
    if not scheme.group_sizes:
        if asked is not None:
            raise QuantizationError(
                f"a group size of {asked} was asked for, but {scheme.type} has one scale for each output; leave it "
                "out, or choose int4"
            )
        return None
    if asked is not None and asked not in scheme.group_sizes:
        sizes = ", ".join(map(str, scheme.group_sizes))
        raise QuantizationError(f"the group size is {asked}, but {scheme.library} has groups of {sizes} alone")
    size = _fitting_size((asked,) if asked is not None else scheme.defaults, shapes, scheme)
    if narrow := next((name for name, shape in shapes.items() if shape[0] % _BLOCK), None):
        raise QuantizationError(
            f"{narrow} has {shapes[narrow][0]:,} outputs, and {scheme.library} computes {_BLOCK} at a time on a "
            f"processor. {_ADVICE}"
        )
    return size


def _fitting_size(wanted: Sequence[int], shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> int:
    """Returns the first of the wanted sizes that divides the rows of every weight."""
    uneven = {size: [name for name, shape in shapes.items() if shape[1] % size] for size in scheme.group_sizes}
    if fitting := [size for size in wanted if not uneven[size]]:
        return fitting[0]
    size = wanted[-1]
    dividing = ", ".join(str(size) for size, names in uneven.items() if not names)
    instead = f"those that divide all rows: {dividing}" if dividing else f"none of {scheme.library}'s does. {_ADVICE}"
    name = uneven[size][0]
    raise QuantizationError(
        f"a group size of {size} does not divide the rows of {name}, which are {shapes[name][1]:,} weights long; "
        f"{instead}"
    )
