"""What is asked for and scores -> the plan that `prune` makes; measured on the model where the preset says so."""

from dataclasses import replace
from typing import Any, TypeVar

from amprune.cut.biases import check_biases
from amprune.errors import PlanError
from amprune.model.reader import Checkpoint, open_model
from amprune.plan.artefact import PruningPlan
from amprune.plan.make import check_request, make_plan
from amprune.plan.target import parse_target, with_target
from amprune.running import Progress, no_progress
from amprune.scoring.catalogue import Criterion, find_criterion
from amprune.scoring.scores import ImportanceScores
from amprune.search.run import plan_on_model
from amprune.settings import PathLike, PlanOptions, PlanSettings, settle, with_preset
from amprune.text.calibration import CalibrationSet, draw

_Settings = TypeVar("_Settings", bound=PlanSettings)


def plan_scores(
    scores: ImportanceScores | PathLike,
    settings: PlanSettings | None = None,
    *,
    model: PathLike | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> PruningPlan:
    """Makes the plan that `prune` makes of these scores.

    Without the model, heads and neurons lose equal shares of the budget. With it, the split that does the least damage
    is chosen, as the preset says, on the samples that `score` left out.

    Args:
        scores: or their file.
        settings: what is asked for; the preset and the text are those of `score`.
        model: the one that was scored, by any of its names.
        progress: told how far it is.
        options: of `PlanSettings`, such as `ratio=0.2`.

    Raises:
        PlanError: the ratio or the target is out of reach, needs the model, or the scores are of another model.
    """
    if not isinstance(scores, ImportanceScores):
        scores = ImportanceScores.load(scores)
    given = settle(PlanSettings, settings, options)
    asked = settled(given, find_criterion(scores.criterion))
    if model is None:
        return _without_model(scores, given, asked)
    _, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
    if scores.fingerprint != dense.fingerprint or scores.shape.differences(dense.shape):
        raise PlanError(f"the scores are of another model than {model}; score it, and plan from these scores")
    fit = held_out = None
    if asked.allocate or asked.reconstruct:
        fit = draw(dense, asked, trust_remote_code=asked.trust_remote_code, progress=progress)
    if fit is not None and asked.allocate:
        fit, held_out = fit.split()
        if scores.calibration and scores.calibration.get("sha256") != fit.sha256:
            raise PlanError(
                f"the scores were computed on other samples ({scores.calibration.get('name')}) than all but the last "
                f"eighth of {fit.name}, the rest of which the split is to be measured on: give `plan` the calibration "
                "options of `score`, score with --allocate, or plan with --no-allocate"
            )
    return plan_for(dense, scores, asked, fit=fit, held_out=held_out, progress=progress)


def settled(given: _Settings, rule: Criterion) -> _Settings:
    """Returns settings of which the preset, and what the criterion makes possible, have settled what was not given."""
    asked = with_preset(given)
    for name in ("allocate", "reconstruct"):
        if getattr(given, name) and (rule.depth or (name == "reconstruct" and given.bias_compensation)):
            what = f"the criterion {rule.name} removes whole blocks" if rule.depth else "so does bias_compensation"
            raise PlanError(f"{name} makes the best of heads and neurons, but {what}; leave out one of them")
    if rule.depth:
        multiple = given.neuron_multiple
        return replace(asked, allocate=False, reconstruct=False, neuron_multiple=1 if multiple is None else multiple)
    return replace(
        asked,
        allocate=asked.allocate and (given.allocate or asked.order == "amp"),
        reconstruct=asked.reconstruct and not asked.bias_compensation,
    )


def check_plannable(dense: Checkpoint, asked: PlanSettings, rule: Criterion) -> None:
    """Refuses what cannot be planned, before the weights are loaded."""
    options = _options(asked, dense, depth=rule.depth)
    if asked.target is None or parse_target(asked.target).kind != "speedup":
        check_request(dense.shape, options, depth=rule.depth)
    if asked.bias_compensation:
        check_biases(dense.architecture)
        if not rule.means:
            raise PlanError(f"bias compensation needs mean inputs, which the criterion {rule.name} lacks; use flap")


def plan_for(
    dense: Checkpoint,
    scores: ImportanceScores,
    asked: PlanSettings,
    *,
    fit: CalibrationSet | None,
    held_out: CalibrationSet | None,
    progress: Progress,
) -> PruningPlan:
    """Makes a plan for an opened model; the split is measured where samples are held out."""
    depth = scores.blocks is not None
    options = _options(asked, dense, depth=depth)
    if depth:
        return _marked(make_plan(scores, options), asked)
    target = None if asked.target is None else parse_target(asked.target)
    speedup = target.value if target is not None and target.kind == "speedup" else None
    plan = plan_on_model(
        dense, scores, options, asked, speedup=speedup, held_out=held_out,
        refit_on=fit if asked.reconstruct else None, progress=progress,
    )  # fmt: skip
    return _marked(plan, asked)


def _without_model(scores: ImportanceScores, given: PlanSettings, asked: PlanSettings) -> PruningPlan:
    target = None if asked.target is None else parse_target(asked.target)
    if given.allocate or (target is not None and target.kind != "params"):
        what = "allocate" if given.allocate else f"the target {asked.target}"
        raise PlanError(f"{what} is measured on the model, or asks for its files; give --model")
    options = _options(asked)
    if target is not None:
        options = replace(options, target_parameters=int(target.value))
    return _marked(make_plan(scores, options), asked)


def _options(asked: PlanSettings, dense: Checkpoint | None = None, *, depth: bool = False) -> PlanOptions:
    """Returns what is asked of a plan in numbers; with the model, a target of bytes or parameters is one of them."""
    names = (name for name in vars(PlanOptions()) if name != "target_parameters")
    options = PlanOptions(**{name: getattr(asked, name) for name in names})
    if dense is None or asked.target is None:
        return options
    return with_target(options, parse_target(asked.target), dense, depth=depth)


def _marked(plan: PruningPlan, asked: PlanSettings) -> PruningPlan:
    """Returns the plan with what is to be done to the weights that stay."""
    provenance = {**plan.provenance, "preset": asked.preset}
    return replace(plan, refitted=bool(asked.reconstruct), compensated=asked.bias_compensation, provenance=provenance)
