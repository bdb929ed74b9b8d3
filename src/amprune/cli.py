"""The command line. Heavy imports stay inside the commands, so that `--help` is instant."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amprune import __version__
from amprune.display import (
    emit,
    plan_summary,
    progress,
    reported,
    result_summary,
    show_inspection,
    show_plan,
    show_result,
    show_verification,
    stdout,
)

app = typer.Typer(
    name="amprune",
    help="Make open language models smaller and faster by removing attention heads and MLP neurons (AMP).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(help="Hugging Face folder, hub id, .gguf file, or smollm2-135m.", metavar="MODEL")
]
Out = Annotated[Path, typer.Argument(help="Folder to write; appears whole or not at all.", metavar="OUT")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let a tokenizer's own code run.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Dtype of the computation; a GGUF file is dequantised to it (auto: bfloat16)."),
]
GgufDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Dtype that a GGUF file is dequantised to (auto: bfloat16); others keep theirs."),
]
Calibration = Annotated[
    str, typer.Option(help="alpaca (from the hub), builtin, or a .json, .jsonl, .parquet or .txt file.")
]
Samples = Annotated[int, typer.Option(help="Calibration samples, drawn at random.")]
MaxLength = Annotated[int, typer.Option(help="Tokens kept of each sample.")]
PromptsOnly = Annotated[bool, typer.Option("--prompts-only", help="Leave out the responses.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw and of the random order.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: cuda where there is one).")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: spread a large model over devices, memory, disk; disk: stream each layer.")
]
BatchTokens = Annotated[int, typer.Option(help="Most tokens in a batch; changes no score.")]
Ratio = Annotated[float | None, typer.Option(help="Share of all parameters to remove, such as 0.2.")]
OrderOption = Annotated[
    Literal["amp", "reversed", "random"],
    typer.Option(help="Remove the least important, the most important, or a random draw."),
]
OnlyOption = Annotated[Literal["heads", "neurons"] | None, typer.Option(help="Remove heads alone or neurons alone.")]
HeadsModeOption = Annotated[
    Literal["groups", "within"] | None,
    typer.Option(help="Remove key-value heads with their readers, or query heads within every group."),
]
HeadsRatio = Annotated[float | None, typer.Option(help="Share of heads to remove, by hand.")]
NeuronsRatio = Annotated[float | None, typer.Option(help="Share of neurons to remove, by hand.")]
NeuronMultiple = Annotated[int, typer.Option(help="Keep a multiple of this many neurons (64, 128, 256).")]
HeadMultiple = Annotated[int, typer.Option(help="Keep a multiple of this many heads (tensor parallelism).")]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 200MB; peak memory follows it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _print_version(value: bool) -> None:
    if value:
        stdout.print(f"amprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make open language models smaller and faster by removing attention heads and MLP neurons (AMP)."""


