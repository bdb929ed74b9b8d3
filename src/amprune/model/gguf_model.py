"""What a GGUF file holds, by transformers' reader, which takes every llama for a Llama without biases."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from amprune.errors import CheckpointError
from amprune.model.architecture import PreTrainedModel, config_with_heads, describe, make_config
from amprune.model.families import find_family

_COMPUTED = "rope_"
"""What tensors are called that a model computes from its config."""
_ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}
"""Of any hidden size."""


def load_gguf(gguf: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Returns the model, dequantised, and the tokenizer of a GGUF file.

    Args:
        gguf: the file.
        dtype: of the weights.
        options: what tells transformers to unpack them.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    stored = {str(tensor.name): int(tensor.n_elements) for tensor in reader.tensors}
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _any_heads():
        config = AutoConfig.from_pretrained(**where)
        if config.model_type == "llama":
            config.attention_bias = "blk.0.attn_q.bias" in stored
            config.mlp_bias = "blk.0.ffn_down.bias" in stored
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, **options, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    model, report = loaded
    _check_whole(gguf, stored, model, report["missing_keys"])
    _check_rotation(gguf, reader, model)
    odd = config.model_type == "llama" and config.hidden_size % config.num_attention_heads
    return _as_equivalent(model) if odd else model, tokenizer


@contextmanager
def _any_heads() -> Iterator[None]:
    """Lets a LlamaConfig have heads that do not divide the hidden size, as llama.cpp does."""
    config: Any = LlamaConfig
    validators = config.__class_validators__
    config.__class_validators__ = [check for check in validators if check.__name__ != "validate_architecture"]
    try:
        yield
    finally:
        config.__class_validators__ = validators


def _check_whole(gguf: Path, stored: Mapping[str, int], model: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuses a model that has fewer weights than the file."""
    weights = sum(count for name, count in stored.items() if not name.startswith(_COMPUTED))
    read = sum(tensor.numel() for name, tensor in model.named_parameters() if name not in missing)
    if weights > read:
        raise CheckpointError(
            f"{gguf} has {weights:,} weights, of which transformers reads {read:,} as a {model.config.model_type}; "
            "give the Hugging Face folder that the file was made from"
        )


def _check_rotation(gguf: Path, reader: Any, model: PreTrainedModel) -> None:
    """Refuses a model that rotates another part of each head than the file says, since its reader does not ask."""
    field = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.dimension_count")
    widths = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")}
    if field is not None and widths and field.contents() not in widths:
        raise CheckpointError(
            f"{gguf} rotates {field.contents()} numbers of each head, but transformers reads {min(widths)}; give the "
            "Hugging Face folder that the file was made from"
        )


def _as_equivalent(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model of an architecture that accepts its number of heads, with the same tensors."""
    raw = {**model.config.to_dict(), **_ONE_HEAD}
    shape = replace(describe(raw).shape, **{name: getattr(model.config, name) for name in _ONE_HEAD})
    entries = config_with_heads(raw, find_family("llama"), shape)
    with torch.device("meta"):
        other: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(entries, where="config.json"))
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other
