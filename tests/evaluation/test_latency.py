"""Latency: what is timed, in which order, and that exactly the tokens asked for are generated."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_evaluation import tiny_model
from transformers import PreTrainedModel

from amprune.errors import EvaluationError
from amprune.evaluation.comparison import paired
from amprune.evaluation.latency import records_of
from amprune.evaluation.run import evaluate
from amprune.model import latency
from amprune.model.latency import Latency, LatencySettings, generation_run, measure_latency

QUICK = LatencySettings(new_tokens=6, warmup=1, runs=3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def generated(model: PreTrainedModel, settings: LatencySettings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns each run's prompt and what came of it."""
    found, generate = [], model.generate

    def watched(prompt: torch.Tensor, **options: Any) -> Any:
        out: Any = generate(prompt, **options)
        found.append((prompt, out))
        return out

    model.generate = watched  # type: ignore[method-assign,assignment]
    try:
        measure_latency({"m": model}, settings)
    finally:
        del model.generate
    return found


def eager_to_end() -> PreTrainedModel:
    """A model whose every token is the end of the sequence, and whose settings would stop there, or sample."""
    model: Any = tiny_model("phi-mha")
    with torch.no_grad():
        model.lm_head.bias[2] = 1e4
    generation = model.generation_config
    generation.eos_token_id, generation.do_sample, generation.temperature = 2, True, 0.7
    generation.repetition_penalty = 1e6
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_end_of_sequence_stops_nothing(batch_size: int) -> None:
    model = eager_to_end()
    stopped: Any = model.generate(torch.ones(1, 12, dtype=torch.long), max_new_tokens=6)
    assert stopped.shape == (1, 13)
    for prompt, out in generated(model, replace(QUICK, batch_size=batch_size)):
        assert prompt.shape == (batch_size, 12)
        assert out.shape == (batch_size, 12 + 6)
        assert out[:, 12:].eq(2).all()
    assert model.generation_config.eos_token_id == 2


def test_a_run_is_greedy_from_the_same_prompt(model: PreTrainedModel) -> None:
    runs = generated(model, QUICK)
    assert len(runs) == 1 + 3 + 1  # warm-up, timed, and one for the memory
    prompt, out = runs[0]
    assert all(other.equal(prompt) and result.equal(out) for other, result in runs)
    expected = prompt
    for _ in range(6):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert out.equal(expected)


def test_the_seed_draws_the_prompt_and_models_share_it(model: PreTrainedModel) -> None:
    first, second = (generated(model, replace(QUICK, seed=seed))[0][0] for seed in (0, 1))
    other = generated(tiny_model("phi-mha", seed=1), QUICK)[0][0]
    assert not first.equal(second)
    assert first.equal(other)


def test_times_add_up(model: PreTrainedModel) -> None:
    found = measure_latency({"m": model}, QUICK)["m"]
    assert len(found.total) == len(found.prefill) == len(found.decode) == 3
    for total, prefill, decode in zip(found.total, found.prefill, found.decode, strict=True):
        assert min(prefill, decode) > 0
        assert total == pytest.approx(prefill + decode)


def test_more_tokens_take_longer(model: PreTrainedModel) -> None:
    short, long = (measure_latency({"m": model}, replace(QUICK, new_tokens=count))["m"] for count in (2, 40))
    assert min(long.decode) > 5 * min(short.decode)


def test_the_first_of_a_round_changes_and_warm_ups_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def generator(name: str, model: Any, settings: LatencySettings) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            calls.append(name)
            return len(calls), 10.0 * len(calls)

        return run

    monkeypatch.setattr(latency, "_generator", generator)
    monkeypatch.setattr(latency, "_peak_memory", lambda model, run: 7)
    models: Any = {"a": None, "b": None, "c": None}
    found = measure_latency(models, replace(QUICK, warmup=1, runs=4))
    assert "".join(calls) == "abcbcacababcbca"
    assert found["a"] == Latency([60, 80, 100, 150], [6, 8, 10, 15], [54, 72, 90, 135], 7)
    assert found["b"].total == [40, 90, 110, 130]


def test_a_model_beside_itself_is_as_fast(model: PreTrainedModel) -> None:
    settings = replace(QUICK, new_tokens=8, warmup=3, runs=30)
    found = measure_latency({"first": model, "second": model}, settings)
    first, second = (
        records_of(found[name], settings, session="same", dtype="float32", note=None)[0] for name in ("first", "second")
    )
    speedup = paired(second, first)
    assert speedup is not None
    assert speedup.quartiles is not None
    low, high = speedup.quartiles
    assert low <= speedup.value <= high
    assert 0.8 < speedup.value < 1.25
    assert low < 1.1
    assert high > 0.9
    assert speedup.n == 30


