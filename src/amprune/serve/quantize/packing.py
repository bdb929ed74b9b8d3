"""How a weight of shape (outputs, inputs) is stored: as torchao packs int8, and as bitsandbytes packs int4.

`pack` gives the stored tensors by their names in the file, `unpack` the weight that they stand for, in float32. Loaders
read `metadata` from the file's header, which is made of tensors on the meta device, and `config` from config.json.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch


def pack_int8(name: str, weight: torch.Tensor, group_size: int | None = None) -> dict[str, torch.Tensor]:
    """Eight bits with a scale for each output, torchao's Int8WeightOnlyConfig."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors: dict[str, torch.Tensor] = flatten_tensor_state_dict({name: _int8(weight)})[0]
    return tensors


def unpack_int8(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The other way."""
    prefix, _, leaf = name.rpartition(".")
    values, zero, scale = (parts[f"{prefix}._{leaf}_{part}"].float() for part in ("qdata", "zero_point", "scale"))
    return ((values - zero) * scale).reshape(shape)


def metadata_int8(tensors: Mapping[str, torch.Tensor], packed: Collection[str]) -> dict[str, str]:
    """Says which tensors are parts of which weight."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state = {name: _int8(tensor) if name in packed else tensor for name, tensor in tensors.items()}
    found: dict[str, str] = flatten_tensor_state_dict(state)[1]
    return found


def config_int8(skipped: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Names the modules that stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    found: dict[str, Any] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped).to_dict()
    return found


def _int8(weight: torch.Tensor) -> Any:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, PerRow())


def pack_int4(name: str, weight: torch.Tensor, group_size: int | None) -> dict[str, torch.Tensor]:
    """Four bits (NF4: the quantiles of a normal distribution) in groups, as bitsandbytes has them."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=group_size, quant_type="nf4", compress_statistics=False)
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def unpack_int4(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The other way."""
    pairs, scales = parts[name].flatten(), parts[f"{name}.absmax"]
    values = parts[f"{name}.quant_map"][torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().int()]
    return (values.view(len(scales), -1) * scales[:, None]).reshape(shape)


def config_int4(skipped: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Names the modules that stay as they are, and the dtype of products."""
    from transformers import BitsAndBytesConfig

    found: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    ).to_dict()
    return found
