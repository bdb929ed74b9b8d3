"""Weights of four bits (NF4: the quantiles of a normal distribution) in groups, as bitsandbytes packs them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch


def pack(name: str, weight: torch.Tensor, group_size: int | None) -> dict[str, torch.Tensor]:
    """Returns the tensors that a weight of shape (outputs, inputs) is stored as, by their names in the file."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=group_size, quant_type="nf4", compress_statistics=False)
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def unpack(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the weight that stored tensors stand for, in float32."""
    pairs, scales = parts[name].flatten(), parts[f"{name}.absmax"]
    values = parts[f"{name}.quant_map"][torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().int()]
    return (values.view(len(scales), -1) * scales[:, None]).reshape(shape)


def metadata(tensors: Mapping[str, torch.Tensor], packed: Collection[str]) -> dict[str, str]:
    """Returns nothing: each weight carries what bitsandbytes reads."""
    return {}


def config(skipped: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json; products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    found: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    ).to_dict()
    return found