def test_records_of_different_sessions_are_not_paired(model: PreTrainedModel) -> None:
    found = measure_latency({"m": model}, QUICK)["m"]
    first, second = (
        records_of(found, QUICK, session=session, dtype="float32", note=None)[0] for session in ("one", "other")
    )
    assert paired(first, second) is None
    assert paired(first, first) is not None


def test_figures_are_in_seconds_and_bytes() -> None:
    found = Latency([2.0, 4.0], [0.5, 1.0], [1.5, 3.0], 1000)
    figures = records_of(found, QUICK, session="s", dtype="float32", note="a note")
    shown = {(figure.measurement, figure.metric): figure for figure in figures}
    assert {name: figure.value for name, figure in shown.items()} == {
        ("latency", "total"): 3.0,
        ("latency", "prefill"): 0.75,
        ("latency", "decode"): 2.25,
        ("memory", "peak"): 1000,
    }
    assert shown["latency", "total"].standard_error == pytest.approx(1.0)
    assert shown["latency", "total"].items == (2.0, 4.0)
    assert {figure.note for figure in figures} == {"a note"}
    found.peak_memory = None
    assert len(records_of(found, QUICK, session="s", dtype="float32", note=None)) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_peak_memory_is_the_weights_and_what_generating_takes(model: PreTrainedModel) -> None:
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    small = measure_latency({"m": model}, QUICK)["m"].peak_memory
    large = measure_latency({"m": model}, replace(QUICK, batch_size=64, prompt_tokens=512))["m"].peak_memory
    assert small is not None
    assert large is not None
    assert weights < small < weights + 100e6
    cache = 2 * 2 * 4 * 16 * 4 * 64 * 512  # keys and values of 2 layers, 4 heads of 16 numbers
    assert large > weights + cache


def test_where_the_system_does_not_tell_there_is_no_peak(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_peak(name: str) -> int:
        raise OSError(f"no {name}")

    monkeypatch.setattr(latency, "_resident", no_peak)
    assert measure_latency({"m": model}, QUICK)["m"].peak_memory is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"batch_size": 0}, "batch size of a latency run is 0, expected 1 or more"),
    "prompt": ({"prompt_tokens": 0}, "prompt tokens of a latency run is 0"),
    "one new token": ({"new_tokens": 1}, "new tokens of a latency run is 1, expected 2 or more"),
    "warm-up": ({"warmup": -1}, "warmup of a latency run is -1"),
    "runs": ({"runs": 0}, "runs of a latency run is 0"),
    "mode": ({"mode": "fast"}, "mode of a latency run is 'fast', expected eager or compile"),
    "compile at once": ({"mode": "compile", "warmup": 0}, "first run of a compiled model compiles it"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_settings_that_time_nothing_are_refused_before_a_model_is_sought(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    with pytest.raises(EvaluationError, match=message):
        evaluate(tmp_path / "none", tmp_path / "e.json", measure=["latency"], latency=[replace(QUICK, **change)])


def test_more_tokens_than_positions_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match="m has 1,024 positions, too few for 1020 prompt and 6 new tokens"):
        measure_latency({"m": model}, replace(QUICK, prompt_tokens=1020))
    assert measure_latency({"m": model}, replace(QUICK, prompt_tokens=1018, runs=1))["m"].total


def test_without_warm_up_every_run_counts(model: PreTrainedModel) -> None:
    assert len(generated(model, replace(QUICK, warmup=0, runs=1))) == 2


def test_a_run_for_energy_returns_its_tokens(model: PreTrainedModel) -> None:
    assert generation_run(model, replace(QUICK, batch_size=3))() == 18


COMPILED = """
import sys
import warnings
sys.path.insert(0, {tests!r})
import torch
from tiny_evaluation import tiny_model
from amprune.model.latency import LatencySettings, measure_latency
model, compiled, forward = tiny_model(), [], torch.compile
torch.compile = lambda function, **options: compiled.append(options) or forward(function, **options)
found = measure_latency({{"m": model}}, LatencySettings(new_tokens=4, warmup=2, runs=2, mode="compile"))["m"]
assert len(compiled) == 1, compiled
assert len(found.total) == 2
assert max(found.total) < 2, found.total  # compiling takes longer
"""


@pytest.mark.compilation
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_runs_are_timed_once_they_are_compiled(tmp_path: Path) -> None:
    script = COMPILED.format(tests=str(Path(__file__).parents[1]))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, **caches})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_on_cuda(mode: Any) -> None:
    model = tiny_model().to("cuda")
    found = measure_latency({"m": model}, replace(QUICK, mode=mode, warmup=2))["m"]
    assert min(found.prefill) > 0
    assert min(found.decode) > 0
    assert found.peak_memory is not None
    assert found.peak_memory > sum(weight.nbytes for weight in model.parameters())