@app.command("inspect")
def inspect_command(model: Model, revision: Revision = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what a model is made of and what can be removed from it."""
    with reported(debug):
        from amprune import inspect

        found = inspect(model, revision=revision)
        emit(found.to_dict(), as_json, lambda: show_inspection(found))


@app.command("score")
def score_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Score file to write.")],
    calibration: Calibration = "alpaca",
    samples: Samples = 50,
    max_length: MaxLength = 512,
    prompts_only: PromptsOnly = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    batch_tokens: BatchTokens = 4096,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score every head, key-value group and neuron on a calibration set."""
    options = _options(locals(), "output")
    with reported(debug):
        from amprune import score

        scores = score(**options, progress=progress)
        scores.save(output)
        shape, used = scores.shape, scores.calibration
        summary = {
            "scores": str(output),
            "calibration": used,
            "settings": scores.settings,
            "fingerprint": scores.fingerprint,
            "shape": shape.to_dict(),
        }
        emit(
            summary,
            as_json,
            lambda: stdout.print(
                f"Scored {shape.num_layers} layers of {shape.num_attention_heads} heads and "
                f"{shape.intermediate_size:,} neurons on {used['samples']} samples ({used['tokens']:,} tokens) of "
                f"{used['name']}\nScores in {output}"
            ),
        )


@app.command("plan")
def plan_command(
    scores: Annotated[Path, typer.Argument(help="Score file.", metavar="SCORES")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan to write.")],
    ratio: Ratio = None,
    order: OrderOption = "amp",
    only: OnlyOption = None,
    heads_mode: HeadsModeOption = None,
    heads_ratio: HeadsRatio = None,
    neurons_ratio: NeuronsRatio = None,
    neuron_multiple: NeuronMultiple = 1,
    head_multiple: HeadMultiple = 1,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose what to keep under an exact budget; needs neither the model nor a GPU."""
    options = _options(locals(), "scores", "output")
    with reported(debug):
        from amprune import ImportanceScores, make_plan

        plan = make_plan(ImportanceScores.load(scores), **options)
        plan.save(output)
        emit({"plan": str(output), **plan_summary(plan)}, as_json, lambda: show_plan(plan, f"Plan in {output}"))


@app.command("apply")
def apply_command(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Plan file.", metavar="PLAN")],
    out: Out,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dtype: GgufDtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Slice a model by a plan, write it shard by shard, and verify it."""
    options = _options(locals())
    with reported(debug):
        from amprune import apply_plan

        result = apply_plan(**options, progress=progress)
        emit(result_summary(result), as_json, lambda: show_result(result))


@app.command("verify")
def verify_command(
    out: Out,
    dense: Annotated[str, typer.Option(help="The model that OUT was made from.", metavar="MODEL")],
    dtype: GgufDtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove that a written checkpoint is the dense model without the removed units."""
    options = _options(locals())
    with reported(debug):
        from amprune import verify

        report = verify(**options, progress=progress)
        emit(report.to_dict(), as_json, lambda: show_verification(report))
        report.require()


@app.command("prune")
def prune_command(
    model: Model,
    out: Out,
    ratio: Ratio = None,
    order: OrderOption = "amp",
    only: OnlyOption = None,
    heads_mode: HeadsModeOption = None,
    heads_ratio: HeadsRatio = None,
    neurons_ratio: NeuronsRatio = None,
    neuron_multiple: NeuronMultiple = 1,
    head_multiple: HeadMultiple = 1,
    calibration: Calibration = "alpaca",
    samples: Samples = 50,
    max_length: MaxLength = 512,
    prompts_only: PromptsOnly = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    batch_tokens: BatchTokens = 4096,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score, plan, slice, write and verify in one go."""
    options = _options(locals())
    with reported(debug):
        from amprune import prune

        result = prune(**options, progress=progress)
        emit(result_summary(result), as_json, lambda: show_result(result))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write, replaced when it exists.")] = Path("demo-smollm2-135m"),
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove.")] = 0.2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune SmolLM2-135M and let the dense and the pruned model answer a question."""
    with reported(debug):
        from amprune.demo import MODEL, QUESTION, answers
        from amprune.pipeline import prune

        result = prune(MODEL, out, ratio=ratio, calibration="builtin", overwrite=True, progress=progress)
        dense, pruned = answers(out, progress=progress)
        summary = {**result_summary(result), "question": QUESTION, "dense_answer": dense, "pruned_answer": pruned}

        def show() -> None:
            show_result(result)
            stdout.print(f"\nQ: {QUESTION}\n\ndense:  {dense}\n\npruned: {pruned}\n", markup=False)
            stdout.print("The pruned model was not trained after pruning; that is what a recovery stage is for.")

        emit(summary, as_json, show)


def _options(arguments: dict[str, Any], *others: str) -> dict[str, Any]:
    """Picks what goes to the library function of the same words: all but the command line's own arguments."""
    return {name: value for name, value in arguments.items() if name not in ("as_json", "debug", *others)}
