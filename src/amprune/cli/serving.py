"""From a model to what serves it: export, quantize and push."""

from pathlib import Path
from typing import Annotated

import typer

from amprune.cli.display import progress, show_export, show_push, show_quantized
from amprune.cli.options import Model, Out, Result, command
from amprune.settings import ExportSettings, PushSettings, QuantizeSettings


@command("export")
def export_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write, such as pruned.gguf.", metavar="OUT.gguf")],
    settings: ExportSettings,
) -> Result:
    """Write a model as a GGUF file for llama.cpp, by llama.cpp's own converter, and prove that it runs there."""
    from amprune import export_gguf

    exported = export_gguf(model, out, settings, progress=progress)
    return exported.to_dict(), lambda: show_export(exported)


@command("quantize")
def quantize_command(model: Model, out: Out, settings: QuantizeSettings) -> Result:
    """Write a model with fewer bits a weight, which stock transformers loads, and prove that it runs."""
    from amprune import quantize

    quantized = quantize(model, out, settings, progress=progress)
    return quantized.to_dict(), lambda: show_quantized(quantized)


@command("push", otherwise="nothing was committed")
def push_command(
    out: Annotated[Path, typer.Argument(help="Folder that amprune wrote; nothing in it is changed.", metavar="OUT")],
    repo: Annotated[
        str, typer.Argument(help="OWNER/NAME on the hub, or NAME for your own; made if missing.", metavar="REPO")
    ],
    settings: PushSettings,
) -> Result:
    """Share a checkpoint on the hub: weights, tokenizer, model card and records, in one commit."""
    from amprune import push

    result = push(out, repo, settings)
    return result.to_dict(), lambda: show_push(result)
