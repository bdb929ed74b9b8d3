"""The command line. Heavy imports stay inside the commands, so that `--help` is instant."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from amprune import __version__
from amprune.errors import AmpruneError
from amprune.progress import Advance, Progress

if TYPE_CHECKING:
    from amprune.inspection import Inspection
    from amprune.pipeline import PrunedModel
    from amprune.plan import PruningPlan
    from amprune.verification import VerificationReport

app = typer.Typer(
    name="amprune",
    help="Make open language models smaller and faster by removing attention heads and MLP neurons (AMP).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
stdout, stderr = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)

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
    with _reported(debug):
        from amprune import inspect

        found = inspect(model, revision=revision)
        _emit(found.to_dict(), as_json, lambda: _show_inspection(found))


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
    with _reported(debug):
        from amprune import score

        scores = score(**options, progress=_progress)
        scores.save(output)
        shape, used = scores.shape, scores.calibration
        summary = {
            "scores": str(output),
            "calibration": used,
            "settings": scores.settings,
            "fingerprint": scores.fingerprint,
            "shape": shape.to_dict(),
        }
        _emit(
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
    with _reported(debug):
        from amprune import ImportanceScores, make_plan

        plan = make_plan(ImportanceScores.load(scores), **options)
        plan.save(output)
        _emit({"plan": str(output), **_plan_summary(plan)}, as_json, lambda: _show_plan(plan, f"Plan in {output}"))


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
    with _reported(debug):
        from amprune import apply_plan

        result = apply_plan(**options, progress=_progress)
        _emit(_result_summary(result), as_json, lambda: _show_result(result))


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
    with _reported(debug):
        from amprune import verify

        report = verify(**options, progress=_progress)
        _emit(report.to_dict(), as_json, lambda: _show_verification(report))
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
    with _reported(debug):
        from amprune import prune

        result = prune(**options, progress=_progress)
        _emit(_result_summary(result), as_json, lambda: _show_result(result))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write, replaced when it exists.")] = Path("demo-smollm2-135m"),
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove.")] = 0.2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune SmolLM2-135M and let the dense and the pruned model answer a question."""
    with _reported(debug):
        from amprune.demo import MODEL, QUESTION, answers
        from amprune.pipeline import prune

        result = prune(MODEL, out, ratio=ratio, calibration="builtin", overwrite=True, progress=_progress)
        dense, pruned = answers(out, progress=_progress)
        summary = {**_result_summary(result), "question": QUESTION, "dense_answer": dense, "pruned_answer": pruned}

        def show() -> None:
            _show_result(result)
            stdout.print(f"\nQ: {QUESTION}\n\ndense:  {dense}\n\npruned: {pruned}\n", markup=False)
            stdout.print("The pruned model was not trained after pruning; that is what a recovery stage is for.")

        _emit(summary, as_json, show)


def _options(arguments: dict[str, Any], *others: str) -> dict[str, Any]:
    """Picks what goes to the library function of the same words: all but the command line's own arguments."""
    return {name: value for name, value in arguments.items() if name not in ("as_json", "debug", *others)}


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Prints what goes wrong as one paragraph on stderr and exits with 1; tracebacks only with --debug."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("amprune").setLevel(logging.INFO)
    try:
        yield
    except AmpruneError as error:
        if debug:
            raise
        stderr.print(f"amprune: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr.print("amprune: interrupted; nothing was left behind")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        stderr.print(f"amprune: unexpected {kind}: {error} (--debug shows where)", style="bold red", markup=False)
        raise typer.Exit(1) from None


@contextmanager
def _progress(description: str, total: int) -> Iterator[Advance]:
    """A bar on stderr with the time left; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


def _emit(summary: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    else:
        show()


def _plan_summary(plan: "PruningPlan") -> dict[str, Any]:
    return {
        "ratio_target": plan.ratio_target,
        "ratio_actual": plan.ratio_actual,
        "shape_before": plan.shape_before.to_dict(),
        "shape_after": plan.shape_after.to_dict(),
    }


def _result_summary(result: "PrunedModel") -> dict[str, Any]:
    return {
        "out": str(result.folder),
        **_plan_summary(result.plan),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "verification": result.verification.to_dict(),
    }


def _show_plan(plan: "PruningPlan", title: str, sizes: tuple[int, int] | None = None) -> None:
    before, after = plan.shape_before, plan.shape_after
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("dense", "pruned", "removed"):
        table.add_column(name, justify="right")
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("query heads per layer", before.num_attention_heads, after.num_attention_heads),
        ("key-value heads per layer", before.num_key_value_heads, after.num_key_value_heads),
        ("neurons per layer", before.intermediate_size, after.intermediate_size),
    ]
    for name, dense, pruned in rows:
        table.add_row(name, f"{dense:,}", f"{pruned:,}", f"{1 - pruned / dense:.2%}")
    if sizes is not None:
        table.add_row("weights", *(f"{size / 1e6:,.1f} MB" for size in sizes), f"{1 - sizes[1] / sizes[0]:.2%}")
    stdout.print(table)
    if abs(plan.ratio_actual - plan.ratio_target) > 5e-4:
        stdout.print(f"Asked for {plan.ratio_target:.2%}; the nearest with these options is {plan.ratio_actual:.2%}.")


def _show_result(result: "PrunedModel") -> None:
    _show_plan(result.plan, f"Pruned model in {result.folder}", (result.bytes_before, result.bytes_after))
    _show_verification(result.verification)


def _show_verification(report: "VerificationReport") -> None:
    stdout.print("Verified" if report.passed else "NOT verified", style="bold green" if report.passed else "bold red")
    for check in report.checks:
        mark = "ok " if check.passed else "BAD"
        stdout.print(f"  {mark} {check.name}: {check.detail}", markup=False)


def _show_inspection(found: "Inspection") -> None:
    shape = found.shape
    size = f", {found.bytes / 1e6:,.1f} MB in {found.dtype}" if found.bytes else ""
    stdout.print(f"{found.model}: {found.architecture}, {shape.parameters:,} parameters{size}", style="bold")
    table = Table(title="Parameters", title_justify="left")
    for name, justify in (("part", "left"), ("parameters", "right"), ("share", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for part, count in found.parameters_by_part.items():
        table.add_row(part, f"{count:,}", f"{count / shape.parameters:.1%}")
    stdout.print(table)
    tied = "tied" if found.tied_embeddings else "separate"
    stdout.print(
        f"{shape.num_layers} layers, hidden size {shape.hidden_size:,}, {tied} embeddings\n"
        f"each with {shape.num_attention_heads} query heads of {shape.head_dim}, {shape.num_key_value_heads} key-value "
        f"heads (groups of {shape.group_size}) and {shape.intermediate_size:,} neurons"
    )
    if shape.heads_refused is not None:
        stdout.print(f"Heads cannot be removed: {shape.heads_refused}.")
    for mode in found.modes:
        name = "Neurons alone" if mode.mode == "none" else f"Heads by {mode.mode}, unit: a {mode.unit}"
        steps = f"; {_ranges(mode.removable)} of {mode.units_per_layer} removable" if mode.units_per_layer else ""
        stdout.print(f"{name}{steps}; ratios up to {mode.largest_ratio:.4f}")
    stdout.print(f"Neurons adjust any ratio in steps of {found.smallest_step:.2e}.")


def _ranges(numbers: tuple[int, ...]) -> str:
    """Writes 0, 1, 2, 3, 6 as 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


__all__ = ["Progress", "app"]
