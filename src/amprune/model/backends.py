"""What each backend wants of a shape, and what of it a shape lacks: facts as data, nothing is loaded.

Read in the sources of the backends, where the files that are named with each fact have it. What a wish costs is not
said here: a shape that lacks it still runs, unless the reason says otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from amprune.model.shape import ModelShape

GGUF_BLOCK, GGUF_SUPER_BLOCK = 32, 256
"""Values of a row that llama.cpp quantises together: q4_0, q5_0 and q8_0; K-quants (ggml/src/ggml-common.h)."""
TILE = 64
"""Values on a side of a tile that GPU kernels multiply at a time, or a divisor of it; 128 bytes in 16 bits."""
DEVICES = (2, 4, 8)
"""Numbers of devices over which servers commonly split a model."""
HEAD_SIZES: Mapping[str, tuple[tuple[int, ...], str]] = {
    # vllm/v1/attention/backends/cpu_attn.py
    "vLLM on CPU": ((32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512), "its attention kernel has no other"),
    # vllm/v1/attention/backends/flash_attn.py
    "vLLM on GPUs": (tuple(range(8, 257, 8)), "FlashAttention takes no other, and a slower kernel stands in"),
    # ggml/src/ggml-cuda/fattn.cu; where keys and values are of one size
    "llama.cpp on CUDA": (
        (40, 64, 72, 80, 96, 112, 128, 256, 512),
        "its flash attention has no other, and attention runs without",
    ),
}
"""Sizes of a head that attention kernels have, and what becomes of others."""
_DERIVED = "of this family it takes the head size to be the hidden size over the heads, and does not load the model"
NARROW_ATTENTION: Mapping[str, Mapping[str, str]] = {
    # src/models/*.cpp, and conversion/granite.py
    "llama.cpp": dict.fromkeys(
        ("cohere", "cohere2", "exaone4", "glm", "granite", "nemotron", "olmo", "phi", "phi3", "starcoder2"), _DERIVED
    ),
}
"""Of each backend the model types whose heads must be as wide together as the hidden size, each with the reason.

Stock transformers takes `num_attention_heads * head_dim != hidden_size` from config.json. Entries are measured, by
loading a pruned model of the type.
"""


@dataclass(frozen=True)
class ShapeWarning:
    """Something that a backend handles badly."""

    backend: str
    what: str
    """The part of the model, and its size."""
    reason: str


def heads_split(query_heads: int, key_value_heads: int, devices: int) -> bool:
    """Tells whether vLLM can share out the heads of a layer: key-value heads evenly, or each copied to as many devices.

    vllm/config/model.py, and vllm/model_executor/models/llama.py, which other families follow.
    """
    return query_heads % devices == 0 and (key_value_heads % devices == 0 or devices % key_value_heads == 0)


def reason_not_split(shape: ModelShape, devices: int) -> str | None:
    """Says what of a layer cannot be shared out evenly over so many devices, or returns None."""
    reasons = []
    if not heads_split(shape.num_attention_heads, shape.num_key_value_heads, devices):
        reasons.append(f"{shape.num_attention_heads} query and {shape.num_key_value_heads} key-value heads")
    if shape.intermediate_size % devices:
        reasons.append(f"{shape.intermediate_size:,} neurons")
    return f"{' and '.join(reasons)} cannot be shared out over {devices} devices" if reasons else None


def shape_warnings(shape: ModelShape) -> tuple[ShapeWarning, ...]:
    """Lists what backends handle badly of a shape; empty where all is well."""
    return (
        *_quantised_rows(shape),
        *_tiles(shape),
        *_devices(shape),
        *_head_sizes(shape),
        *_narrow_attention(shape),
    )


def _heads(shape: ModelShape) -> str:
    return f"{shape.num_attention_heads} query heads x {shape.head_dim}"


def _quantised_rows(shape: ModelShape) -> Iterator[ShapeWarning]:
    """What llama.cpp cannot quantise as asked: a row is what a matrix takes in (src/llama-quant.cpp)."""
    for tensors, size, length in (
        ("down projections", f"{shape.intermediate_size:,} neurons", shape.intermediate_size),
        ("attention outputs", _heads(shape), shape.num_attention_heads * shape.head_dim),
        ("all other matrices", f"hidden size {shape.hidden_size:,}", shape.hidden_size),
    ):
        if length % GGUF_BLOCK:
            reason = (
                f"rows of {length:,} values are no multiple of {GGUF_BLOCK}: in q8_0, q4_0 and K-quants they stay "
                "float16, larger and slower (some versions of llama-quantize refuse q8_0 and q4_0)"
            )
        elif length % GGUF_SUPER_BLOCK:
            reason = (
                f"rows of {length:,} values are no multiple of {GGUF_SUPER_BLOCK}: K-quants such as q4_k_m fall back "
                "to larger types (q5_0 for q4_k, q8_0 for q6_k)"
            )
        else:
            continue
        yield ShapeWarning("llama.cpp GGUF", f"{tensors} ({size})", reason)


def _tiles(shape: ModelShape) -> Iterator[ShapeWarning]:
    for what, length in (
        ("neurons", shape.intermediate_size),
        (_heads(shape), shape.num_attention_heads * shape.head_dim),
        (f"{shape.num_key_value_heads} key-value heads x {shape.head_dim}", shape.num_key_value_heads * shape.head_dim),
        ("hidden size", shape.hidden_size),
    ):
        if length % TILE:
            reason = f"{length:,} is no multiple of {TILE}: the last tile of every product is in part empty"
            yield ShapeWarning("GPU tensor cores", what, reason)


def _devices(shape: ModelShape) -> Iterator[ShapeWarning]:
    query_heads, key_value_heads = shape.num_attention_heads, shape.num_key_value_heads
    heads = [devices for devices in DEVICES if not heads_split(query_heads, key_value_heads, devices)]
    neurons = [devices for devices in DEVICES if shape.intermediate_size % devices]
    if refused := sorted({*heads, *neurons}):
        reasons = [
            f"{what} cannot be shared out over {_listed(devices)}"
            for what, devices in (
                (f"{query_heads} query and {key_value_heads} key-value heads", heads),
                (f"{shape.intermediate_size:,} neurons", neurons),
            )
            if devices
        ]
        if allowed := [devices for devices in DEVICES if devices not in refused]:
            reasons.append(f"over {_listed(allowed)} it works")
        yield ShapeWarning("vLLM", f"tensor parallelism over {_listed(refused)} devices", "; ".join(reasons))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _head_sizes(shape: ModelShape) -> Iterator[ShapeWarning]:
    for backend, (sizes, otherwise) in HEAD_SIZES.items():
        if shape.head_dim not in sizes:
            shown = _listed(sizes) if len(sizes) < 16 else f"multiples of {sizes[0]} up to {sizes[-1]}"
            yield ShapeWarning(backend, f"heads of {shape.head_dim}", f"expected {shown}: {otherwise}")


def _narrow_attention(shape: ModelShape) -> Iterator[ShapeWarning]:
    width = shape.num_attention_heads * shape.head_dim
    if width != shape.hidden_size:
        for backend, reasons in NARROW_ATTENTION.items():
            if shape.model_type in reasons:
                what = f"{_heads(shape)} = {width:,} on hidden size {shape.hidden_size:,}"
                yield ShapeWarning(backend, what, reasons[shape.model_type])
