"""What a model weighs and what a token costs, counted on the loaded model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from amprune.evaluation.measurement import Loaded
from amprune.evaluation.records import Record
from amprune.model.architecture import PreTrainedModel
from amprune.model.latency import dtype_of
from amprune.model.loading import input_device, is_quantized, vocabulary_size, weight_bytes, weight_count

MACS_TOKENS = 64


@dataclass(frozen=True)
class Size:
    """Sizes of a model in the dtype in which it was loaded."""

    parameters: int
    """Tied embeddings once."""
    weight_bytes: int
    weight_bytes_per_token: int
    """Read to decode one token: all weights but embedding tables, of which one row is read."""
    kv_cache_bytes_per_token: int
    macs_per_token: float
    """Multiply-accumulates a token of a forward pass over 64 tokens, attention and language-model head included."""


_UNITS = {
    "parameters": "parameters",
    "weight_bytes": "bytes",
    "weight_bytes_per_token": "bytes",
    "kv_cache_bytes_per_token": "bytes",
    "macs_per_token": "multiply-accumulates",
}


def size_records(given: Loaded) -> list[Record]:
    """Parameters, bytes and multiply-accumulates; the bytes of a GGUF file are its own."""
    sizes: dict[str, float] = asdict(measure_size(given.model))
    if given.gguf is not None:
        sizes["weight_bytes"] = given.gguf.weight_bytes
        sizes["weight_bytes_per_token"] = given.gguf.weight_bytes_per_token
        sizes["kv_cache_bytes_per_token"] = given.gguf.cache_bytes_per_token
    settings = {"dtype": dtype_of(given.model)}
    return [
        Record(measurement="size", task="model", metric=name, value=value, unit=_UNITS[name], settings=settings)
        for name, value in sizes.items()
    ]


@torch.inference_mode()
def measure_size(model: PreTrainedModel) -> Size:
    """Counts parameters and bytes, and runs two short forward passes for the cache and the multiply-accumulates."""
    weights = list(model.parameters())
    total = sum(map(weight_bytes, weights))
    unread = sum(table.nbytes - table.nbytes // len(table) for table in _tables(model))
    return Size(
        parameters=sum(map(weight_count, weights)),
        weight_bytes=total,
        weight_bytes_per_token=total - unread,
        kv_cache_bytes_per_token=_cache_growth(model),
        macs_per_token=_macs(model) / MACS_TOKENS,
    )


def _tables(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yields embedding tables of which decoding reads a row: all that the language-model head does not share."""
    head: Any = model.get_output_embeddings()
    shared = getattr(head, "weight", None)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight is not shared:
            yield module.weight


def _prompt(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary_size(model), (1, tokens), generator=draw).to(input_device(model))


def _cache_growth(model: PreTrainedModel) -> int:
    """Returns how many bytes one more token adds to the key-value cache."""
    sizes = []
    for tokens in (4, 8):
        cache: Any = getattr(model(_prompt(model, tokens), use_cache=True), "past_key_values", None)
        layers = getattr(cache, "layers", [])
        held = [getattr(layer, part, None) for layer in layers for part in ("keys", "values")]
        sizes.append(sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor)))
    return (sizes[1] - sizes[0]) // 4


def _macs(model: PreTrainedModel) -> float:
    # Fused attention kernels of the CPU are not counted; the plain one is.
    plain = sdpa_kernel(SDPBackend.MATH)
    with _single_experts(model), _counted(model), FlopCounterMode(display=False) as counter, plain:
        model(_prompt(model, MACS_TOKENS), use_cache=False)
    return float(counter.get_total_flops()) / 2


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[None]:
    """Replaces every quantised layer by a product of the same shape, whose own kernels are not counted."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and is_quantized(m.weight)]

    def product(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        return linear(inputs, inputs.new_zeros(()).expand(layer.out_features, layer.in_features))

    for layer in layers:
        layer.forward = partial(product, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _single_experts(model: PreTrainedModel) -> Iterator[None]:
    """Runs a mixture's experts one by one: kernels that run them in groups are not counted."""
    before = model.config._experts_implementation  # not every release has a public way to ask
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
