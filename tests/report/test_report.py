"""The report: what its numbers say, what it looks like to a browser, and that nothing is ever half-written."""

import base64
import errno
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import check_in_browser
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import load_file, save_file
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer

import amprune
from amprune.errors import ReportError, VerificationError
from amprune.evaluation.identity import content_hash
from amprune.evaluation.records import Evaluation, ModelEntry, Record
from amprune.model.recovered import TrainingLog, read_training_log
from amprune.model.shape import ModelShape
from amprune.model.source import open_source
from amprune.plan.make import make_plan
from amprune.prove.card import read_card, write_card
from amprune.report.drawing import _apart
from amprune.report.importance import heads_figure, neurons_figure
from amprune.report.inputs import read_inputs
from amprune.report.numbers import number, percent, probability, scaled, seconds, shortened, times
from amprune.report.quality import _lines
from amprune.report.training import running_mean
from amprune.report.write import ReportFiles, write_report
from amprune.scoring.scores import ImportanceScores, LayerScores

DENSE = "smollm2-135m"
TASKS = {"winogrande": 0.53, "piqa": 0.68, "arc_easy": 0.585, "arc_challenge": 0.29, "hellaswag": 0.43}
DEVICE = "cpu (AMD EPYC 9B14, 2 threads)"
VERSIONS = {"python": "3.11.7", "amprune": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "lm-eval": "0.4.9"}
EMBEDDINGS = 28_311_552


def smollm_shape(
    *, layers: int = 30, heads: int = 9, groups: int = 3, neurons: int = 1536, hidden: int = 576
) -> ModelShape:
    """Sizes like SmolLM2-135M's."""
    units = layers * (heads * 2 * 64 * hidden + groups * 2 * 64 * hidden + neurons * 3 * hidden)
    return ModelShape(
        model_type="llama",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=64,
        intermediate_size=neurons,
        parameters=units + EMBEDDINGS + 2 * layers * hidden + hidden,
        query_head_parameters=2 * 64 * hidden,
        key_value_head_parameters=2 * 64 * hidden,
        neuron_parameters=3 * hidden,
        query_head_counts=tuple(range(1, heads + 1)),
    )


def made_scores(shape: ModelShape, seed: int = 0) -> ImportanceScores:
    """Scores that grow with depth and have long tails, as those of real models do."""
    draw = np.random.default_rng(seed)
    layers = []
    for index in range(shape.num_layers):
        scale = 0.2 * math.exp(2 * index / shape.num_layers)
        heads = scale * draw.lognormal(0, 0.6, shape.num_attention_heads)
        groups = heads.reshape(shape.num_key_value_heads, -1).sum(axis=1) * 0.8
        neurons = 0.05 * scale * draw.lognormal(0, 0.8, shape.intermediate_size)
        layers.append(LayerScores(*(values.astype(np.float32) for values in (heads, groups, neurons))))
    calibration = {"name": "builtin", "samples": 50, "tokens": 13579, "seed": 0, "sha256": "ab" * 32}
    return ImportanceScores(tuple(layers), shape, "c0ffee" * 8, "amp", calibration, {"dtype": "bfloat16"})


def pruned_records(folder: Path, scores: ImportanceScores, **options: Any) -> tuple[Path, dict[str, Any], int]:
    """Writes what amprune leaves beside a pruned model's weights."""
    plan = make_plan(scores, **options)
    plan.save(folder / "amprune" / "plan.json")
    scores.save(folder / "amprune" / "scores.safetensors")
    made = {"ratio_target": plan.ratio_target, "ratio_actual": plan.ratio_actual, "provenance": plan.provenance}
    shapes = {"shape_before": plan.shape_before.to_dict(), "shape_after": plan.shape_after.to_dict()}
    return folder, {**made, **shapes}, plan.shape_after.parameters


def entry(name: str, parameters: int, source: str = "", pruned: dict[str, Any] | None = None) -> ModelEntry:
    return ModelEntry(
        name=name, source=source or name, sha256=(name.encode().hex() * 64)[:64], model_type="llama", dtype="bfloat16",
        parameters=parameters, weight_bytes=2 * parameters, license="apache-2.0", pruned=pruned,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    )  # fmt: skip


def measured(
    name: str,
    parameters: int,
    *,
    perplexity: float,
    loss: float = 0.0,
    speed: float = 1.0,
    cases: Sequence[tuple[int, int, str]] = ((1, 12, "eager"), (16, 512, "eager"), (1, 12, "compile")),
    limit: int | None = None,
    questions: int = 400,
) -> Iterator[Record]:
    """Every record of one model; `loss` is what its accuracies lack, `speed` its decoding speedup at batch 1."""
    common: dict[str, Any] = {
        "model": name,
        "device": DEVICE,
        "versions": VERSIONS,
        "time": "2026-11-22T10:00:00+00:00",
    }
    dtype = {"dtype": "bfloat16"}
    sizes = {"parameters": parameters, "weight_bytes": 2 * parameters, "weight_bytes_per_token": 2 * parameters,
             "kv_cache_bytes_per_token": 23040, "macs_per_token": 1.02 * parameters}  # fmt: skip
    for metric, value in sizes.items():
        unit = "bytes" if "bytes" in metric else metric
        yield Record(measurement="size", task="model", metric=metric, value=value, unit=unit, settings=dtype, **common)
    draw, shared = random.Random(f"{name} losses"), random.Random("windows")
    losses = [math.log(perplexity) + shared.gauss(0, 0.2) + draw.gauss(0, 0.02) for _ in range(141)]
    error = perplexity * np.std(losses, ddof=1) / math.sqrt(141)
    yield Record(
        measurement="perplexity", task="wikitext2 test", metric="perplexity", unit="perplexity", n=141,
        value=perplexity, standard_error=float(error), items=tuple(losses), items_hash="windows",
        settings={"sequence_length": 2048, "windows": None, **dtype},
        data={"name": "wikitext2 test", "sha256": "9f" * 32, "tokens": 289_000, "predicted": 288_000}, **common,
    )  # fmt: skip
    yield from zero_shot(name, loss, common, limit, questions)
    for batch, prompt, mode in cases:
        yield from latency(name, speed, common, batch, prompt, mode)


