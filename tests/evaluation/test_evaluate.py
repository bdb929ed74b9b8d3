"""`amprune evaluate` as a whole: which models, one file that survives everything, the command line."""

import json
import logging
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_evaluation import (
    DATA_DIR,
    QUICK,
    checkpoint,
    foreign_checkpoint,
    needs_data,
    task_folder,
    text_file,
)
from transformers import GPTNeoXForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from amprune.cli.options import app
from amprune.errors import CheckpointError, EvaluationError
from amprune.evaluation import latency, perplexity, run
from amprune.evaluation.comparison import paired
from amprune.evaluation.records import Evaluation, Record
from amprune.evaluation.run import evaluate
from amprune.model.latency import LatencySettings
from amprune.model.loading import loaded_model
from amprune.pipeline import prune


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    return prune(dense, dense.parent / "pruned", ratio=0.1, calibration="builtin", samples=4).folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "my.txt")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    return [text_file(tmp_path / f"{name}.txt", sentences) for name, sentences in (("a", 6), ("b", 8), ("c", 10))]


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def perplexities(models: Any, output: Path, texts: list[Path], **options: Any) -> Evaluation:
    return evaluate(models, output, measure=["perplexity"], texts=texts, **{"sequence_length": 32, **options})


def keys(evaluation: Evaluation, model: str) -> list[tuple[str, str, str]]:
    return [(record.measurement, record.task, record.metric) for record in evaluation.of(model)]


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copies a checkpoint with other weights."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_weight(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights["model.layers.1.mlp.down_proj.weight"][0, 0].fill_(value) and None


# What is recorded

SIZES = ["parameters", "weight_bytes", "weight_bytes_per_token", "kv_cache_bytes_per_token", "macs_per_token"]


def test_records_say_what_when_where_and_with_which_versions(dense: Path, text: Path, tmp_path: Path) -> None:
    evaluation = perplexities(dense, tmp_path / "e.json", [text], windows=5)
    assert keys(evaluation, "dense") == [
        *(("size", "model", metric) for metric in SIZES),
        ("perplexity", "my.txt", "perplexity"),
        ("bits_per_byte", "my.txt", "bits_per_byte"),
    ]
    record = evaluation.of("dense", "perplexity")[0]
    assert record.settings == {"sequence_length": 32, "windows": 5, "dtype": "float32", "start_token": "each"}
    assert record.n == len(record.items) == 5
    assert record.data is not None
    assert record.data["name"] == "my.txt"
    assert record.device.startswith("cpu (")
    assert {"python", "torch", "transformers", "lm-eval"} <= set(record.versions)
    assert record.time.endswith("+00:00")


