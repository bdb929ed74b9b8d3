"""Arguments and options that commands share, and the application that they belong to."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amprune import __version__
from amprune.cli.display import stdout

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
_SETS = "alpaca (from the hub), mixed, builtin, or a .json, .jsonl, .parquet or .txt file"
Calibration = Annotated[str, typer.Option(help=f"{_SETS}.")]
PresetCalibration = Annotated[str | None, typer.Option("--calibration", help=f"{_SETS} (default: the preset's).")]
Samples = Annotated[
    int | None, typer.Option(help="Calibration samples, drawn at random (default: 50, or by --tokens).")
]
Tokens = Annotated[int | None, typer.Option(help="Draw calibration samples until there are as many tokens.")]
MaxLength = Annotated[int, typer.Option(help="Tokens kept of each sample.")]
PresetMaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Tokens kept of each sample (default: the preset's).")
]
PresetOption = Annotated[
    str,
    typer.Option(
        "--preset",
        help="best: what does least damage (refits kept weights, shares out the budget by measuring); paper: AMP as "
        "published.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(help="In the place of a ratio: params=100M, weight-bytes=4GiB (at most), or speedup=1.25x (timed)."),
]
Allocate = Annotated[
    bool | None,
    typer.Option(help="Choose how much of heads and neurons goes by measuring the damage (default: the preset's)."),
]
Reconstruct = Annotated[
    bool | None,
    typer.Option(help="Refit kept output weights in closed form, no training (default: the preset's)."),
]
PromptsOnly = Annotated[bool, typer.Option("--prompts-only", help="Leave out the responses.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw and of the random order.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: cuda where there is one).")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: spread a large model over devices, memory, disk; disk: stream each layer.")
]
BatchTokens = Annotated[int, typer.Option(help="Most tokens in a batch; changes no score.")]
Ratio = Annotated[float | None, typer.Option(help="Share of all parameters to remove, such as 0.2.")]
_CRITERIA = (
    "amp, amp-l2, amp-weighted, activation-l2, wanda-sp, flap, taylor, magnitude, random, reversed; depth and "
    "depth-taylor remove whole blocks"
)
CriterionOption = Annotated[str, typer.Option("--criterion", help=f"{_CRITERIA}.")]
PresetCriterion = Annotated[str | None, typer.Option("--criterion", help=f"{_CRITERIA} (default: the preset's).")]
ProtectFirst = Annotated[int, typer.Option(help="Of depth pruning: this many first blocks stay.")]
ProtectLast = Annotated[int, typer.Option(help="Of depth pruning: this many last blocks stay.")]
BiasCompensation = Annotated[
    bool,
    typer.Option(
        "--bias-compensation", help="Let existing biases make up for the mean of what is removed (criterion flap)."
    ),
]
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
PresetNeuronMultiple = Annotated[
    int | None,
    typer.Option(
        "--neuron-multiple",
        help="Keep a multiple of this many neurons; 1 meets the ratio exactly (default: the preset's; best: 64, or 256 "
        "where that costs at most 0.25 % of the parameters).",
    ),
]
HeadMultiple = Annotated[int, typer.Option(help="Keep a multiple of this many heads.")]
TensorParallel = Annotated[
    int, typer.Option(help="Keep heads and neurons that a server can split over this many devices (vLLM's rule).")
]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 200MB; peak memory follows it.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with wikitext2/ and tasks/, instead of the hub.")]
Texts = Annotated[list[Path] | None, typer.Option(help="Text file for perplexity, instead of WikiText-2; repeatable.")]
Limit = Annotated[int | None, typer.Option(help="Only the first items of each task.")]
Windows = Annotated[int | None, typer.Option(help="Only the first windows of the text.")]
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


def options_of(arguments: dict[str, Any], *others: str) -> dict[str, Any]:
    """Picks what goes to the library function of the same words: all but the command line's own arguments."""
    return {name: value for name, value in arguments.items() if name not in ("as_json", "debug", *others)}


def words(text: str) -> list[str]:
    """Reads `one,two`."""
    return [word.strip() for word in text.split(",") if word.strip()]