def zero_shot(name: str, loss: float, common: dict[str, Any], limit: int | None, questions: int) -> Iterator[Record]:
    values, errors = [], []
    for task, accuracy in TASKS.items():
        shared, own = random.Random(task), random.Random(f"{name} {task}")
        dense = [float(shared.random() < accuracy) for _ in range(questions)]
        items = [(0.0 if hit and own.random() < 2 * loss else hit) if loss else hit for hit in dense]
        for metric in ("acc", "acc_norm") if task != "winogrande" else ("acc",):
            value = sum(items) / questions
            error = math.sqrt(value * (1 - value) / questions)
            headline = "acc" if task == "winogrande" else "acc_norm"
            if metric == headline:
                values.append(value)
                errors.append(error)
            yield Record(
                measurement="zero_shot", task=task, metric=metric, value=value, unit="accuracy", n=questions,
                standard_error=error, items=tuple(items), items_hash=f"{task} {questions}",
                settings={"limit": limit, "num_fewshot": 0, "task_version": "1.0", "dtype": "bfloat16"},
                data={"name": f"{task}.jsonl", "sha256": "5e" * 32}, **common,
            )  # fmt: skip
    yield Record(
        measurement="zero_shot", task="average", metric="accuracy", value=sum(values) / 5, unit="accuracy",
        n=5 * questions, standard_error=math.hypot(*errors) / 5,
        settings={"limit": limit, "tasks": list(TASKS), "dtype": "bfloat16"}, **common,
    )  # fmt: skip


def latency(name: str, speed: float, common: dict[str, Any], batch: int, prompt: int, mode: str) -> Iterator[Record]:
    task, draw = f"batch {batch}, prompt {prompt}, new 128, {mode}", random.Random(f"{name} {batch} {mode}")
    settings = {"batch_size": batch, "prompt_tokens": prompt, "new_tokens": 128, "mode": mode, "warmup": 10, "runs": 20,
                "dtype": "bfloat16"}  # fmt: skip
    prefill, decode = (
        0.03 * batch * prompt / 12 / speed,
        3.1 * (1 + batch / 9) / speed * (0.8 if mode != "eager" else 1),
    )
    seconds_of = {"prefill": prefill, "decode": decode, "total": prefill + decode}
    for metric, mean in seconds_of.items():
        items = tuple(mean * (1 + abs(draw.gauss(0, 0.03))) for _ in range(20))
        yield Record(
            measurement="latency", task=task, metric=metric, value=sum(items) / 20, unit="s", n=20, seed=0,
            standard_error=float(np.std(items, ddof=1) / math.sqrt(20)), items=items, items_hash=f"together {task}",
            settings=settings, **common,
        )  # fmt: skip
    yield Record(measurement="memory", task=task, metric="peak", value=4.1e8 / speed, unit="bytes", settings=settings,
                 **common)  # fmt: skip
    if batch == 1:
        yield Record(
            measurement="energy", task=task, metric="energy", value=1.21 / speed, unit="Wh per 1,000 tokens", n=5,
            standard_error=0.02, settings=settings, note="CPU power is modelled by CodeCarbon, not measured", **common,
        )  # fmt: skip


def write_example(folder: Path, models: Sequence[tuple[str, float, float, float, float]] = ()) -> Path:
    """Writes an evaluation of a dense and some pruned models: name, ratio, perplexity, lost accuracy, speed."""
    models = models or [("pruned-20", 0.2, 58.97, 0.07, 1.18), ("pruned-30", 0.3, 121.4, 0.13, 1.27)]
    shape = smollm_shape()
    scores, evaluation = made_scores(shape), Evaluation()
    evaluation.add_model(entry(DENSE, shape.parameters))
    evaluation.add(measured(DENSE, shape.parameters, perplexity=17.67))
    for index, (name, ratio, perplexity, loss, speed) in enumerate(models):
        place, made, parameters = pruned_records(folder / f"model {index}", scores, ratio=ratio)
        evaluation.add_model(entry(name, parameters, str(place), made))
        evaluation.add(measured(name, parameters, perplexity=perplexity, loss=loss, speed=speed))
    evaluation.save(folder / "evaluation.json")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of a dense and two pruned models."""
    return write_report(write_example(tmp_path_factory.mktemp("compared")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny dense model and what amprune made of it."""
    folder = tmp_path_factory.mktemp("tiny")
    dense, out = folder / "dense", folder / "pruned"
    make_model(find("llama-gqa")).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n\n# Dense\n")
    scores = amprune.score(dense, calibration="builtin", samples=4)
    amprune.apply_plan(dense, amprune.make_plan(scores, ratio=0.3), out, scores=scores)
    return dense, out


@pytest.fixture
def checkpoint(tiny: tuple[Path, Path], tmp_path: Path) -> Path:
    """A pruned checkpoint with an evaluation beside its records."""
    dense, made = tiny
    out = Path(shutil.copytree(made, tmp_path / "out"))
    plan = amprune.PruningPlan.load(out / "amprune" / "plan.json")
    content = json.loads((out / "amprune" / "plan.json").read_text())
    content.pop("layers")
    evaluation = Evaluation()
    evaluation.add_model(entry("dense", plan.shape_before.parameters, str(dense)))
    mine = entry("mine", plan.shape_after.parameters, "where/it/was/before", content)
    evaluation.add_model(replace(mine, sha256=content_hash(out)))
    evaluation.add(measured("dense", plan.shape_before.parameters, perplexity=17.67))
    evaluation.add(measured("mine", plan.shape_after.parameters, perplexity=58.97, loss=0.07, speed=1.18))
    evaluation.save(out / "amprune" / "evaluation.json")
    return out


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_figures_are_rounded_to_their_errors() -> None:
    assert number(17.6712, 0.3049) == "17.7 ± 0.3"
    assert number(17.6712, 0.0149) == "17.671 ± 0.015"
    assert number(0.4532, 0.0099) == "0.453 ± 0.010"
    assert number(176703.4, 2947.0) == "176,700 ± 2,900"
    assert number(5.3e8, 2.1e7) == "5.3e+08 ± 2e+07"
    assert (number(17.6712), number(1365.9), number(5.3e8)) == ("17.67", "1,366", "5.3e+08")
    assert (number(-3.21, 0.8, signed=True), number(3.21, 0.8, signed=True)) == ("\u22123.2 ± 0.8", "+3.2 ± 0.8")
    assert number(-0.001, 0.2, signed=True) == "0.00 ± 0.20"
    assert (percent(0.2), percent(-0.153), percent(0.94, 0)) == ("20.0 %", "\u221215.3 %", "94 %")
    assert (scaled(134515008), scaled(269e6, "B"), scaled(6.7e9), scaled(12, "B")) == (
        "134.5 M", "269.0 MB", "6.700 B", "12 B")  # fmt: skip
    assert (seconds(0.0278), seconds(3.55), times(1.1789), times(59.94)) == ("27.8 ms", "3.55 s", "1.18x", "59.9x")
    assert (probability(0.0004), probability(0.0312), probability(0.5)) == ("< 0.001", "0.031", "0.50")
    assert shortened("a" * 20 + "b" * 20, 11) == "aaaaa\u2026bbbbb"


