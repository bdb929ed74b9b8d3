"""Sizes, held to formulas written out here."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_evaluation import foreign_checkpoint, tiny_model
from tiny_models import VOCABULARY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from amprune.evaluation.size import MACS_TOKENS, measure_size

HIDDEN, LAYERS, NEURONS = 48, 2, 80
# Key-value heads, head size.
CACHES = {
    "llama-gqa": (4, 16),
    "llama-mha": (6, 16),
    "llama-mqa": (1, 16),
    "llama-tied": (4, 16),
    "phi-gqa": (4, 4),
    "phi-mha": (6, 8),
    "gpt2-mha": (6, 8),
    "gptj-mha": (6, 8),
    "opt-mha": (6, 8),
    "gpt_neox-mha": (6, 8),
    "falcon-mqa": (1, 8),
    "falcon-gqa": (6, 8),  # transformers keeps every group's key once for each of its query heads
    "falcon-biases": (6, 8),
    "gemma2-gqa": (4, 16),
    "cohere2-gqa": (4, 16),
}


@pytest.mark.parametrize("identifier", sorted(CACHES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_grows_by_keys_and_values_of_every_layer(identifier: str, dtype: torch.dtype) -> None:
    heads, size = CACHES[identifier]
    found = measure_size(tiny_model(identifier, dtype=dtype))
    assert found.kv_cache_bytes_per_token == 2 * LAYERS * heads * size * dtype.itemsize


@pytest.mark.parametrize("identifier", ["llama-gqa", "llama-tied", "gpt2-mha", "falcon-mqa"])
def test_tied_embeddings_are_counted_once(identifier: str) -> None:
    model: Any = tiny_model(identifier)
    named = sum(tensor.numel() for tensor in model.state_dict().values())
    found = measure_size(model)
    assert found.parameters == named - (VOCABULARY * HIDDEN if identifier != "llama-gqa" else 0)
    assert found.weight_bytes == 4 * found.parameters


def test_decoding_reads_one_row_of_a_table_that_the_head_does_not_share() -> None:
    table = VOCABULARY * HIDDEN * 4
    untied, tied = measure_size(tiny_model("llama-gqa")), measure_size(tiny_model("llama-tied"))
    assert untied.parameters - tied.parameters == VOCABULARY * HIDDEN
    assert untied.weight_bytes_per_token == untied.weight_bytes - table + HIDDEN * 4
    assert tied.weight_bytes_per_token == tied.weight_bytes


def test_decoding_reads_one_position() -> None:
    model: Any = tiny_model("gpt2-mha")  # tied, with a table of positions
    positions = model.transformer.wpe.weight.nbytes
    found = measure_size(model)
    assert found.weight_bytes_per_token == found.weight_bytes - positions + HIDDEN * 4


def attention_macs(heads: int, size: int) -> int:
    """Of a token of a forward pass: its query against all keys, the weights against all values, in every layer."""
    return LAYERS * 2 * heads * size * MACS_TOKENS


def head_macs() -> int:
    return HIDDEN * VOCABULARY


def angle_macs(model: Any) -> float:
    """Of a token: the angles of its position, which some releases of transformers compute by a product."""
    hidden, positions = torch.zeros(1, MACS_TOKENS, HIDDEN), torch.arange(MACS_TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        model.model.rotary_emb(hidden, positions)
    return float(counter.get_total_flops()) / 2 / MACS_TOKENS


@pytest.mark.parametrize(("identifier", "groups"), [("llama-gqa", 4), ("llama-tied", 4), ("qwen3-gqa", 4)])
def test_multiply_accumulates_of_a_llama(identifier: str, groups: int) -> None:
    heads, size = 12, 16
    projections = HIDDEN * size * (2 * heads + 2 * groups) + 3 * HIDDEN * NEURONS
    model = tiny_model(identifier)
    expected = LAYERS * projections + attention_macs(heads, size) + head_macs() + angle_macs(model)
    assert measure_size(model).macs_per_token == expected


def test_multiply_accumulates_of_a_gpt2() -> None:
    projections = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * NEURONS
    expected = LAYERS * projections + attention_macs(6, 8) + head_macs()
    assert measure_size(tiny_model("gpt2-mha")).macs_per_token == expected


def test_multiply_accumulates_count_the_experts_that_a_token_meets(tmp_path: Path) -> None:
    folder = foreign_checkpoint(
        tmp_path / "mixtral", "mixtral", hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    before = model.config._experts_implementation
    projections = HIDDEN * 8 * (2 * 6 + 2 * 2) + 4 * HIDDEN + 2 * 3 * HIDDEN * NEURONS
    expected = LAYERS * projections + attention_macs(6, 8) + head_macs() + angle_macs(model)
    assert measure_size(model).macs_per_token == expected
    assert model.config._experts_implementation == before


def test_a_smaller_model_is_smaller_in_every_size() -> None:
    small, large = (measure_size(tiny_model(identifier)) for identifier in ("phi-gqa", "phi-mha"))
    assert all(asdict(small)[name] < value for name, value in asdict(large).items())
