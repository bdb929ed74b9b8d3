"""What pruning cost and what it gained: evaluate and report."""

from pathlib import Path
from typing import Annotated

import typer

from amprune.cli.display import progress, show_evaluation, show_report
from amprune.cli.options import Result, command
from amprune.settings import EvaluationSettings, ReportSettings


@command("evaluate", recipe=True, kept=lambda output: output)
def evaluate_command(
    models: Annotated[
        list[str], typer.Argument(help="MODEL or NAME=MODEL each; the first is the baseline.", metavar="MODEL...")
    ],
    settings: EvaluationSettings,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Evaluation to write; figures are added to one that is there.")
    ] = Path("evaluation.json"),
) -> Result:
    """Measure models: perplexity, zero-shot accuracy, latency, memory, energy."""
    from amprune import evaluate
    from amprune.evaluation.identity import names_of

    evaluation = evaluate(models, output, settings, progress=progress)
    return evaluation.to_dict(), lambda: show_evaluation(evaluation, names_of(models), output)


@command("report")
def report_command(
    folder: Annotated[
        Path, typer.Argument(help="A pruned checkpoint, or a folder with an evaluation.json.", metavar="FOLDER")
    ],
    settings: ReportSettings,
) -> Result:
    """Draw report.md and report.html from an evaluation; renew the model card of a pruned checkpoint."""
    from amprune import write_report

    files = write_report(folder, settings)
    summary = {
        "markdown": str(files.markdown),
        "html": str(files.html),
        "figures": [str(path) for path in files.figures],
        "card": str(files.card) if files.card else None,
    }
    return summary, lambda: show_report(files)