def test_the_markdown_says_what_was_measured(compared: ReportFiles) -> None:
    text = compared.markdown.read_text()
    assert text.count("# 2 models against smollm2-135m") == 1
    assert "| pruned-20 | 107.6 M | 20.0 % | 59.0 ± 1.0 |" in text
    assert "that of pruned-20 is 59.0 ± 1.0, 3.34x as high (+41.3 ± 0.7)" in text
    assert re.search(r"1\.18x measured of 1\.25x ideal, 94 % of the ideal; 15 % of the time is saved", text)
    assert re.search(r"\| pruned-20 \| \u22127\.2 ± 1\.3 \(p < 0\.001\) \|", text)
    assert re.search(r"smollm2-135m 50\.5 ± 1\.1 %; pruned-20 43\.7 ± 1\.1 % \(\u22126\.9 ± 0\.6 points\)", text)
    assert "347.5 MB (\u221215.3 %)" in text
    assert "CPU power is modelled by CodeCarbon, not measured." in text
    assert "| pruned-20 | 107,610,048 | 20.00 % | 215.2 MB |" in text
    assert "0.432 kg CO2e a kWh" in text
    assert "3 of 9 query heads of every layer were removed" in text
    assert "9f9f9f9f9f9f" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (compared.markdown.parent / target).is_file(), target
    assert all(figure.stat().st_size > 1000 for figure in compared.figures)


def test_the_average_is_compared_by_pairs(compared: ReportFiles) -> None:
    """Its error is that of five means of paired differences, far below that of two averages."""
    evaluation = Evaluation.load(compared.markdown.parent / "evaluation.json")
    records = {(r.model, r.task): r for r in evaluation.records.values() if r.metric != "acc" or r.task == "winogrande"}
    errors = []
    for task in TASKS:
        pair = zip(records["pruned-20", task].items, records[DENSE, task].items, strict=True)
        errors.append(np.std([a - b for a, b in pair], ddof=1) / math.sqrt(400))
    assert f"± {100 * math.hypot(*errors) / 5:.1f} points)" in compared.markdown.read_text()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write_example(tmp_path / "a", [("pruned", 0.3, 58.97, 0.07, 1.18)])
    first = write_report(tmp_path / "a")
    before = files_in(tmp_path / "a")
    write_report(tmp_path / "a")
    assert files_in(tmp_path / "a") == before
    assert b"Date" not in first.figures[0].read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_figures_that_are_no_longer_drawn_go(tmp_path: Path) -> None:
    write_example(tmp_path)
    files = write_report(tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"holiday")
    shutil.rmtree(tmp_path / "model 0")
    shutil.rmtree(tmp_path / "model 1")
    left = write_report(tmp_path)
    assert {path.stem for path in files.figures} - {path.stem for path in left.figures} == {"heads", "neurons"}
    assert set((tmp_path / "figures").iterdir()) == {*left.figures, tmp_path / "figures" / "mine.png"}


@pytest.mark.usefixtures("without_png")
def test_a_checkpoint_gets_its_report_and_its_card(checkpoint: Path) -> None:
    files = write_report(checkpoint)
    assert files.markdown == checkpoint / "amprune" / "report.md"
    assert {path.stem for path in files.figures} == {"perplexity-1", "latency", "parameters", "heads", "neurons"}
    report, card = files.markdown.read_text(), (checkpoint / "README.md").read_text()
    assert "# mine: dense with 30.1 % of its parameters removed" in report
    assert "| logits | passed |" in report
    assert report.count("Verified: its logits equal") == card.count("Verified: its logits equal") == 1
    assert "59.0 ± 1.0" in card
    assert "](amprune/figures/heads.png)" in card
    for target in re.findall(r"\]\((amprune/[^)]+)\)", card):
        assert (checkpoint / target).is_file(), target
    assert files.card == checkpoint / "README.md"
    assert files.card_kept is None
    write_report(checkpoint)
    assert (checkpoint / "README.md").read_text() == card, "renewing twice is renewing once"


@pytest.mark.usefixtures("undrawn")
def test_the_front_matter_is_what_the_hub_reads(checkpoint: Path) -> None:
    file = checkpoint / "README.md"
    file.write_text(file.read_text().replace("- pruned\n", "- pruned\n- mine\n", 1))
    write_report(checkpoint)
    front = metadata_load(file)
    assert front is not None
    assert (front["license"], front["language"], front["library_name"]) == ("mit", ["en"], "transformers")
    assert front["tags"] == ["pruned", "mine", "amprune"]
    assert front["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    data = ModelCard.load(file).data
    assert data.eval_results is not None
    found = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    assert found["wikitext2 test", "perplexity"].metric_value == 58.97
    assert found["wikitext2 test", "perplexity"].dataset_type == "Salesforce/wikitext"
    assert {name for name, _ in found} == {"wikitext2 test", "average", *TASKS}
    names = [(result.dataset_type, result.dataset_config, result.metric_name) for result in data.eval_results]
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("undrawn")
def test_a_foreign_card_is_kept(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("# My own words\n")
    files = write_report(checkpoint)
    assert (checkpoint / "README.md").read_text() == "# My own words\n"
    assert files.card is None
    assert "was not written by amprune" in str(files.card_kept)
    (checkpoint / "README.md").unlink()
    assert write_report(checkpoint).card == checkpoint / "README.md"
    assert read_card(checkpoint).dense == "dense"


@pytest.mark.usefixtures("without_png")
def test_without_an_evaluation_the_records_are_drawn(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny[1], tmp_path / "out"))
    files = write_report(out)
    text = files.markdown.read_text()
    assert f"amprune evaluate DENSE {out} -o {out}/amprune/evaluation.json" in text
    assert {path.stem for path in files.figures} == {"heads", "neurons", "parameters"}
    card = (out / "README.md").read_text()
    assert "amprune evaluate" not in card
    assert "## Results" in card
    assert "model-index" not in card
    assert read_card(out).dense == "dense"


@pytest.mark.usefixtures("without_png")
def test_a_checkpoint_without_scores_or_verification_is_drawn_too(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny[1], tmp_path / "out"))
    (out / "amprune" / "scores.safetensors").unlink()
    (out / "amprune" / "verification.json").unlink()
    files = write_report(out)
    assert {path.stem for path in files.figures} == {"parameters"}
    assert "no record of a verification" in files.markdown.read_text()
    assert "Verified" not in (out / "README.md").read_text()


