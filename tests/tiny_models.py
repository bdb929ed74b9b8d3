"""Tiny random models, one or more variants of every family: grouped and multi-head attention, biases on and off."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 160
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Head sizes differ from hidden_size / heads where the family reads head_dim, so that nothing can be derived by luck.
MHA = {"num_attention_heads": 6, "num_key_value_heads": 6}
GQA = {"num_attention_heads": 12, "num_key_value_heads": 4}
MQA = {"num_attention_heads": 6, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Tiny:
    """A variant: `model_type` and config entries beside the common sizes."""

    model_type: str
    variant: str
    entries: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.model_type}-{self.variant}"


def _attentions(model_type: str, *, head_dim: int | None = 16, **entries: Any) -> list[Tiny]:
    size = {} if head_dim is None else {"head_dim": head_dim}
    return [
        Tiny(model_type, "mha", {**MHA, **size, **entries}),
        Tiny(model_type, "gqa", {**GQA, **size, **entries}),
    ]


_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

PRUNABLE_HEADS: list[Tiny] = [
    *_attentions("llama"),
    Tiny("llama", "mqa", {**MQA, "head_dim": 16}),
    Tiny("llama", "biases", {**GQA, "head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    Tiny("llama", "large-pad-id", {**GQA, "head_dim": 16, "pad_token_id": VOCABULARY - 1}),
    Tiny("llama", "tied", {**GQA, "head_dim": 16, "tie_word_embeddings": True}),
    Tiny("llama", "derived-head-dim", {"num_attention_heads": 12, "num_key_value_heads": 4}),
    *_attentions("mistral"),
    *_attentions("ministral", **_ROPE),
    *_attentions("qwen2"),
    Tiny("qwen2", "derived-head-dim", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    *_attentions("qwen3"),
    *_attentions("gemma"),
    *_attentions("gemma2", query_pre_attn_scalar=16),
    *_attentions("gemma3_text", query_pre_attn_scalar=16),
    *_attentions("granite", attention_multiplier=0.25),
    Tiny("granite", "biases", {**GQA, "head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    *_attentions("smollm3"),
    *_attentions("olmo"),
    Tiny("olmo", "clipped", {**GQA, "head_dim": 16, "clip_qkv": 0.02}),
    *_attentions("phi", head_dim=None),
    *_attentions("phi3", **_ROPE),
    *_attentions("starcoder2"),
    Tiny("starcoder2", "no-biases", {**GQA, "head_dim": 16, "use_bias": False}),
    *_attentions("cohere"),
    Tiny("cohere", "qk-norm", {**GQA, "head_dim": 16, "use_qk_norm": True}),
    *_attentions("cohere2"),
    *_attentions("glm"),
    Tiny("glm", "no-biases", {**GQA, "head_dim": 16, "attention_bias": False}),
    *_attentions("glm4"),
    *_attentions("exaone4"),
    *_attentions("nemotron"),
    Tiny("nemotron", "biases", {**GQA, "head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    *_attentions("apertus", **_ROPE),
    *_attentions("arcee"),
    *_attentions("seed_oss"),
    Tiny("seed_oss", "biases", {**GQA, "head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    *_attentions("vaultgemma", query_pre_attn_scalar=16),
    *_attentions("hyperclovax"),
    *_attentions("cwm"),
    *_attentions("jais2"),
    *_attentions("ernie4_5"),
    Tiny("ernie4_5", "biases", {**GQA, "head_dim": 16, "use_bias": True}),
]

NEURONS_ONLY: list[Tiny] = [
    *_attentions("olmo2", head_dim=None),
    *_attentions("olmo3", head_dim=None),
    *_attentions("stablelm", head_dim=None),
    Tiny("stablelm", "biases", {**MHA, "use_qkv_bias": True, "use_parallel_residual": True}),
    Tiny("phi", "qk-layernorm", {**MHA, "qk_layernorm": True}),
    Tiny("opt", "mha", {"num_attention_heads": 6, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    Tiny("opt", "unbiased", {"num_attention_heads": 6, "ffn_dim": 96, "word_embed_proj_dim": 48, "enable_bias": False}),
    Tiny("gpt2", "mha", {"n_head": 6, "n_embd": 48, "n_layer": 2, "n_positions": 128, "n_inner": 80}),
    Tiny("gpt2", "default-width", {"n_head": 6, "n_embd": 48, "n_layer": 2, "n_positions": 128}),
    Tiny("gpt_neox", "mha", {"num_attention_heads": 6}),
    Tiny("gptj", "mha", {"n_head": 6, "n_embd": 48, "n_layer": 2, "n_positions": 128, "rotary_dim": 4}),
    Tiny("falcon", "mqa", {"num_attention_heads": 6}),
    Tiny("falcon", "gqa", {"num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True}),
    Tiny("falcon", "biases", {"num_attention_heads": 6, "multi_query": False, "bias": True, "alibi": True}),
]  # fmt: skip

ALL = PRUNABLE_HEADS + NEURONS_ONLY


def config_of(tiny: Tiny) -> dict[str, Any]:
    """Returns the raw config.json of a variant."""
    sizes = dict(_SIZES)
    if "n_embd" in tiny.entries:
        sizes = {name: value for name, value in sizes.items() if name not in ("hidden_size", "num_hidden_layers")}
    if tiny.model_type in ("gpt2", "gptj", "opt", "falcon"):
        del sizes["intermediate_size"]
    if "n_positions" in tiny.entries:
        del sizes["max_position_embeddings"]
    return {"model_type": tiny.model_type, **sizes, **tiny.entries}


def make_model(tiny: Tiny, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Builds the model with random weights, biases and norms included, so that no cut can hide behind a zero."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[tiny.model_type].from_dict(config_of(tiny))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def save_model(tiny: Tiny, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Path:
    """Saves a variant as a checkpoint."""
    make_model(tiny, dtype=dtype, seed=seed).save_pretrained(folder, **options)
    return folder


def find(identifier: str) -> Tiny:
    """Returns the variant of this id."""
    return next(tiny for tiny in ALL if tiny.id == identifier)
