"""Published and tiny shapes for tests of plans, scores without a model, and a model whose units matter."""

import functools
from typing import Any

import numpy as np
import torch
from tiny_calibration import random_samples
from tiny_models import ALL, Tiny, config_of, make_model
from transformers import PreTrainedModel

from amprune import ImportanceScores, ModelShape, PruningPlan
from amprune.model.architecture import describe
from amprune.scoring.scores import LayerScores
from amprune.scoring.weights import random_scores

HELD_OUT = random_samples(11, 30, 3, 30, seed=1)

# Published sizes, written out so that nothing is fetched.
REAL: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    },
    "Llama-3-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Phi-2": {
        "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200, "partial_rotary_factor": 0.4,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    },
    "GPT-2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "Falcon-7B": {
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "multi_query": True, "parallel_attn": True, "bias": False, "vocab_size": 65024,
    },
}  # fmt: skip
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Qwen2.5-0.5B": 494_032_768,
    "Phi-2": 2_779_683_840,
    "Gemma-2-2B": 2_614_341_888,
    "GPT-2": 124_439_808,
    "Falcon-7B": 6_921_720_704,
}
CONFIGS = REAL | {tiny.id: config_of(tiny) for tiny in ALL}


@functools.cache
def shape_of(name: str) -> ModelShape:
    return describe(CONFIGS[name]).shape


@functools.cache
def fake_scores(name: str) -> ImportanceScores:
    """Random scores, with ties: only 50 values for the neurons."""
    shape, generator = shape_of(name), np.random.default_rng(0)
    layers = tuple(
        LayerScores(
            heads=generator.random(shape.num_attention_heads, dtype=np.float32),
            groups=generator.random(shape.num_key_value_heads, dtype=np.float32),
            neurons=generator.integers(50, size=shape.intermediate_size).astype(np.float32),
        )
        for _ in range(shape.num_layers)
    )
    return ImportanceScores(layers, shape, "0" * 64, "amp", {"name": "fake"}, {"dtype": "float32"})


def kept(plan: PruningPlan) -> tuple[int, int, int]:
    after = plan.shape_after
    return after.num_attention_heads, after.num_key_value_heads, after.intermediate_size


def ratio_of(shape: ModelShape, query_heads: int, key_value_heads: int, neurons: int) -> float:
    after = shape.shrunk(query_heads=query_heads, key_value_heads=key_value_heads, neurons=neurons)
    return 1 - after.parameters / shape.parameters


def scores_of(shape: ModelShape) -> ImportanceScores:
    layers = tuple(random_scores(shape, seed=0, layer=layer) for layer in range(shape.num_layers))
    return ImportanceScores(layers, shape, "0" * 64, "random", {}, {})


def loud_model(tiny: Tiny) -> PreTrainedModel:
    """A model whose units matter: weights as they are drawn hardly move a logit."""
    model = make_model(tiny)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and (".layers." in name or ".h." in name):
                parameter.mul_(4)
        head.weight.mul_(4)
    return model