@pytest.mark.usefixtures("without_png")
def test_one_model_alone(tmp_path: Path) -> None:
    evaluation = Evaluation()
    evaluation.add_model(entry("only", 134_515_008))
    evaluation.add(measured("only", 134_515_008, perplexity=17.67))
    evaluation.save(tmp_path / "evaluation.json")
    text = write_report(tmp_path).markdown.read_text()
    assert "# only, measured" in text
    assert "17.67 ± 0.30" in text
    assert not any(word in text for word in ("speedup |", "difference |", "None", "nan"))


@pytest.mark.parametrize("kind", ["size", "perplexity", "zero_shot", "latency", "memory", "energy"])
@pytest.mark.usefixtures("without_png")
def test_any_measurement_may_be_missing_or_alone(kind: str, tmp_path: Path) -> None:
    write_example(tmp_path, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    full = Evaluation.load(tmp_path / "evaluation.json")
    for name, keep in (("without", False), ("alone", True)):
        evaluation = Evaluation(models=full.models)
        evaluation.add(record for record in full.records.values() if (record.measurement == kind) is keep)
        evaluation.save(tmp_path / name / "evaluation.json")
        text = write_report(tmp_path / name).markdown.read_text()
        assert not re.search(r"\b(None|nan|inf)\b", text)


@pytest.mark.usefixtures("undrawn")
def test_other_settings_are_never_set_against_each_other(tmp_path: Path) -> None:
    write_example(tmp_path, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    evaluation = Evaluation.load(tmp_path / "evaluation.json")
    parameters = evaluation.models["pruned"].parameters
    limited = measured("pruned", parameters, perplexity=58.97, loss=0.07, limit=100, questions=100, cases=())
    evaluation.add(record for record in limited if record.measurement == "zero_shot")
    evaluation.save(tmp_path / "evaluation.json")
    text = write_report(tmp_path).markdown.read_text()
    assert "piqa, limit 100, acc\\_norm" in text or "piqa, limit 100, acc_norm" in text
    assert "piqa, no limit, acc_norm" in text
    assert "over the first 100 items" in text
    difference = next(line for line in text.splitlines() if line.startswith("| pruned |") and "(p " in line)
    assert difference.count("(p ") == 5, "only the unlimited figures have a partner"


@pytest.mark.usefixtures("undrawn")
def test_other_items_are_compared_without_pairs(tmp_path: Path) -> None:
    write_example(tmp_path, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    content = json.loads((tmp_path / "evaluation.json").read_text())
    for record in content["records"]:
        if record["model"] == "pruned" and "items_hash" in record:
            record["items_hash"] += " of another run"
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    text = write_report(tmp_path).markdown.read_text()
    assert "+41.3 ± 1.0 (not paired)" in text
    assert "1.18x, not paired" in text
    assert "comparisons are not paired" in text
    assert "(p " not in text


@pytest.mark.usefixtures("undrawn")
def test_the_baseline_can_be_another(tmp_path: Path) -> None:
    text = write_report(write_example(tmp_path), baseline="pruned-30").markdown.read_text()
    assert "# 2 models against pruned-30" in text
    assert "Difference from pruned-30 in percentage points" in text


@pytest.mark.usefixtures("undrawn")
def test_costs_follow_the_workload(tmp_path: Path) -> None:
    write_example(tmp_path, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    workload = {"tokens_per_day": 5e6, "price_per_hour": 2.0, "currency": "EUR", "grid_intensity": 0.1, "days": 7}
    text = write_report(tmp_path, **workload).markdown.read_text()
    assert "7 days of 5,000,000 tokens a day" in text
    assert "2 EUR an hour" in text
    assert "0.1 kg CO2e a kWh" in text


NASTY = "<script>alert(1)</script>|`$x_$*[a](b)\"'&amp;"


@pytest.mark.usefixtures("undrawn")
def test_names_are_escaped(tmp_path: Path) -> None:
    files = write_report(write_example(tmp_path, [(NASTY, 0.3, 58.97, 0.07, 1.18)]))
    html, text = files.html.read_text(), files.markdown.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("| &lt;script>")]
    assert rows
    header = next(line for line in text.splitlines() if line.startswith("| model | parameters"))
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:1]} == {len(re.findall(r"\|", header))}
    assert all("alert(1)" not in path.name for path in files.figures)


def bad_inputs(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Writes what cannot be drawn: arguments of write_report and what the error says."""
    empty, damaged, other, numbers, nameless = (
        folder / n for n in ("empty", "damaged", "other", "numbers", "nameless")
    )
    for place in (empty, damaged, other, nameless):
        place.mkdir(parents=True)
    (damaged / "evaluation.json").write_text('{"format": "amprune evaluation 1", "models": [')
    (other / "evaluation.json").write_text('{"results": {}}')
    Evaluation().save(nameless / "evaluation.json")
    write_example(numbers, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    good = Path(shutil.copytree(numbers, folder / "good"))
    content = json.loads((numbers / "evaluation.json").read_text())
    content["records"][-1]["standard_error"] = "many"
    (numbers / "evaluation.json").write_text(json.dumps(content))
    return {
        "no folder": ({"folder": folder / "none"}, "is no folder"),
        "nothing to draw": ({"folder": empty}, "amprune evaluate DENSE PRUNED"),
        "not JSON": ({"folder": damaged}, "not JSON"),
        "another format": ({"folder": other}, "format"),
        "no models": ({"folder": nameless}, "names no model"),
        "no number": ({"folder": numbers}, "the file is damaged"),
        "unknown baseline": ({"folder": good, "baseline": "x"}, f"models are {DENSE}, pruned"),
        "no such evaluation": ({"folder": good, "evaluation": folder / "x.json"}, "x.json is missing"),
    }


@pytest.mark.parametrize(
    "case",
    ["no folder", "nothing to draw", "not JSON", "another format", "no models", "no number", "unknown baseline",
     "no such evaluation"],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    arguments, expected = bad_inputs(tmp_path)[case]
    before = files_in(tmp_path)
    with pytest.raises(ReportError, match=re.escape(expected)):
        write_report(**arguments)
    assert files_in(tmp_path) == before


def test_an_evaluation_of_other_models_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_example(tmp_path / "others")
    with pytest.raises(ReportError, match="has no figures of"):
        write_report(checkpoint, evaluation=tmp_path / "others" / "evaluation.json")


def test_a_damaged_plan_is_said(checkpoint: Path) -> None:
    (checkpoint / "amprune" / "plan.json").write_text("{}")
    with pytest.raises(ReportError, match="records are damaged"):
        write_report(checkpoint)


def test_a_report_of_someone_else_is_kept(tmp_path: Path) -> None:
    write_example(tmp_path, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    (tmp_path / "report.md").write_text("my own\n")
    before = files_in(tmp_path)
    with pytest.raises(ReportError, match="was not written by amprune report"):
        write_report(tmp_path)
    assert files_in(tmp_path) == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("successes", [0, 3, 7])
def test_a_full_disk_leaves_nothing_half_written(
    successes: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole, calls = files_in(checkpoint), Path.write_bytes, itertools.count()

    def fail(self: Path, data: bytes) -> int:
        if next(calls) < successes:
            return whole(self, data)
        whole(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ReportError, match="No space left"):
        write_report(checkpoint)
    assert files_in(checkpoint) == before
    assert not (checkpoint / "amprune" / "figures").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    write_example(tmp_path, [("pruned", 0.2, 58.97, 0.07, 1.18)])
    (tmp_path / "figures").write_text("not a folder")
    before = files_in(tmp_path)
    with pytest.raises(ReportError, match="cannot write the report"):
        write_report(tmp_path)
    assert files_in(tmp_path) == before


@pytest.mark.usefixtures("without_png")
def test_groups_within_and_random_orders_are_drawn(tmp_path: Path) -> None:
    """Large maps: 80 layers of 64 heads in 8 groups, heads removed in three ways."""
    shape = smollm_shape(layers=80, heads=64, groups=8, neurons=512, hidden=4096)
    scores, evaluation = made_scores(shape), Evaluation()
    evaluation.add_model(entry("dense", shape.parameters))
    options: dict[str, dict[str, Any]] = {
        "groups": {"heads_mode": "groups"}, "within": {"heads_mode": "within"}, "random": {"order": "random"},
    }  # fmt: skip
    for name, choice in options.items():
        folder, made, parameters = pruned_records(tmp_path / name, scores, ratio=0.25, **choice)
        evaluation.add_model(entry(name, parameters, str(folder), made))
    evaluation.save(tmp_path / "evaluation.json")
    files = write_report(tmp_path)
    text = files.markdown.read_text()
    assert {path.stem for path in files.figures} == {"parameters", "heads", "heads-2", "heads-3", "neurons"}
    assert "random kept others than the best, on purpose" in text


MANY = [(f"m{i} {'a very long name of a pruned model ' * 2}{i}" if i % 2 else f"pruned-{i}", 0.05 * i,
         17.67 * 10 ** (i * i / 9), 0.02 * i, 1 + 0.05 * i) for i in range(1, 10)]  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    ("models", "trained"),
    [([], ()), (MANY, ()), ([(NASTY, 0.3, 58.97, 0.07, 1.18)], (0,)), (MANY, range(9))],
    ids=["two", "ten", "nasty", "ten recovered"],
)
@pytest.mark.usefixtures("without_png")
def test_a_browser_shows_it_whole_on_a_desk_and_on_a_phone(
    models: list[Any], trained: Sequence[int], tmp_path: Path
) -> None:
    folder = write_example(tmp_path, models)
    for index in trained:
        train_on_paper(folder / f"model {index}", seed=index)
    page_file = write_report(folder).html
    check_in_browser(page_file)


@pytest.mark.usefixtures("without_png")
def test_a_model_may_be_larger_or_slower_and_have_any_name(tmp_path: Path) -> None:
    """Names that the font of the figures lacks, a pruned baseline, a dense model that is larger than it."""
    write_example(tmp_path, [("模型", 0.3, 17.67, 0.0, 0.9), ("$", 0.2, 17.0, 0.0, 1.0)])
    text = write_report(tmp_path, baseline="模型").markdown.read_text()
    assert re.search(r"\| smollm2-135m \| 134\.5 M \| \u221242\.9 % \|", text)
    assert "| 模型 | 94.15 M |" in text


def test_the_html_holds_its_figures(compared: ReportFiles) -> None:
    html = compared.html.read_text()
    encoded = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    drawn = [path.read_bytes() for path in compared.figures if path.suffix == ".svg"]
    assert [base64.b64decode(data) for data in encoded] == drawn
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)


TRAINING = {
    "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.05, "full": False, "load_in_4bit": False, "learning_rate": 3e-4,
    "epochs": 2.0, "max_steps": None, "batch_size": 1, "gradient_accumulation": 16, "max_length": 512, "packing": False,
    "temperature": 1.0, "teacher_weight": 0.5,
}  # fmt: skip
TRAINED = "Trained from pruned by LoRA (rank 8, alpha 16) on 1,234 samples of alpaca"


def record_of(*, steps: int = 200, teacher: str | None = None, **settings: Any) -> dict[str, Any]:
    """What `recovery.json` holds."""
    data = {"name": "alpaca", "training": 1234, "tokens": 98765, "validation": 25, "truncated": 3, "skipped": 0}
    return {
        "format": 1, "recovered_from": "pruned", "data": data, "settings": {**TRAINING, **settings}, "teacher": teacher,
        "steps": steps, "validation_before": 4.0717, "validation_after": 2.3104, "rounding": 0.0023,
        "versions": {"amprune": "0.1.0"},
    }  # fmt: skip


def train_on_paper(folder: Path, *, seed: int = 0, every: int = 2, **choices: Any) -> Path:
    """Leaves the records of a training beside a model, the log's last line half-written."""
    record, draw = record_of(**choices), random.Random(seed)
    steps = record["steps"]
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "validation_loss": 4.0717}]
    for step in range(every, steps + 1, every):
        loss = 2.3 + 1.7 * math.exp(-8 * step / steps)
        lines.append({"step": step, "epoch": 2 * step / steps, "loss": loss + draw.gauss(0, 0.1), "learning_rate": 1e-4,
                      "grad_norm": 1.0, "tokens_per_second": 800.0 + step % 3})  # fmt: skip
        if step % (steps // 5) == 0:
            lines.append({"step": step, "epoch": 2 * step / steps, "validation_loss": loss + 0.01})
    (folder / "amprune").mkdir(parents=True, exist_ok=True)
    (folder / "amprune" / "recovery.json").write_text(json.dumps(record))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "amprune" / "training.jsonl").write_text(text + '{"step": 9999, "loss": 1')
    return folder


