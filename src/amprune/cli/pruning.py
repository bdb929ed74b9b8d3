"""From a model to a smaller one: inspect, score, plan, apply, verify, prune, demo."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from amprune.cli.display import (
    plan_summary,
    progress,
    result_summary,
    show_inspection,
    show_plan,
    show_result,
    show_scores,
    show_verification,
    stdout,
)
from amprune.cli.options import Model, Out, Result, command
from amprune.settings import ApplySettings, Finding, PlanSettings, PruneSettings, ScoreSettings, VerifySettings


@command("inspect")
def inspect_command(model: Model, settings: Finding) -> Result:
    """Show what a model is made of and what can be removed from it."""
    from amprune import inspect

    found = inspect(model, revision=settings.revision)
    return found.to_dict(), lambda: show_inspection(found)


@command("score")
def score_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Score file to write.")],
    settings: ScoreSettings,
) -> Result:
    """Score every head, key-value group and neuron, or every block, by a criterion."""
    from amprune import score

    scores = score(model, settings, progress=progress)
    scores.save(output)
    summary = {
        "scores": str(output),
        "criterion": scores.criterion,
        "calibration": scores.calibration,
        "settings": scores.settings,
        "fingerprint": scores.fingerprint,
        "shape": scores.shape.to_dict(),
    }
    return summary, lambda: show_scores(scores, output)


@command("plan")
def plan_command(
    scores: Annotated[Path, typer.Argument(help="Score file.", metavar="SCORES")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan to write.")],
    settings: PlanSettings,
    model: Annotated[
        str | None,
        typer.Option(help="The model that was scored, where the split is to be measured on it.", metavar="MODEL"),
    ] = None,
    target_parameters: Annotated[
        str | None,
        typer.Option(help="Short for --target params=..., such as 100M."),
    ] = None,
) -> Result:
    """Choose what to keep under an exact budget; without --model it needs neither the model nor a GPU."""
    from amprune.search.planning import plan_scores

    if target_parameters is not None:
        settings = replace(settings, target=f"params={target_parameters}")
    plan = plan_scores(scores, settings, model=model, progress=progress)
    plan.save(output)
    return {"plan": str(output), **plan_summary(plan)}, lambda: show_plan(plan, f"Plan in {output}")


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
    return report.to_dict(), lambda: show_verification(report), report.require


@command("prune", recipe=True)
def prune_command(model: Model, out: Out, settings: PruneSettings) -> Result:
    """Score, plan, slice, refit, write and verify in one go."""
    from amprune import prune

    result = prune(model, out, settings, progress=progress)
    return result_summary(result), lambda: show_result(result)


@command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write, replaced when it exists.")] = Path("demo-smollm2-135m"),
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove.")] = 0.2,
) -> Result:
    """Prune SmolLM2-135M and let the dense and the pruned model answer a question."""
    from amprune.cli.demo import MODEL, QUESTION, TOKENS, answers
    from amprune.pipeline import prune

    result = prune(MODEL, out, ratio=ratio, tokens=TOKENS, overwrite=True, progress=progress)
    dense, pruned = answers(out, progress=progress)

    def show() -> None:
        show_result(result)
        stdout.print(f"\nQ: {QUESTION}\n\ndense:  {dense}\n\npruned: {pruned}\n", markup=False)
        stdout.print("The pruned model was not trained after pruning; that is what a recovery stage is for.")

    summary = {**result_summary(result), "question": QUESTION, "dense_answer": dense, "pruned_answer": pruned}
    return summary, show
