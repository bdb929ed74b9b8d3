"""The paper's tables and figures, a command each: experiment."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amprune.cli.display import emit, progress, reported, show_experiment, stderr
from amprune.cli.measuring import numbers
from amprune.cli.options import DataDir, Debug, Device, Json, Limit, Texts, Windows, app, options_of, words
from amprune.errors import EvaluationError


def _shares(texts: list[str]) -> list[float]:
    """Reads `0.1,0.2`, given once or several times."""
    try:
        return [float(part) for text in texts for part in words(text)]
    except ValueError:
        raise EvaluationError(f"--ratio is {', '.join(texts)!r}, expected shares such as 0.2 or 0.1,0.2") from None


@app.command("experiment")
def experiment_command(
    name: Annotated[
        str, typer.Argument(help="table1, table2, table3, figure1, speedup, epochs or cost.", metavar="NAME")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; the same command goes on in it.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Folder, hub id, .gguf file or smollm2-135m; repeatable.", metavar="MODEL")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="The paper's settings: llama-7b, llama-2-7b, phi-1.5, phi-2; or a JSON file of your own."),
    ] = None,
    ratio: Annotated[
        list[str] | None, typer.Option(help="Shares of all parameters to remove, with commas; repeatable.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="best, or criteria, of table1, figure1, speedup, with commas.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="A row of table1: NAME=PATH of another tool's model; repeatable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="alpaca (default), mixed, builtin, or a .json, .jsonl, .parquet or .txt file; not of best."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples (default: 50).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw, the random order and the training.")] = None,
    data_dir: DataDir = None,
    text: Texts = None,
    tasks: Annotated[
        str | None, typer.Option(help='Tasks, with commas (default: the paper\'s five); none: "".')
    ] = None,
    limit: Limit = None,
    windows: Windows = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a window (default: 2048).")] = None,
    recover: Annotated[
        bool | None, typer.Option("--recover/--no-recover", help="Train every pruned model, all the same way.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --epochs.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes an optimizer step.")] = None,
    data: Annotated[str | None, typer.Option(help="To train on: alpaca (default), builtin or a file.")] = None,
    training_samples: Annotated[int | None, typer.Option(help="Samples to train on (default: all).")] = None,
    latency_batch: Annotated[str | None, typer.Option(help="Batch sizes to time, such as 1,8.")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Prompt lengths to time, such as 12,512.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate in a timed run.")] = None,
    mode: Annotated[str | None, typer.Option(help="eager, compile, or both: eager,compile.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Runs of each model before the timed ones.")] = None,
    runs: Annotated[int | None, typer.Option(help="Timed runs of each model.")] = None,
    energy_seconds: Annotated[float | None, typer.Option(help="Length of each of the five blocks for energy.")] = None,
    device: Device = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of every computation (default: auto, the checkpoint's)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples, questions, windows and runs.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the pruned models on disk.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove another experiment in OUTPUT.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run one of the paper's experiments; the same command goes on where it was interrupted."""
    given: dict[str, Any] = options_of(
        locals(), "model", "ratio", "method", "checkpoint", "text", "tasks", "latency_batch", "prompt_tokens",
        "new_tokens", "mode", "warmup", "runs",
    )  # fmt: skip
    with reported(debug, kept=output / "experiment.json"):
        from amprune.experiments.recipes import find_recipe
        from amprune.experiments.run import experiment
        from amprune.experiments.settings import latency_cases

        recipe, timed = find_recipe(name), (latency_batch, prompt_tokens, new_tokens, mode, warmup, runs)
        if any(option is not None for option in timed):
            given["latency"] = latency_cases(
                recipe, quick=quick,
                batches=numbers(latency_batch, "--latency-batch") if latency_batch else None,
                prompts=numbers(prompt_tokens, "--prompt-tokens") if prompt_tokens else None,
                modes=words(mode) if mode else None, new_tokens=new_tokens, warmup=warmup, runs=runs,
            )  # fmt: skip
        given |= {
            "ratios": _shares(ratio) if ratio else None, "methods": words(method) if method else None,
            "checkpoints": checkpoint, "texts": text, "tasks": words(tasks) if tasks is not None else None,
        }  # fmt: skip
        files = experiment(**given, models=model or (), progress=progress)
        summary = {**files.results.to_dict(), "html": str(files.report.html), "markdown": str(files.report.markdown)}
        emit(summary, as_json, lambda: show_experiment(files))
        if files.failed:
            lines = "\n".join(f"  {model}, {cell}: {reason}" for model, cell, reason in files.failed)
            stderr.print(
                f"amprune: failed cells: {len(files.failed)}; the same command tries them again\n{lines}",
                style="bold red", markup=False, soft_wrap=True,
            )  # fmt: skip
            raise typer.Exit(1)
