"""What backends want of a shape: warnings with their reason, and none where all is well."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import find, save_model
from tiny_plans import fake_scores, shape_of
from typer.testing import CliRunner

from amprune import ModelShape, inspect, make_plan
from amprune.cli.options import app
from amprune.model.architecture import describe
from amprune.model.backends import ShapeWarning, heads_split, reason_not_split, shape_warnings

SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def found(shape: ModelShape, backend: str) -> list[ShapeWarning]:
    return [warning for warning in shape_warnings(shape) if warning.backend == backend]


def test_a_friendly_shape_gives_no_warning() -> None:
    for name in ("Llama-2-7B", "Llama-3-8B", "Gemma-2-2B"):
        assert shape_warnings(shape_of(name)) == ()


def test_smollm2_is_no_multiple_of_the_blocks_of_k_quants_and_has_nine_heads() -> None:
    shape = describe(SMOLLM2).shape
    output, rest = found(shape, "llama.cpp GGUF")
    assert output.what == "attention outputs (9 query heads x 64)"
    assert rest.what == "all other matrices (hidden size 576)"
    for warning in (output, rest):
        assert warning.reason.startswith("rows of 576 values are no multiple of 256: K-quants such as q4_k_m fall back")
    (devices,) = found(shape, "vLLM")
    assert devices.what == "tensor parallelism over 2, 4, 8 devices"
    assert devices.reason == "9 query and 3 key-value heads cannot be shared out over 2, 4, 8"
    assert len(shape_warnings(shape)) == 3


def test_a_pruned_shape_of_odd_sizes_names_the_tensors_that_stay_float16() -> None:
    shape = describe(SMOLLM2).shape.shrunk(query_heads=6, key_value_heads=2, neurons=1017)
    down, output, _ = found(shape, "llama.cpp GGUF")
    assert down.what == "down projections (1,017 neurons)"
    assert "rows of 1,017 values are no multiple of 32: in q8_0, q4_0 and K-quants they stay float16" in down.reason
    assert "rows of 384 values are no multiple of 256" in output.reason
    (tiles,) = found(shape, "GPU tensor cores")
    assert (tiles.what, tiles.reason.startswith("1,017 is no multiple of 64")) == ("neurons", True)
    (devices,) = found(shape, "vLLM")
    assert devices.what == "tensor parallelism over 2, 4, 8 devices"
    assert devices.reason == (
        "6 query and 2 key-value heads cannot be shared out over 4, 8; "
        "1,017 neurons cannot be shared out over 2, 4, 8"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "backend", "what"),
    [
        ({"intermediate_size": 11_000}, "llama.cpp GGUF", "down projections (11,000 neurons)"),
        ({"intermediate_size": 11_072}, "llama.cpp GGUF", "down projections (11,072 neurons)"),
        ({"num_attention_heads": 9, "head_dim": 80}, "llama.cpp GGUF", "attention outputs (9 query heads x 80)"),
        ({"hidden_size": 4000}, "llama.cpp GGUF", "all other matrices (hidden size 4,000)"),
        ({"intermediate_size": 11_040}, "GPU tensor cores", "neurons"),
        ({"num_key_value_heads": 5, "head_dim": 80}, "GPU tensor cores", "5 key-value heads x 80"),
        ({"hidden_size": 4000}, "GPU tensor cores", "hidden size"),
        ({"num_attention_heads": 28}, "vLLM", "tensor parallelism over 8 devices"),
        ({"head_dim": 120}, "vLLM on CPU", "heads of 120"),
        ({"head_dim": 120}, "llama.cpp on CUDA", "heads of 120"),
        ({"head_dim": 100}, "vLLM on GPUs", "heads of 100"),
    ],
)
def test_each_size_is_held_to_what_its_backend_wants(changed: dict[str, int], backend: str, what: str) -> None:
    friendly = shape_of("Llama-3-8B")
    assert shape_warnings(friendly) == ()
    assert what in [warning.what for warning in found(replace(friendly, **changed), backend)]  # type: ignore[arg-type]


def test_what_works_is_said_beside_what_does_not() -> None:
    (warning,) = found(shape_of("Qwen2.5-0.5B"), "vLLM")
    assert warning.what == "tensor parallelism over 4, 8 devices"
    assert warning.reason == "14 query and 2 key-value heads cannot be shared out over 4, 8; over 2 it works"


@pytest.mark.parametrize(
    ("query_heads", "key_value_heads", "allowed"),
    [(32, 8, {1, 2, 4, 8, 16, 32}), (9, 3, {1, 3, 9}), (14, 2, {1, 2, 14}), (12, 4, {1, 2, 4, 12}),
     (6, 1, {1, 2, 3, 6}), (20, 5, {1, 5, 10, 20})],
)  # fmt: skip
def test_heads_split_as_vllm_splits_them(query_heads: int, key_value_heads: int, allowed: set[int]) -> None:
    """Query heads evenly; key-value heads evenly, or each on as many devices."""
    assert {devices for devices in range(1, 40) if heads_split(query_heads, key_value_heads, devices)} == allowed


def test_one_device_splits_anything() -> None:
    shape = describe(SMOLLM2).shape.shrunk(query_heads=6, key_value_heads=2, neurons=1017)
    assert reason_not_split(shape, 1) is None
    assert reason_not_split(shape, 2) == "1,017 neurons cannot be shared out over 2 devices"


def test_narrow_attention_is_warned_of_where_a_backend_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"some backend": {"llama": "computes the size of a head as hidden size / heads"}}
    monkeypatch.setattr("amprune.model.backends.NARROW_ATTENTION", entry)
    dense = shape_of("Llama-3-8B")
    pruned = make_plan(fake_scores("Llama-3-8B"), heads_ratio=0.25, neurons_ratio=0.25).shape_after
    assert found(dense, "some backend") == []
    (warning,) = found(pruned, "some backend")
    assert warning.what == "24 query heads x 128 = 3,072 on hidden size 4,096"
    assert warning.reason == entry["some backend"]["llama"]
    assert found(replace(pruned, model_type="mistral"), "some backend") == []


def test_inspect_warns_of_shapes_and_is_silent_where_all_is_well(tmp_path: Path) -> None:
    odd = save_model(find("llama-gqa"), tmp_path / "odd")
    warnings = inspect(odd).shape_warnings
    assert warnings == shape_warnings(inspect(odd).shape)
    shown = CliRunner().invoke(app, ["inspect", str(odd)]).stdout
    assert "Shapes: what backends handle badly\n" in shown
    assert all(f"  {w.backend}: {w.what}: {w.reason}\n" in shown for w in warnings)
    content = json.loads(CliRunner().invoke(app, ["inspect", str(odd), "--json"]).stdout)
    assert content["shape_warnings"] == [vars(warning) for warning in warnings]
    assert {"backend", "what", "reason"} == set(content["shape_warnings"][0])
    friendly = tmp_path / "friendly"
    friendly.mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    (friendly / "config.json").write_text(json.dumps({**SMOLLM2, **sizes, "num_hidden_layers": 1}))
    assert "Shapes" not in CliRunner().invoke(app, ["inspect", str(friendly)]).stdout
    assert json.loads(CliRunner().invoke(app, ["inspect", str(friendly), "--json"]).stdout)["shape_warnings"] == []
