"""Tiny checkpoints with a tokenizer that llama.cpp's converter knows, and what transformers makes of them."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaTokenizer

from amprune import CalibrationSet, apply_plan, make_plan, score

WORDS = "the quick brown fox jumps over lazy dogs and cats near river banks under blue sky"
PROMPTS = ((5, 17, 99, 33, 250, 7), (201, 13, 4, 150, 77, 12, 23, 14))
SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
CALIBRATION = CalibrationSet("r", tuple(tuple((i * 7 + j * 13) % 150 for j in range(20)) for i in range(3)))


def add_tokenizer(folder: Path) -> int:
    """Writes a trained SentencePiece tokenizer, which the converter takes as it is; returns its size."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 5 + [" ".join("abcdefghijklmnopqrstuvwxyz")]), model_writer=model,
        vocab_size=320, byte_fallback=True, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        minloglevel=2, normalization_rule_name="identity",
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)  # tokenizer.json, as checkpoints have it
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size())


def save_dense(folder: Path, model_type: str, *, seed: int = 0, **entries: Any) -> Path:
    """Saves a random model whose logits spread, so that greedy tokens are no near-ties."""
    folder.mkdir(parents=True)
    given = {**SIZES, "vocab_size": add_tokenizer(folder), **entries}
    sizes = {name: value for name, value in given.items() if value is not None}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type].from_dict({"model_type": model_type, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def save_pruned(dense: Path, out: Path, *, heads: float, neurons: float = 0.25) -> Path:
    """Prunes shares of heads and neurons."""
    plan = make_plan(score(dense, calibration=CALIBRATION, preset="paper"), heads_ratio=heads, neurons_ratio=neurons)
    return apply_plan(dense, plan, out).folder


def greedy(folder: Path, prompt: tuple[int, ...], tokens: int = 16) -> tuple[int, ...]:
    """Returns what stock transformers generates in float32; as in llama.cpp, no token that ends a text is chosen."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return tuple(out[0, len(prompt) :].tolist())