def write_card_of(folder: Path, record: dict[str, Any], *, source: Path) -> None:
    """Keeps a record of a training, and writes the card that tells of it."""
    (folder / "amprune" / "recovery.json").write_text(json.dumps(record))
    write_card(folder, source=open_source(source))


@pytest.fixture
def recovered(tiny: tuple[Path, Path], tmp_path: Path) -> Path:
    """A pruned checkpoint whose weights were changed, with the records and the card of a training."""
    out = Path(shutil.copytree(tiny[1], tmp_path / "recovered"))
    (out / "amprune" / "verification.json").unlink()
    weights = {name: tensor + 0.01 * tensor.mean() for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    train_on_paper(out)
    write_card_of(out, record_of(), source=tiny[1])
    return out


def test_the_card_of_a_recovered_model_tells_of_the_training(recovered: Path, tiny: tuple[Path, Path]) -> None:
    card, front = (recovered / "README.md").read_text(), metadata_load(recovered / "README.md")
    before = metadata_load(tiny[1] / "README.md")
    assert front is not None
    assert before is not None
    assert front == {**before, "tags": ["pruned", "amprune", "recovered"]}
    assert (front["license"], front["language"]) == ("mit", ["en"])
    assert "# dense, 30.1 % pruned and recovered" in card
    assert f"- {TRAINED} (98,765 tokens, at most 512 in one): 200 steps of 1 x 16" in card
    assert "(2 passes over the data), at a learning rate of 0.0003" in card
    assert "Validation loss: 4.072 before the training, 2.310 after it (25 samples held out)." in card
    assert "equal those of the model with its adapters but for rounding to the checkpoint's dtype (2.3e-03 of" in card
    assert "Pruned without any training" not in card
    assert "Verified: its logits equal" not in card
    assert "should be measured before use. It was trained on alpaca, whose licence applies" in card
    assert "CC BY-NC 4.0" in card
    assert "plan.json, recipe.yaml, recovery.json, scores.safetensors, training.jsonl" in card
    assert "Taught" not in card
    assert read_card(recovered).dense == "dense"


@pytest.mark.parametrize(
    ("choices", "said", "unsaid"),
    [
        ({"full": True}, ["by full fine-tuning on", "Rounding the trained weights"], ["LoRA", "adapters"]),
        ({"load_in_4bit": True, "max_steps": 200}, ["alpha 16, frozen weights in four bits)"], ["passes over"]),
        ({"teacher": "/home/me/models/dense", "teacher_weight": 0.3, "temperature": 2.0},
         ["Taught by dense: 30 % of the loss", "a temperature of 2;"], ["/home/me"]),
        ({"packing": True}, ["1,234 packed sequences of alpaca"], []),
    ],
    ids=["full", "four bits", "teacher", "packed"],
)  # fmt: skip
def test_the_card_names_the_way_of_training(
    choices: dict[str, Any], said: list[str], unsaid: list[str], recovered: Path, tiny: tuple[Path, Path]
) -> None:
    write_card_of(recovered, record_of(**choices), source=tiny[1])
    card = (recovered / "README.md").read_text()
    assert [words for words in said if words not in card] == []
    assert [words for words in unsaid if words in card] == []


def test_a_recovered_model_without_validation_says_nothing_of_it(recovered: Path, tiny: tuple[Path, Path]) -> None:
    record = {**record_of(), "validation_before": None, "validation_after": None}
    write_card_of(recovered, record, source=tiny[1])
    assert "alidation loss" not in (recovered / "README.md").read_text().replace("the validation loss is all", "")
    (recovered / "amprune" / "training.jsonl").write_text('{"step": 2, "loss": 3.5}\n{"step": 4, "loss": 3.25}\n')
    text = write_report(recovered).markdown.read_text()
    section = text[text.index("## Recovery") :]
    assert "alidation" not in section[: section.index("\n## ", 5)]
    assert "training loss 3.500 at step 2, 3.250 at step 4" in section


@pytest.mark.usefixtures("undrawn")
def test_results_of_the_pruned_model_are_not_those_of_the_recovered(recovered: Path, checkpoint: Path) -> None:
    write_report(checkpoint)
    write_card_of(recovered, record_of(), source=checkpoint)
    front = metadata_load(recovered / "README.md")
    assert front is not None
    assert "model-index" not in front
    assert front["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "## Results" not in (recovered / "README.md").read_text()


def test_a_foreign_card_lends_its_licence_and_base(recovered: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "theirs"
    pruned.mkdir()
    front = "---\nlicense: gemma\nlanguage: de\nbase_model: [a/b]\nmodel-index: []\nwidget: x\ntags: [x]\n---\n"
    (pruned / "README.md").write_text(front)
    write_card_of(recovered, record_of(), source=pruned)
    assert metadata_load(recovered / "README.md") == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pruned", "amprune", "recovered"],
        "license": "gemma", "language": "de", "base_model": ["a/b"],
    }  # fmt: skip
    assert "# a/b, 30.1 % pruned and recovered" in (recovered / "README.md").read_text()


@pytest.mark.usefixtures("without_png")
def test_a_dense_model_that_was_trained_gets_a_plain_card_and_a_report(
    recovered: Path, tiny: tuple[Path, Path]
) -> None:
    for name in ("plan.json", "scores.safetensors"):
        (recovered / "amprune" / name).unlink()
    record = {**record_of(), "recovered_from": "dense"}
    write_card_of(recovered, record, source=tiny[0])
    card, front = (recovered / "README.md").read_text(), metadata_load(recovered / "README.md")
    assert front is not None
    assert (front["tags"], front["license"]) == (["amprune", "recovered"], "mit")
    assert "# dense, trained" in card
    assert "Trained from dense by LoRA" in card
    assert not re.search("pruning|pruned", card.replace("structured pruning toolkit", ""))
    files = write_report(recovered)
    assert "# recovered: dense, trained" in files.markdown.read_text()
    assert files.card is not None
    assert card.split("```python")[0].split("- `amprune/`")[0] in files.card.read_text()
    with pytest.raises(VerificationError, match="amprune did not prune"):
        amprune.verify(recovered, dense=tiny[0])


@pytest.mark.usefixtures("without_png")
def test_the_report_of_a_recovered_model(recovered: Path) -> None:
    files = write_report(recovered)
    text = files.markdown.read_text()
    assert "# recovered: dense with 30.1 % of its parameters removed, then trained" in text
    assert {path.stem for path in files.figures} == {"heads", "neurons", "parameters", "training"}
    assert text.count(TRAINED) == 1
    assert "| recovered | LoRA (rank 8, alpha 16) | 200 | 1,234 | 4.072 | 2.310 | \u22121.761 | 801.0 |" in text
    assert "validation loss 4.072 at step 0, 2.311 at step 200" in text
    assert "9,999" not in text
    assert "not trained after pruning" not in text
    assert "recovered: It was trained on alpaca, whose licence" in text
    assert "its logits are no longer those of the masked dense model" in text


@pytest.mark.usefixtures("undrawn")
def test_renewing_the_card_keeps_what_it_says_of_the_training(recovered: Path) -> None:
    before = (recovered / "README.md").read_text()
    write_report(recovered)
    card = (recovered / "README.md").read_text()
    assert card.count(TRAINED) == before.count(TRAINED) == 1
    assert card.count("Validation loss: 4.072 before") == 1
    assert card.count("whose licence applies") == 1
    assert "](amprune/figures/training.png)" in card
    assert "Pruned without any training" not in card
    assert "should be measured before use" in card
    assert metadata_load(recovered / "README.md") == yaml.safe_load(before.split("---")[1])
    write_report(recovered)
    assert (recovered / "README.md").read_text() == card


@pytest.mark.usefixtures("undrawn")
def test_a_measured_recovered_model_is_told_from_the_pruned_one(
    recovered: Path, tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    """Both have the same plan; where the folder has moved, its content tells which figures are its own."""
    evaluation = Evaluation()
    parameters = amprune.PruningPlan.load(recovered / "amprune" / "plan.json").shape_after.parameters
    for name, folder, perplexity in (("pruned", tiny[1], 58.97), ("mine", recovered, 24.25)):
        made = replace(entry(name, parameters), sha256=content_hash(folder))
        evaluation.add_model(replace(made, source="gone" if name == "mine" else str(folder)))
        evaluation.add(measured(name, parameters, perplexity=perplexity, cases=()))
    evaluation.save(recovered / "amprune" / "evaluation.json")
    text = write_report(recovered).markdown.read_text()
    assert "# mine: pruned, trained" in text
    assert "Not trained after pruning: pruned." in text
    card = (recovered / "README.md").read_text()
    assert "24.2" in card
    assert "the results above tell of its quality" in card
    assert "is all that is known" not in card
    evaluation.save(tmp_path / "pruned only.json")
    content = json.loads((tmp_path / "pruned only.json").read_text())
    content["models"] = [model for model in content["models"] if model["name"] == "pruned"]
    content["records"] = [found for found in content["records"] if found["model"] == "pruned"]
    (tmp_path / "pruned only.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match="has no figures of"):
        write_report(recovered, evaluation=tmp_path / "pruned only.json")


RUNS = [("pruned-20", 0.2, 58.97, 0.07, 1.18), ("recovered-20", 0.2, 24.3, 0.02, 1.18),
        ("pruned-30", 0.3, 121.4, 0.13, 1.27), ("recovered-30", 0.3, 34.3, 0.06, 1.27)]  # fmt: skip


@pytest.mark.usefixtures("without_png")
def test_several_recovered_models_share_a_figure(tmp_path: Path) -> None:
    write_example(tmp_path, RUNS)
    train_on_paper(tmp_path / "model 1")
    train_on_paper(tmp_path / "model 3", seed=1, teacher="dense")
    files = write_report(tmp_path)
    text = files.markdown.read_text()
    assert [path.name for path in files.figures if path.stem == "training"] == ["training.svg", "training.png"]
    assert f"- recovered-20: {TRAINED}" in text
    assert "LoRA (rank 8, alpha 16), with a teacher | 200" in text
    assert "With a teacher, the training loss holds the divergence from it" in text
    assert "Not trained after pruning: pruned-20, pruned-30." in text
    assert "recovered-20: It was trained on alpaca" in text
    assert files.figures == write_report(tmp_path).figures


def test_lines_join_models_that_differ_in_the_ratio_alone(tmp_path: Path) -> None:
    write_example(tmp_path, RUNS)
    assert _lines(read_inputs(tmp_path)) == []  # Two models of each ratio: what else differs is not known.
    train_on_paper(tmp_path / "model 1")
    train_on_paper(tmp_path / "model 3", seed=1)
    assert _lines(read_inputs(tmp_path)) == [["pruned-20", "pruned-30"], ["recovered-20", "recovered-30"]]
    train_on_paper(tmp_path / "model 3", seed=1, lora_rank=64)
    assert _lines(read_inputs(tmp_path)) == [["pruned-20", "pruned-30"]]


@pytest.mark.usefixtures("without_png")
def test_models_of_one_run_are_drawn_once(tmp_path: Path) -> None:
    write_example(tmp_path, [("epoch-1", 0.2, 24.3, 0.02, 1.18), ("epoch-2", 0.2, 23.3, 0.02, 1.18)])
    for index in range(2):
        train_on_paper(tmp_path / f"model {index}")
    text = write_report(tmp_path).markdown.read_text()
    assert "epoch-1, epoch-2: training loss" in text


GOOD = (
    '{"step": 1, "loss": 3.5, "tokens_per_second": 10}\n{"step": 2, "loss": 3.25}\n{"step": 2, "validation_loss": 3}\n'
)


@pytest.mark.parametrize(
    "damage",
    ['{"step": 3, "lo', "[]", "null", '{"step": "3", "loss": 1}', '{"loss": 1}', '{"step": 3, "loss": NaN}',
     '{"step": 3, "loss": true}', '{"step": 3, "validation_loss": Infinity}', "\x00\x00", "",
     '{"step": 3, "loss": null}'],
)  # fmt: skip
def test_damaged_lines_of_a_log_are_left_out(damage: str, tmp_path: Path) -> None:
    (tmp_path / "amprune").mkdir()
    file = tmp_path / "amprune" / "training.jsonl"
    file.write_text(f"{damage}\n{GOOD}{damage}")
    assert read_training_log(tmp_path) == TrainingLog(((1, 3.5), (2, 3.25)), ((2, 3.0),), 10.0)
    file.write_bytes(b"\xff\xfe\n" + GOOD.encode() + b'{"step": 3, "loss": 1.\xc3')
    assert len(read_training_log(tmp_path).training) == 2


def test_a_log_may_be_missing(recovered: Path) -> None:
    (recovered / "amprune" / "training.jsonl").unlink()
    files = write_report(recovered)
    assert "training" not in {path.stem for path in files.figures}
    assert TRAINED in files.markdown.read_text()


def bad_records() -> dict[str, str]:
    good = record_of()
    return {
        "not JSON": json.dumps(good)[:-9],
        "no object": "[]",
        "another format": json.dumps({**good, "format": 2}),
        "no steps": json.dumps({name: value for name, value in good.items() if name != "steps"}),
        "loss is a word": json.dumps({**good, "validation_after": "low"}),
        "loss is NaN": json.dumps({**good, "validation_after": float("nan")}),
        "no settings": json.dumps({**good, "settings": {}}),
        "rank is true": json.dumps({**good, "settings": {**TRAINING, "lora_rank": True}}),
        "no data": json.dumps({**good, "data": None}),
    }


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("damage", bad_records())
def test_a_damaged_record_of_a_training_is_said(damage: str, recovered: Path, tmp_path: Path) -> None:
    """It stops the report of its own model; beside others it is named, and nothing is claimed of the training."""
    (recovered / "amprune" / "recovery.json").write_text(bad_records()[damage])
    before = files_in(recovered)
    with pytest.raises(ReportError, match="records are damaged"):
        write_report(recovered)
    assert files_in(recovered) == before
    write_example(tmp_path / "two", [("mine", 0.2, 58.97, 0.07, 1.18)])
    train_on_paper(tmp_path / "two" / "model 0")
    shutil.copy(recovered / "amprune" / "recovery.json", tmp_path / "two" / "model 0" / "amprune")
    text = write_report(tmp_path / "two").markdown.read_text()
    assert "The record of the training is damaged: mine." in text
    assert "not trained" not in text.lower()


def test_a_running_mean_keeps_the_mean_of_a_line() -> None:
    values = np.arange(30.0)
    assert np.allclose(running_mean(values, 3)[3:-3], values[3:-3])
    assert running_mean(values, 3)[0] == 1.5
    assert np.allclose(running_mean(np.full(30, 2.5), 7), 2.5)


def test_labels_in_a_column_stand_apart_in_order() -> None:
    centres, heights = [10.0, 11.0, 12.0, 95.0, 99.0], [10.0] * 5
    found = _apart(centres, heights, 0.0, 100.0)
    assert all(above - below >= 10 for below, above in itertools.pairwise(found))
    assert found[-1] == 95
    assert found[0] == 10
    full = _apart(centres, [30.0] * 5, 0.0, 100.0)
    assert all(above - below >= 30 for below, above in itertools.pairwise(full))


def change_weight(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: change(weights[name])}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_recovered_model_is_verified_but_for_its_logits(recovered: Path, tiny: tuple[Path, Path]) -> None:
    report = amprune.verify(recovered, dense=tiny[0])
    found = {check.name: check for check in report.checks}
    assert list(found) == ["groups", "config", "dtype and ties", "files", "tokenizer", "reload", "weights", "logits"]
    assert report.passed
    assert report.logit_difference is None
    expected = "finite; not compared: the weights were trained after pruning (recovery.json)"
    assert found["logits"].detail == expected


def test_a_pruned_model_is_still_compared(recovered: Path, tiny: tuple[Path, Path]) -> None:
    assert [check.name for check in amprune.verify(tiny[1], dense=tiny[0]).checks][-3:] == [
        "reload",
        "tensors",
        "logits",
    ]
    (recovered / "amprune" / "recovery.json").unlink()
    found = {check.name: check for check in amprune.verify(recovered, dense=tiny[0]).checks if not check.passed}
    assert set(found) == {"tensors", "logits"}
    assert "logits differ from those of the masked dense model" in found["logits"].detail


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_recovered_model_with_one_value_that_is_not_finite_fails(
    value: float, recovered: Path, tiny: tuple[Path, Path]
) -> None:
    """Also in the embedding of a token that the logits are not computed of."""
    weights = load_file(recovered / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] = value
    save_file(weights, recovered / "model.safetensors", metadata={"format": "pt"})
    found = {check.name: check for check in amprune.verify(recovered, dense=tiny[0]).checks if not check.passed}
    assert "model.embed_tokens.weight holds values that are not finite" in found["weights"].detail


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda weight: weight[:, :-1].contiguous(), "reload"),
        (lambda weight: weight.bfloat16(), "dtype and ties"),
    ],
    ids=["shape", "dtype"],
)
def test_a_recovered_model_of_another_shape_or_dtype_fails(
    change: Callable[[torch.Tensor], torch.Tensor], failing: str, recovered: Path, tiny: tuple[Path, Path]
) -> None:
    change_weight(recovered, change)
    report = amprune.verify(recovered, dense=tiny[0])
    assert not report.passed
    assert failing in {check.name for check in report.checks if not check.passed}


def test_a_damaged_record_excuses_no_comparison(recovered: Path, tiny: tuple[Path, Path]) -> None:
    (recovered / "amprune" / "recovery.json").write_text("{}")
    found = {check.name: check for check in amprune.verify(recovered, dense=tiny[0]).checks if not check.passed}
    assert set(found) == {"weights", "logits"}
    assert "format is null" in found["logits"].detail


def test_what_recover_writes_has_a_card_a_proof_and_a_report(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    texts = [f"Cat number {index} sat on the mat." for index in range(12)]
    settings = amprune.RecoverySettings(
        preset="paper", max_steps=2, gradient_accumulation=1, logging_steps=1, learning_rate=1e-2
    )
    amprune.recover(tiny[1], tmp_path / "out", data=texts, settings=settings, teacher=tiny[0], device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained by LoRA (rank 8, alpha 16) on 11 samples of texts" in card
    assert "Taught by dense" in card
    assert "(1 sample held out)" in card
    front = metadata_load(tmp_path / "out" / "README.md")
    assert front is not None
    assert front["license"] == "mit"
    assert amprune.verify(tmp_path / "out", dense=tiny[0]).passed
    files = write_report(tmp_path / "out")
    assert "training" in {path.stem for path in files.figures}
    assert "Trained by LoRA" in files.markdown.read_text()


@pytest.mark.parametrize(("criterion", "shift", "said"), [("flap", 1.0, "by the criterion flap"),
                                                          ("reversed", 100.0, "The most important")])  # fmt: skip
@pytest.mark.usefixtures("without_png")
def test_scores_of_other_criteria_are_named_and_drawn_though_they_are_negative(
    criterion: str, shift: float, said: str, tmp_path: Path
) -> None:
    scores = made_scores(smollm_shape(layers=6))
    shifted = [LayerScores(*(values - np.float32(shift) for values in vars(layer).values())) for layer in scores.layers]
    scores = replace(scores, layers=tuple(shifted), criterion=criterion)
    pruned_records(tmp_path / "out", scores, ratio=0.2)
    report = write_report(tmp_path / "out").markdown.read_text()
    assert f"Heads and neurons were scored by the criterion {criterion}." in report
    assert said in report
    assert "adds to the residual stream" not in report
    assert "AMP" not in report
    for figure in (heads_figure(scores, make_plan(scores, ratio=0.2)), neurons_figure(scores, [], colours={})):
        labels = {axes.get_ylabel() for axes in figure.axes}
        assert "score / mean magnitude of its layer" in labels
    lines = neurons_figure(scores, [], colours={}).axes[0].lines
    assert len(lines) == scores.shape.num_layers
    assert all(len(line.get_xdata()) > 100 for line in lines)