def test_a_model_is_described(dense: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "described"
    shutil.copytree(dense, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n- owner/base\n---\n# Model\n")
    entry = perplexities(f"named={folder}", tmp_path / "e.json", [text]).models["named"]
    assert (entry.source, entry.model_type, entry.dtype) == (str(folder), "llama", "float32")
    assert (entry.license, entry.base_model, entry.pruned) == ("mit", "owner/base", None)
    assert entry.weight_bytes == (folder / "model.safetensors").stat().st_size
    with loaded_model(folder) as model:
        assert entry.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_dtype_of_the_computation_is_recorded(dense: Path, text: Path, tmp_path: Path) -> None:
    evaluation = perplexities(dense, tmp_path / "e.json", [text])
    evaluation = perplexities(dense, tmp_path / "e.json", [text], dtype="bfloat16")
    found = {record.settings["dtype"]: record.value for record in evaluation.of("dense", "perplexity")}
    assert set(found) == {"float32", "bfloat16"}
    assert found["float32"] != found["bfloat16"]
    assert found["float32"] == pytest.approx(found["bfloat16"], rel=0.01)
    bytes_of = {record.settings["dtype"]: record.value for record in evaluation.of("dense", "size")
                if record.metric == "kv_cache_bytes_per_token"}  # fmt: skip
    assert bytes_of["float32"] == 2 * bytes_of["bfloat16"]


@needs_data
@pytest.mark.parametrize("device_map", ["disk", "auto"])
def test_a_model_that_is_streamed_gives_the_same_figures(
    device_map: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        **QUICK, "measure": ["perplexity", "zero_shot"], "texts": [text], "tasks": ["winogrande"], "data_dir": DATA_DIR,
    }  # fmt: skip
    whole = evaluate(dense, tmp_path / "whole.json", **options)
    spread = evaluate(dense, tmp_path / "spread.json", device_map=device_map, **options)
    for mine, theirs in zip(whole.records.values(), spread.records.values(), strict=True):
        assert (mine.metric, mine.value) == (theirs.metric, pytest.approx(theirs.value))
        assert mine.items_hash == theirs.items_hash
        assert theirs.device == f"device map {device_map}"


@needs_data
def test_the_average_takes_figures_of_the_same_settings_alone(dense: Path, tmp_path: Path) -> None:
    def averages(**options: Any) -> dict[Any, Record]:
        evaluation = evaluate(dense, tmp_path / "e.json", measure=["zero_shot"], data_dir=DATA_DIR, limit=2, **options)
        return {
            (record.settings["num_fewshot"], record.settings["dtype"]): record
            for record in evaluation.of("dense", "zero_shot")
            if record.task == "average"
        }

    first = averages()
    assert set(first) == {(0, "float32")}
    assert first[0, "float32"].n == 10
    averages(num_fewshot=1)
    again = averages(tasks=["piqa"])  # the others are those of the first run
    assert set(again) == {(0, "float32"), (1, "float32")}
    assert again[0, "float32"].value == first[0, "float32"].value
    assert set(averages(tasks=["piqa"], dtype="bfloat16")) == set(again)  # four are missing


def test_no_average_of_some_tasks(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"measure": ["zero_shot"], "tasks": ["winogrande"], "limit": 3}
    evaluation = evaluate(dense, tmp_path / "e.json", data_dir=task_folder(tmp_path), **options)
    assert {record.task for record in evaluation.of("dense", "zero_shot")} == {"winogrande"}


# Which models

MIXTRAL = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_local_experts": 4,
}  # fmt: skip
BLOOM = {"hidden_size": 48, "n_layer": 2, "n_head": 6}
LATENCY = [LatencySettings(new_tokens=4, warmup=1, runs=2)]


@pytest.mark.parametrize(("model_type", "entries"), [("mixtral", MIXTRAL), ("bloom", BLOOM)])
def test_models_that_cannot_be_pruned_can_be_measured(
    model_type: str, entries: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    folder = foreign_checkpoint(tmp_path / model_type, model_type, **entries)
    measure: Any = ["perplexity", "latency"]
    evaluation = evaluate(
        folder, tmp_path / "e.json", measure=measure, texts=[text], sequence_length=32, latency=LATENCY
    )
    assert {record.measurement for record in evaluation.of(model_type)} == {
        "size", "perplexity", "bits_per_byte", "latency", "memory",
    }  # fmt: skip


def test_a_pickled_checkpoint_gives_the_same_figures(dense: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(dense, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    evaluation = perplexities([dense, folder], tmp_path / "e.json", [text])
    values = [evaluation.of(name, "perplexity")[0].value for name in ("dense", "pickled")]
    assert values[0] == values[1]
    assert evaluation.models["dense"].sha256 != evaluation.models["pickled"].sha256
    assert evaluation.models["dense"].parameters == evaluation.models["pickled"].parameters


def test_shards_count_as_one_model(text: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "shards", max_shard_size="100KB")
    entry = perplexities(folder, tmp_path / "e.json", [text]).models["shards"]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert entry.weight_bytes == sum(file.stat().st_size for file in files)


def test_text_needs_a_tokenizer_and_latency_does_not(text: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "bare", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"bare has no tokenizer.*copy the tokenizer files"):
        perplexities(folder, tmp_path / "e.json", [text])
    evaluation = evaluate(folder, tmp_path / "f.json", measure=["latency"], latency=LATENCY)
    assert {record.measurement for record in evaluation.of("bare")} == {"size", "latency", "memory"}


def edited(dense: Path, folder: Path, **entries: Any) -> Path:
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


# The head, in releases that call it embed_out.
FIRST_OF_GPT_NEOX = "embed_out" if "embed_out.weight" in GPTNeoXForCausalLM._tied_weights_keys else "gpt_neox"
NO_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "a layer too few": ({"num_hidden_layers": 3}, "9 tensors are missing, such as model.layers.2"),
    "other sizes": ({"intermediate_size": 81}, "6 tensors are mismatched, such as .*mlp.down_proj"),
    "other names": ({"model_type": "gpt_neox"}, f"tensors are missing, such as {FIRST_OF_GPT_NEOX}"),
    "encoder and decoder": ({"model_type": "t5"}, "no causal language model"),
    "unknown": ({"model_type": "nonsense"}, "no causal language model"),
    "wrong type": ({"hidden_size": "x"}, "no causal language model.*expected int, got str"),
    "code of its own": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
        "no causal language model of transformers: .*custom code",
    ),
}


@pytest.mark.parametrize("case", sorted(NO_MODEL))
def test_weights_that_are_not_those_of_the_config_are_refused(
    case: str, dense: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    entries, message = NO_MODEL[case]
    folder = edited(dense, tmp_path / "edited", **entries)
    with pytest.raises(CheckpointError, match=message):
        perplexities(folder, tmp_path / "e.json", [text])
    assert not (tmp_path / "e.json").exists()
    assert "[y/N]" not in capfd.readouterr().out


def test_weights_that_transformers_ignores_are_reported(
    dense: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited(dense, tmp_path / "edited", num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, logger="amprune"):
        perplexities(folder, tmp_path / "e.json", [text])
    assert "edited: transformers ignores 9 tensors, such as model.layers.1" in caplog.text


def test_a_folder_that_is_no_model(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing; .*empty is no transformers checkpoint"):
        perplexities(tmp_path / "empty", tmp_path / "e.json", [text])
    with pytest.raises(CheckpointError, match="no model"):
        perplexities(tmp_path / "none", tmp_path / "e.json", [text])
    with pytest.raises(EvaluationError, match="no model to measure"):
        perplexities([], tmp_path / "e.json", [text])


def test_names(dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a=b"
    shutil.copytree(dense, odd)
    monkeypatch.chdir(tmp_path)
    evaluation = perplexities(["a=b", f"other={odd}", f"{dense}/"], Path("e.json"), [text])
    assert list(evaluation.models) == ["a=b", "other", "dense"]
    with pytest.raises(EvaluationError, match="two models are called 'dense'; give them names: first=dense second="):
        perplexities([dense, f"dense={odd}"], Path("f.json"), [text])
    assert not Path("f.json").exists()


def test_texts_of_one_name_are_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    other = text_file(tmp_path / "my.txt")
    with pytest.raises(EvaluationError, match=r"two texts are called 'my\.txt'"):
        perplexities(dense, tmp_path / "e.json", [text, other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": ["speed"]}, "cannot measure 'speed'; choose from perplexity, zero_shot, latency, energy"),
        ({"limit": 0}, "the limit is 0, expected 1 or more"),
        ({"batch_size": 0}, "the batch size is 0, expected 1 or more"),
        ({"measure": ["zero_shot"], "tasks": []}, "zero_shot: no task is given"),
        ({"measure": ["latency"], "latency": []}, "latency: no case is given"),
    ],
    ids=str,
)
def test_settings_are_checked_first(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(tmp_path / "none", tmp_path / "e.json", **options)


# Figures that are none


def test_nan_keeps_no_record_of_the_model_and_those_of_the_others(dense: Path, text: Path, tmp_path: Path) -> None:
    broken = changed(dense, tmp_path / "broken", set_weight(math.nan))
    with pytest.raises(EvaluationError, match="broken gives logits that are NaN in float32, so no figure is kept"):
        perplexities([dense, broken], tmp_path / "e.json", [text])
    kept = Evaluation.load(tmp_path / "e.json")
    assert len(kept.of("dense")) == len(SIZES) + 2
    assert kept.of("broken") == []


def test_infinite_figures_are_no_records() -> None:
    record = Record(model="m", measurement="perplexity", task="t", metric="perplexity", value=math.inf, unit="u")
    with pytest.raises(EvaluationError, match="measured inf, which is no figure"):
        Evaluation().add([record])


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that run out of memory with more than two sequences at a time."""

    @contextmanager
    def loaded(folder: Path, **options: Any) -> Iterator[PreTrainedModel]:
        def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], given: dict[str, Any]) -> None:
            if len(inputs[0] if inputs else given["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with loaded_model(folder, **options) as model:
            model.register_forward_pre_hook(check, with_kwargs=True)
            yield model

    monkeypatch.setattr(run, "loaded_model", loaded)


@pytest.mark.usefixtures("little_memory")
def test_a_timed_batch_that_does_not_fit_is_halved_and_noted(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = replace(LATENCY[0], batch_size=8)
    with caplog.at_level(logging.WARNING, logger="amprune"):
        evaluation = evaluate(dense, tmp_path / "e.json", measure=["latency"], latency=[case])
    record = evaluation.of("dense", "latency")[0]
    assert record.task == "batch 2, prompt 12, new 4, eager"
    assert record.settings["batch_size"] == 2
    assert record.note == "instead of a batch of 8: memory ran out"
    assert [entry.args for entry in caplog.records] == [(f"latency, {case.label}", size) for size in (4, 2)]


def test_models_that_do_not_fit_beside_each_other(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Path] = []

    @contextmanager
    def loaded(folder: Path, **options: Any) -> Iterator[PreTrainedModel]:
        if held:
            raise MemoryError
        held.append(folder)
        with loaded_model(folder, **options) as model:
            yield model
        held.pop()

    monkeypatch.setattr(run, "loaded_model", loaded)
    options: Any = {"measure": ["perplexity", "latency"], "texts": [text], "sequence_length": 32, "latency": LATENCY}
    with pytest.raises(EvaluationError, match="pruned does not fit into memory beside dense; measure fewer"):
        evaluate([dense, pruned], tmp_path / "e.json", **options)
    kept = Evaluation.load(tmp_path / "e.json")
    assert all(kept.of(name, "perplexity") for name in ("dense", "pruned"))


# evaluation.json


def full_record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "model": "dense", "measurement": "perplexity", "task": "Zürich.txt", "metric": "perplexity", "value": 20.5,
        "unit": "perplexity", "n": 2, "standard_error": 0.25,
        "settings": {"windows": None, "sequence_length": 32, "start_token": "each"},
        "seed": 3, "items": (3.0, 3.1), "items_hash": "ab", "data": {"name": "Zürich.txt", "sha256": "cd"},
        "device": "cpu", "versions": {"torch": "2"}, "time": "2026-01-01T00:00:00+00:00", "note": "halved",
    }  # fmt: skip
    return Record(**{**values, **changes})


def test_a_file_says_what_was_saved(dense: Path, text: Path, tmp_path: Path) -> None:
    evaluation = perplexities(dense, tmp_path / "e.json", [text])
    evaluation.add(
        [
            full_record(),
            Record(model="dense", measurement="size", task="model", metric="x", value=0.0, unit="u"),
            full_record(note=None, metric="y"),
        ]
    )
    evaluation.unfinished = {"request": {"start_token": "first", "limit": None}, "done": ["dense: size"]}
    evaluation.save(tmp_path / "sub" / "again.json")
    assert Evaluation.load(tmp_path / "sub" / "again.json") == evaluation
    assert [file.name for file in (tmp_path / "sub").iterdir()] == ["again.json"]
    assert "Zürich.txt" in (tmp_path / "sub" / "again.json").read_text(encoding="utf-8")


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    evaluation = Evaluation()
    evaluation.add([full_record(value=87792), full_record(value=0.5, metric="y")])
    evaluation.save(tmp_path / "a.json")
    Evaluation.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert '"value": 87792,' in (tmp_path / "b.json").read_text(encoding="utf-8")


def test_a_later_figure_takes_the_place_of_an_earlier_one() -> None:
    evaluation = Evaluation()
    evaluation.add([full_record(), full_record(task="other")])
    evaluation.add([full_record(value=30.0, items=(1.0, 2.0), time="later")])
    assert [record.value for record in evaluation.records.values()] == [30.0, 20.5]
    for changes in ({"settings": {"windows": 3}}, {"device": "cuda"}, {"model": "m"}, {"task": "t"}, {"metric": "x"}):
        assert full_record(**changes).key != full_record().key
    assert (
        full_record(settings={"start_token": "each", "sequence_length": 32, "windows": None}).key == full_record().key
    )


DAMAGED = {
    "cut": ('{"format": "amprune evaluation 1", "mod', "not JSON"),
    "empty": ("", "not JSON"),
    "a list": ("[]", "holds a list, expected a JSON object"),
    "a config": ('{"model_type": "llama"}', "its format is None"),
    "a plan": ('{"format": "amprune plan 1"}', "its format is 'amprune plan 1'"),
    "no records": ('{"format": "amprune evaluation 1", "models": []}', "lacks the field records; the file is damaged"),
    "a record of text": ('{"format": "amprune evaluation 1", "models": [], "records": ["x"]}', "damaged"),
    "a model without fields": (
        '{"format": "amprune evaluation 1", "models": [{}], "records": []}',
        r"model 0: lacks the field name; the file is damaged",
    ),
    "a run of text": ('{"format": "amprune evaluation 1", "models": [], "records": [], "unfinished": "x"}', "damaged"),
    "a run without request": (
        '{"format": "amprune evaluation 1", "models": [], "records": [], "unfinished": {"done": []}}',
        "unfinished: lacks the field (done|request); the file is damaged",
    ),
    "a figure of text": (
        '{"format": "amprune evaluation 1", "models": [], "records": [{"model": "m", "measurement": "size", '
        '"task": "t", "metric": "x", "value": "many", "unit": "u"}]}',
        "damaged",
    ),
    "no figure": (
        '{"format": "amprune evaluation 1", "models": [], "records": [{"model": "m", "measurement": "size", '
        '"task": "t", "metric": "x", "value": NaN, "unit": "u"}]}',
        "record 0: value is NaN, expected a number; the file is damaged",
    ),
}


@pytest.mark.parametrize("case", sorted(DAMAGED))
def test_a_file_that_is_no_evaluation_is_refused_and_left_alone(
    case: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    content, message = DAMAGED[case]
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        perplexities(dense, tmp_path / "e.json", [text])
    assert (tmp_path / "e.json").read_text() == content


def test_a_file_of_bytes_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="not JSON"):
        perplexities(dense, tmp_path / "e.json", [text])


@pytest.mark.parametrize("where", ["folder", "file/e.json"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(
    where: str, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "loaded_model", lambda *arguments, **options: pytest.fail("a model was loaded"))
    with pytest.raises(EvaluationError, match=r"cannot (be read|write)"):
        perplexities(dense, tmp_path / where, [text])


@pytest.mark.parametrize("call", ["replace", "chmod"])
def test_a_failed_write_leaves_the_old_file(
    call: str, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "e.json"
    evaluation = perplexities(dense, file, [text])
    before = file.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, call, full)
    evaluation.add([full_record()])
    with pytest.raises(EvaluationError, match=r"cannot write .*e\.json: No space left on device"):
        evaluation.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_a_file_whose_content_cannot_be_written_is_not_touched(tmp_path: Path) -> None:
    evaluation = Evaluation()
    evaluation.add([full_record()])
    evaluation.save(tmp_path / "e.json")
    before = (tmp_path / "e.json").read_bytes()
    evaluation.add([full_record(items=(math.nan,))])
    with pytest.raises(ValueError, match="JSON"):
        evaluation.save(tmp_path / "e.json")
    assert (tmp_path / "e.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_another_model_of_a_known_name_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    perplexities(dense, file, [text])
    before = file.read_bytes()
    other = changed(dense, tmp_path / "elsewhere" / "dense", set_weight(0.5))
    with pytest.raises(EvaluationError, match=r"holds figures of another model named 'dense'.*NAME=PATH"):
        perplexities(other, file, [text])
    assert file.read_bytes() == before
    assert list(perplexities(f"new={other}", file, [text]).models) == ["dense", "new"]


def test_an_edited_config_is_another_model(dense: Path, text: Path, tmp_path: Path) -> None:
    folder = edited(dense, tmp_path / "model")
    perplexities(folder, tmp_path / "e.json", [text])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(EvaluationError, match="another model"):
        perplexities(folder, tmp_path / "e.json", [text])


# Runs that were interrupted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, in order; an entry `stop at ...` interrupts the run there."""
    found: list[str] = []
    measure_perplexity = perplexity.measure_perplexity

    def watched(*arguments: Any, text: Any, **options: Any) -> Any:
        if f"stop at {text.name}" in found:
            raise KeyboardInterrupt
        found.append(text.name)
        return measure_perplexity(*arguments, text=text, **options)

    monkeypatch.setattr(perplexity, "measure_perplexity", watched)
    return found


def interrupted(models: Any, output: Path, texts: list[Path], calls: list[str], **options: Any) -> Evaluation:
    calls[:] = ["stop at c.txt"]
    with pytest.raises(KeyboardInterrupt):
        perplexities(models, output, texts, **options)
    assert calls == ["stop at c.txt", "a.txt", "b.txt"]
    calls.clear()
    return Evaluation.load(output)


def test_an_interrupted_run_goes_on_where_it_stopped(
    dense: Path, texts: list[Path], tmp_path: Path, calls: list[str]
) -> None:
    kept = interrupted(dense, tmp_path / "e.json", texts, calls)
    assert [record.task for record in kept.of("dense", "perplexity")] == ["a.txt", "b.txt"]
    assert kept.unfinished is not None
    assert kept.unfinished["done"] == ["dense: size", "dense: a.txt", "dense: b.txt"]
    evaluation = perplexities(dense, tmp_path / "e.json", texts)
    assert calls == ["c.txt"]
    assert [record.task for record in evaluation.of("dense", "perplexity")] == ["a.txt", "b.txt", "c.txt"]
    assert evaluation.unfinished is None
    assert Evaluation.load(tmp_path / "e.json") == evaluation
    assert kept.records.items() <= evaluation.records.items()


def test_a_run_that_was_finished_is_measured_anew(
    dense: Path, texts: list[Path], tmp_path: Path, calls: list[str]
) -> None:
    first = perplexities(dense, tmp_path / "e.json", texts)
    second = perplexities(dense, tmp_path / "e.json", texts)
    assert calls == ["a.txt", "b.txt", "c.txt"] * 2
    assert list(first.records) == list(second.records)
    assert [record.value for record in first.records.values()] == [record.value for record in second.records.values()]


@pytest.mark.parametrize(
    "options", [{"windows": 1}, {"sequence_length": 16}, {"dtype": "bfloat16"}, {"limit": 7}], ids=str
)
def test_another_request_starts_anew_and_keeps_what_is_there(
    options: dict[str, Any], dense: Path, texts: list[Path], tmp_path: Path, calls: list[str]
) -> None:
    kept = interrupted(dense, tmp_path / "e.json", texts, calls)
    evaluation = perplexities(dense, tmp_path / "e.json", texts, **options)
    assert calls == ["a.txt", "b.txt", "c.txt"]
    assert set(kept.records) <= set(evaluation.records)


def test_a_text_that_changed_meanwhile_is_another_request(
    dense: Path, texts: list[Path], tmp_path: Path, calls: list[str]
) -> None:
    interrupted(dense, tmp_path / "e.json", texts, calls)
    text_file(texts[0], 12)
    perplexities(dense, tmp_path / "e.json", texts)
    assert calls == ["a.txt", "b.txt", "c.txt"]


def test_another_seed_is_another_request(dense: Path, texts: list[Path], tmp_path: Path, calls: list[str]) -> None:
    interrupted(dense, tmp_path / "e.json", texts, calls, latency=LATENCY)
    perplexities(dense, tmp_path / "e.json", texts, latency=[replace(LATENCY[0], seed=1)])
    assert calls == ["a.txt", "b.txt", "c.txt"]


def test_another_model_beside_the_first_is_another_request(
    dense: Path, pruned: Path, texts: list[Path], tmp_path: Path, calls: list[str]
) -> None:
    interrupted(dense, tmp_path / "e.json", texts, calls)
    perplexities([dense, pruned], tmp_path / "e.json", texts)
    assert calls == ["a.txt", "b.txt", "c.txt"] * 2


def test_what_models_measure_together_is_kept_case_by_case(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, timed = [replace(LATENCY[0], prompt_tokens=count) for count in (8, 10)], []
    measure_latency = latency.measure_latency

    def watched(models: Any, case: LatencySettings, **options: Any) -> Any:
        timed.append((list(models), case.prompt_tokens))
        if len(timed) == 2:
            raise KeyboardInterrupt
        return measure_latency(models, case, **options)

    monkeypatch.setattr(latency, "measure_latency", watched)
    with pytest.raises(KeyboardInterrupt):
        evaluate([dense, pruned], tmp_path / "e.json", measure=["latency"], latency=cases)
    evaluation = evaluate([dense, pruned], tmp_path / "e.json", measure=["latency"], latency=cases)
    both = ["dense", "pruned"]
    assert timed == [(both, 8), (both, 10), (both, 10)]
    ours, theirs = evaluation.of("pruned", "latency"), evaluation.of("dense", "latency")
    assert [record.task for record in ours] == [record.task for record in theirs]
    assert len(ours) == 6
    assert all(paired(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert paired(ours[0], theirs[3]) is None


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "amprune", "evaluate", *map(str, arguments)]


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of Unix")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=str)
def test_a_process_that_is_stopped_leaves_a_whole_file(
    sent: signal.Signals, code: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, named = tmp_path / "e.json", [text_file(tmp_path / f"{number:03}.txt", 60) for number in range(150)]
    texts = [argument for path in named for argument in ("--text", path)]
    arguments = [dense, "-o", file, "--measure", "perplexity", "--sequence-length", 16, *texts]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not file.exists() or len(Evaluation.load(file).records) < len(SIZES) + 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    kept = Evaluation.load(file)
    finished = {record.task for record in kept.of("dense", "perplexity")}
    assert 2 <= len(finished) < len(named)
    if sent == signal.SIGINT:
        assert f"interrupted; what was finished is in {file}" in " ".join(errors.split())
        assert "Traceback" not in errors
    measured: list[str] = []
    monkeypatch.setattr(
        perplexity, "measure_perplexity", lambda given, *, text, asked: measured.append(text.name) or []
    )
    perplexities(str(dense), file, named, sequence_length=16)
    assert set(measured) == {path.name for path in named} - finished


# The command line


def test_ctrl_c_says_where_results_are(dense: Path, texts: list[Path], tmp_path: Path, calls: list[str]) -> None:
    calls.append("stop at b.txt")
    options = [argument for path in texts for argument in ("--text", path)]
    code, output, errors = invoke(
        dense, "-o", tmp_path / "e.json", "--measure", "perplexity", "--sequence-length", 32, *options
    )
    assert code == 130
    assert output == ""
    assert f"interrupted; what was finished is in {tmp_path / 'e.json'}" in " ".join(errors.split())
    assert [record.task for record in Evaluation.load(tmp_path / "e.json").of("dense", "perplexity")] == ["a.txt"]


def test_ctrl_c_before_there_is_a_file(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_subjects", interrupt)
    code, _, errors = invoke(dense, "-o", tmp_path / "e.json", "--measure", "latency")
    assert code == 130
    assert "nothing was left behind" in errors


FAILING: dict[str, tuple[list[object], str]] = {
    "no model": (["none", "--measure", "latency"], "no model 'none'"),
    "measurement": (["none", "--measure", "speed"], "cannot measure 'speed'"),
    "no task": (["none", "--measure", "zero_shot", "--tasks", ","], "no task is given"),
    "batches": (["none", "--latency-batch", "1,x"], "--latency-batch is '1,x', expected whole numbers"),
    "prompts": (["none", "--prompt-tokens", "12;13"], "--prompt-tokens is '12;13'"),
    "mode": (["none", "--measure", "latency", "--mode", "fast"], "mode of a latency run is 'fast'"),
    "no mode": (["none", "--measure", "latency", "--mode", ""], "no case is given"),
    "hub": (["none", "--measure", "perplexity"], "--data-dir"),
    "data": (["none", "--measure", "perplexity", "--data-dir", "nowhere"], "no folder nowhere/wikitext2"),
    "text": (["none", "--measure", "perplexity", "--text", "none.txt"], "cannot read none.txt"),
    "data set": (["none", "--measure", "zero_shot", "--data-dir", "nowhere"], "winogrande_xl_validation.jsonl"),
}


@pytest.mark.parametrize("case", sorted(FAILING))
def test_errors_are_one_paragraph_and_leave_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = FAILING[case]
    code, output, errors = invoke(*arguments)
    assert code == 1
    assert output == ""
    assert expected in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


TINY = ["--sequence-length", 32, "--limit", 3, "--new-tokens", 4, "--warmup", 1, "--runs", 2]


def test_dense_and_pruned_in_one_call(dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    arguments = [
        dense, pruned, "-o", file, "--measure", "perplexity,zero_shot,latency", "--text", text, "--tasks", "winogrande",
        "--data-dir", task_folder(tmp_path), "--latency-batch", "1,2", *TINY,
    ]  # fmt: skip
    code, output, errors = invoke(*arguments, "--json")
    assert code == 0, errors
    evaluation = Evaluation.load(file)
    assert json.loads(output) == json.loads(json.dumps(evaluation.to_dict()))
    assert evaluation.unfinished is None
    assert evaluation.models["dense"].pruned is None
    made = evaluation.models["pruned"].pruned
    assert made is not None
    assert set(made) == {"ratio_target", "ratio_actual", "shape_before", "shape_after", "provenance"}
    assert made["ratio_actual"] == pytest.approx(
        1 - evaluation.models["pruned"].parameters / evaluation.models["dense"].parameters
    )
    expected = [
        *(("size", "model", metric) for metric in SIZES),
        ("perplexity", "my.txt", "perplexity"),
        ("bits_per_byte", "my.txt", "bits_per_byte"),
        ("zero_shot", "winogrande", "acc"),
        *(
            (kind, f"batch {batch}, prompt 12, new 4, eager", metric)
            for batch in (1, 2)
            for kind, metric in (
                ("latency", "total"), ("latency", "prefill"), ("latency", "decode"), ("memory", "peak"),
            )
        ),
    ]  # fmt: skip
    for name in ("dense", "pruned"):
        assert keys(evaluation, name) == expected
    for mine, theirs in zip(evaluation.of("pruned"), evaluation.of("dense"), strict=True):
        assert (paired(mine, theirs) is None) == (mine.measurement in ("size", "memory"))
        assert mine.settings == theirs.settings
        if mine.measurement in ("perplexity", "zero_shot", "latency"):
            assert mine.n == len(mine.items) == {"zero_shot": 3, "latency": 2}.get(mine.measurement, mine.n)
    smaller = ("parameters", "weight_bytes", "weight_bytes_per_token", "macs_per_token")
    for mine, theirs in zip(evaluation.of("pruned", "size"), evaluation.of("dense", "size"), strict=True):
        assert mine.value < theirs.value or mine.metric not in smaller


def test_a_table_for_people(dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    arguments = [dense, pruned, "-o", tmp_path / "e.json", "--measure", "perplexity", "--text", text, *TINY]
    code, output, errors = invoke(*arguments)
    assert code == 0, errors
    assert all(words in output for words in ("dense", "pruned", "my.txt"))
    assert not output.startswith("{")


def test_a_single_model_is_no_list(dense: Path, text: Path, tmp_path: Path) -> None:
    assert list(perplexities(str(dense), tmp_path / "e.json", [text]).models) == ["dense"]
    assert list(perplexities(dense, tmp_path / "f.json", [text]).models) == ["dense"]


def test_the_users_home_is_found(dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(dense, tmp_path / "model")
    assert list(perplexities(["~/model", "b=~/model"], Path("~/e.json"), [text]).models) == ["model", "b"]
    assert (tmp_path / "e.json").is_file()
