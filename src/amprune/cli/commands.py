"""Every command, in the order of the data's way, which `amprune --help` lists them in."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from amprune.cli import display
from amprune.cli.display import plan_summary, progress, result_summary, show_result, stderr
from amprune.cli.options import Model, Out, Result, command
from amprune.errors import required
from amprune.settings import (
    MEASURED_BY,
    ApplySettings,
    EvaluationSettings,
    ExperimentSettings,
    ExportSettings,
    Finding,
    PlanSettings,
    PruneSettings,
    PushSettings,
    QuantizeSettings,
    RecoverCommandSettings,
    RecoverySettings,
    ReportSettings,
    RunSettings,
    ScoreSettings,
    VerifySettings,
    WritingTextSettings,
    part,
)


def _written(help: str) -> Any:
    return typer.Option("--output", "-o", help=help)


@command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write, replaced when it exists.")] = Path("demo-smollm2-135m"),
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove.")] = 0.1,
) -> Result:
    """Prune SmolLM2-135M, and show the dense and the pruned model side by side: their answers, their perplexity."""
    from amprune import prune
    from amprune.cli.demo import MODEL, QUESTIONS, TOKENS, shown

    result = prune(MODEL, out, ratio=ratio, tokens=TOKENS, overwrite=True, progress=progress)
    dense, pruned = shown(out, progress=progress)

    def show() -> None:
        show_result(result)
        display.show_side_by_side(QUESTIONS, dense, pruned)

    both = {"dense": asdict(dense), "pruned": asdict(pruned)}
    return {**result_summary(result), "questions": QUESTIONS, **both}, show


@command("inspect")
def inspect_command(model: Model, settings: Finding) -> Result:
    """Show what a model is made of and what can be removed from it."""
    from amprune import inspect

    found = inspect(model, revision=settings.revision)
    return found.to_dict(), lambda: display.show_inspection(found)


@command("prune", recipe=True)
def prune_command(model: Model, out: Out, settings: PruneSettings) -> Result:
    """Score, plan, slice, refit, write and verify in one go."""
    from amprune import prune

    result = prune(model, out, settings, progress=progress)
    return result_summary(result), lambda: show_result(result)


@command("score")
def score_command(
    model: Model, output: Annotated[Path, _written("Score file to write.")], settings: ScoreSettings
) -> Result:
    """Score every head, key-value group and neuron, or every block, by a criterion."""
    from amprune import score
    from amprune.model.source import open_source
    from amprune.model.writer import check_target
    from amprune.text.records import file_of

    source = open_source(model, revision=settings.revision, dtype=settings.dtype)
    check_target(output, [*source.protected, *file_of(settings.calibration)])
    scores = score(model, settings, progress=progress)
    scores.save(output)
    summary = {
        "scores": str(output),
        **{name: getattr(scores, name) for name in ("criterion", "calibration", "settings", "fingerprint")},
        "shape": scores.shape.to_dict(),
    }
    return summary, lambda: display.show_scores(scores, output)


@command("plan")
def plan_command(
    scores: Annotated[Path, typer.Argument(help="Score file.", metavar="SCORES")],
    output: Annotated[Path, _written("Plan to write.")],
    settings: PlanSettings,
    model: Annotated[
        str | None,
        typer.Option(help="The model that was scored, where the split is to be measured on it.", metavar="MODEL"),
    ] = None,
    target_parameters: Annotated[str | None, typer.Option(help="Short for --target params=..., such as 100M.")] = None,
) -> Result:
    """Choose what to keep under an exact budget; without --model it needs neither the model nor a GPU."""
    from amprune.model.source import open_source
    from amprune.model.writer import check_target
    from amprune.search.planning import plan_scores
    from amprune.text.records import file_of

    sources = () if model is None else open_source(model, revision=settings.revision, dtype=settings.dtype).protected
    check_target(output, [scores, *sources, *file_of(settings.calibration)])
    if target_parameters is not None:
        settings = replace(settings, target=f"params={target_parameters}")
    plan = plan_scores(scores, settings, model=model, progress=progress)
    plan.save(output)
    return {"plan": str(output), **plan_summary(plan)}, lambda: display.show_plan(plan, f"Plan in {output}")


@command("apply")
def apply_command(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Plan file.", metavar="PLAN")],
    out: Out,
    settings: ApplySettings,
    scores: Annotated[
        Path | None, typer.Option(help="The score file that the plan was made from; kept with the output.")
    ] = None,
) -> Result:
    """Slice a model by a plan, write it shard by shard, and verify it."""
    from amprune import ImportanceScores, apply_plan

    known = None if scores is None else ImportanceScores.load(scores)
    result = apply_plan(model, plan, out, settings, scores=known, progress=progress)
    return result_summary(result), lambda: show_result(result)


@command("verify")
def verify_command(
    out: Out,
    dense: Annotated[str, typer.Option(help="The model that OUT was made from.", metavar="MODEL")],
    settings: VerifySettings,
) -> Result:
    """Prove that a written checkpoint is the dense model without the removed units."""
    from amprune import verify

    report = verify(out, dense=dense, settings=settings, progress=progress)
    return report.to_dict(), lambda: display.show_verification(report), report.require


@command("write-text", kept=lambda output: output.with_name(f"{output.name}.partial"))
def write_text_command(
    model: Model, output: Annotated[Path, _written("File to write, .jsonl.")], settings: WritingTextSettings
) -> Result:
    """Let a model write text of its own, for --data and --calibration; the same command goes on where it stopped."""
    from amprune import write_text

    written = write_text(model, output, settings, progress=progress)
    return {"out": str(output), **written.to_dict()}, lambda: display.show_written(written, output)


@command("recover", recipe=True, kept=lambda out: out.with_name(f"{out.name}.training"), again="--resume")
def recover_command(model: Model, out: Out, settings: RecoverCommandSettings) -> Result | None:
    """Bring a pruned model back: taught by the dense model, or fine-tuned as in the paper; write a checkpoint."""
    from amprune import recover
    from amprune.pipeline import measure_epochs

    if settings.evaluate_each_epoch:
        required("--evaluate-each-epoch", *MEASURED_BY["zero_shot"])
    keep = settings.keep_epochs or settings.evaluate_each_epoch
    result = recover(model, out, part(RecoverySettings, settings), keep_epochs=keep, progress=progress)
    if result is None:  # one of the processes that do not write
        return None
    if settings.evaluate_each_epoch:
        measure_epochs(model, result, settings, progress=progress)
    return {"out": str(result.folder), **result.record}, lambda: display.show_recovery(result)


@command("evaluate", recipe=True, kept=lambda output: output)
def evaluate_command(
    models: Annotated[
        list[str], typer.Argument(help="MODEL or NAME=MODEL each; the first is the baseline.", metavar="MODEL...")
    ],
    settings: EvaluationSettings,
    output: Annotated[Path, _written("Evaluation to write; figures are added to one that is there.")] = Path(
        "evaluation.json"
    ),
) -> Result:
    """Measure models: perplexity, zero-shot accuracy, latency, memory, energy."""
    from amprune import evaluate
    from amprune.evaluation.identity import names_of

    evaluation = evaluate(models, output, settings, progress=progress)
    return evaluation.to_dict(), lambda: display.show_evaluation(evaluation, names_of(models), output)


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
    return summary, lambda: display.show_report(files)


@command("run", recipe=True, kept=lambda out: out.with_name(f"{out.name}.run.json"))
def run_command(model: Model, out: Out, settings: RunSettings) -> Result:
    """Do it all: prune, recover, evaluate, report; the same command goes on where it was interrupted."""
    from amprune import run

    files = run(model, out, settings, progress=progress)
    written = {"out": str(out), "markdown": str(files.markdown), "html": str(files.html)}
    return written, lambda: display.show_report(files)


@command("quantize")
def quantize_command(model: Model, out: Out, settings: QuantizeSettings) -> Result:
    """Write a model with fewer bits a weight, which stock transformers loads, and prove that it runs."""
    from amprune import quantize

    quantized = quantize(model, out, settings, progress=progress)
    return quantized.to_dict(), lambda: display.show_quantized(quantized)


@command("export")
def export_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write, such as pruned.gguf.", metavar="OUT.gguf")],
    settings: ExportSettings,
) -> Result:
    """Write a model as a GGUF file for llama.cpp, by llama.cpp's own converter, and prove that it runs there."""
    from amprune import export_gguf

    exported = export_gguf(model, out, settings, progress=progress)
    return exported.to_dict(), lambda: display.show_export(exported)


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
    return result.to_dict(), lambda: display.show_push(result)


@command("experiment", recipe=True, kept=lambda output: output / "experiment.json")
def experiment_command(
    name: Annotated[
        str, typer.Argument(help="table1, table2, table3, figure1, speedup, epochs or cost.", metavar="NAME")
    ],
    output: Annotated[Path, _written("Folder to write; the same command goes on in it.")],
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
                style="bold red", soft_wrap=True,
            )  # fmt: skip
            raise typer.Exit(1)

    summary = {**files.results.to_dict(), "html": str(files.report.html), "markdown": str(files.report.markdown)}
    return summary, lambda: display.show_experiment(files), finish
