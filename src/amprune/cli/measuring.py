"""What pruning cost and what it gained: evaluate and report."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amprune.cli.display import emit, progress, reported, show_evaluation, show_report
from amprune.cli.options import (
    DataDir,
    Debug,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Limit,
    Revision,
    Seed,
    Texts,
    TrustRemoteCode,
    Windows,
    app,
    options_of,
    words,
)
from amprune.errors import EvaluationError


def numbers(text: str, option: str) -> list[int]:
    """Reads `1,8,32`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise EvaluationError(f"{option} is {text!r}, expected whole numbers such as 1 or 1,8,32") from None


@app.command("evaluate")
def evaluate_command(
    models: Annotated[
        list[str], typer.Argument(help="MODEL or NAME=MODEL each; the first is the baseline.", metavar="MODEL...")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Evaluation to write; figures are added to one that is there.")
    ] = Path("evaluation.json"),
    measure: Annotated[
        str, typer.Option(help="Any of perplexity, zero_shot, latency, energy, with commas.")
    ] = "perplexity,zero_shot,latency,energy",
    data_dir: DataDir = None,
    text: Texts = None,
    split: Annotated[
        Literal["test", "validation"], typer.Option(help="Split of WikiText-2; tune on validation.")
    ] = "test",
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window of perplexity.")] = 2048,
    windows: Windows = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")
    ] = "winogrande,piqa,arc_easy,arc_challenge,hellaswag",
    limit: Limit = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time in tasks; halved when memory runs out.")] = 32,
    latency_batch: Annotated[str, typer.Option(help="Batch sizes to time, such as 1,8.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths to time, such as 12,512.")] = "12",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate in a timed run.")] = 128,
    mode: Annotated[str, typer.Option(help="eager, compile (torch.compile, static cache), or both: eager,compile.")] = (
        "eager"
    ),
    warmup: Annotated[int, typer.Option(help="Runs of each model before the timed ones.")] = 10,
    runs: Annotated[int, typer.Option(help="Timed runs of each model.")] = 20,
    energy_seconds: Annotated[float, typer.Option(help="Length of each of the five blocks for energy.")] = 10.0,
    country: Annotated[str, typer.Option(help="Three letters, for the energy meter's estimate of CO2.")] = "USA",
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models: perplexity, zero-shot accuracy, latency, memory, energy."""
    given: dict[str, Any] = options_of(
        locals(), "measure", "text", "tasks", "latency_batch", "prompt_tokens", "new_tokens", "mode", "warmup", "runs",
        "seed",
    )  # fmt: skip
    with reported(debug, kept=output):
        batches, prompts = numbers(latency_batch, "--latency-batch"), numbers(prompt_tokens, "--prompt-tokens")

        from amprune.evaluation.identity import names_of
        from amprune.evaluation.run import evaluate
        from amprune.model.latency import LatencySettings

        common: dict[str, Any] = {"new_tokens": new_tokens, "warmup": warmup, "runs": runs, "seed": seed}
        cases = [
            LatencySettings(batch_size=batch, prompt_tokens=prompt, mode=how, **common)  # type: ignore[arg-type]
            for how in words(mode)
            for batch in batches
            for prompt in prompts
        ]
        given |= {"measure": words(measure), "texts": text or (), "tasks": words(tasks), "latency": cases}
        evaluation = evaluate(**given, progress=progress)
        names = names_of(models)
        emit(evaluation.to_dict(), as_json, lambda: show_evaluation(evaluation, names, output))


@app.command("report")
def report_command(
    folder: Annotated[
        Path, typer.Argument(help="A pruned checkpoint, or a folder with an evaluation.json.", metavar="FOLDER")
    ],
    evaluation: Annotated[Path | None, typer.Option(help="Evaluation to read in place of the folder's own.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Model to compare with (default: the first).")] = None,
    tokens_per_day: Annotated[float, typer.Option(help="Of the workload that costs are drawn for.")] = 1_000_000,
    days: Annotated[float, typer.Option(help="How long the workload runs.")] = 30,
    price_per_hour: Annotated[float, typer.Option(help="Of the device that generates.")] = 0.30,
    currency: Annotated[str, typer.Option(help="Of the price.")] = "USD",
    grid_intensity: Annotated[float, typer.Option(help="kg of CO2 per kWh.")] = 0.432,
    device_power: Annotated[float, typer.Option(help="Watts of the device that generates.")] = 350.0,
    billing: Annotated[
        Literal["exact", "started"], typer.Option(help="Pay the time that is used, or every hour that is begun.")
    ] = "exact",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw report.md and report.html from an evaluation; renew the model card of a pruned checkpoint."""
    given = options_of(locals(), "folder", "evaluation", "baseline")
    with reported(debug):
        from amprune.evaluation.workload import Workload
        from amprune.report.write import write_report

        files = write_report(folder, evaluation=evaluation, baseline=baseline, workload=Workload(**given))
        summary = {
            "markdown": str(files.markdown),
            "html": str(files.html),
            "figures": [str(path) for path in files.figures],
            "card": str(files.card) if files.card else None,
        }
        emit(summary, as_json, lambda: show_report(files))
