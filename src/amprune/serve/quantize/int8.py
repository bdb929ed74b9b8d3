"""Weights of eight bits with a scale for each output, as torchao's Int8WeightOnlyConfig packs them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch


def pack(name: str, weight: torch.Tensor, group_size: int | None = None) -> dict[str, torch.Tensor]:
    """Returns the tensors that a weight of shape (outputs, inputs) is stored as, by their names in the file."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors: dict[str, torch.Tensor] = flatten_tensor_state_dict({name: _quantized(weight)})[0]
    return tensors


def unpack(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the weight that stored tensors stand for, in float32."""
    prefix, _, leaf = name.rpartition(".")
    values, zero, scale = (parts[f"{prefix}._{leaf}_{part}"].float() for part in ("qdata", "zero_point", "scale"))
    return ((values - zero) * scale).reshape(shape)


def metadata(tensors: Mapping[str, torch.Tensor], packed: Collection[str]) -> dict[str, str]:
    """Returns what torchao reads from a file's header, given tensors of the right shapes on the meta device."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state = {name: _quantized(tensor) if name in packed else tensor for name, tensor in tensors.items()}
    found: dict[str, str] = flatten_tensor_state_dict(state)[1]
    return found


def config(skipped: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    found: dict[str, Any] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped).to_dict()
    return found


def _quantized(weight: torch.Tensor) -> Any:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, PerRow())
