"""The paper's tables and figures, a command each: experiment."""

from pathlib import Path
from typing import Annotated

import typer

from amprune.cli.display import progress, show_experiment, stderr
from amprune.cli.options import Result, command
from amprune.settings import ExperimentSettings


@command("experiment", recipe=True, kept=lambda output: output / "experiment.json")
def experiment_command(
    name: Annotated[
        str, typer.Argument(help="table1, table2, table3, figure1, speedup, epochs or cost.", metavar="NAME")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; the same command goes on in it.")],
    settings: ExperimentSettings,
    model: Annotated[
        list[str] | None, typer.Option(help="Folder, hub id, .gguf file or smollm2-135m; repeatable.", metavar="MODEL")
    ] = None,
) -> Result:
    """Run one of the paper's experiments; the same command goes on where it was interrupted."""
    from amprune import experiment

    files = experiment(name, model or (), output, settings, progress=progress)

    def finish() -> None:
        if files.failed:
            lines = "\n".join(f"  {model}, {cell}: {reason}" for model, cell, reason in files.failed)
            stderr.print(
                f"amprune: failed cells: {len(files.failed)}; the same command tries them again\n{lines}",
                style="bold red", markup=False, soft_wrap=True,
            )  # fmt: skip
            raise typer.Exit(1)

    summary = {**files.results.to_dict(), "html": str(files.report.html), "markdown": str(files.report.markdown)}
    return summary, lambda: show_experiment(files), finish
