"""Every stage once, in order. START HERE.

    MODEL -> prune -> OUT                      scored, planned, sliced and verified in one process
    MODEL -> run -> OUT, evaluated, reported   prune, recover, evaluate and report

`stages/` has the stages of pruning one by one, `recovery/` the training, `evaluation/` and `report/` the rest.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amprune.cut.biases import check_biases
from amprune.cut.run import PrunedModel, apply_plan
from amprune.errors import CheckpointError, PlanError
from amprune.model.reader import read_checkpoint
from amprune.model.source import open_source
from amprune.model.staging import check_output
from amprune.model.writer import RECORDS, parse_size, write_json
from amprune.plan.make import check_request, make_plan
from amprune.plan.options import HeadsMode, NeuronMultiple, Only, Order, PlanOptions
from amprune.plan.target import parse_target
from amprune.running import Progress, no_progress
from amprune.scoring.catalogue import Criterion, find_criterion
from amprune.scoring.run import PathLike, score
from amprune.search.run import Computing, plan_on_model, with_target
from amprune.settings import DEFAULT as DEFAULT_PRESET
from amprune.settings import Preset, find_preset
from amprune.text.calibration import CalibrationSet, calibration_for

if TYPE_CHECKING:
    from amprune.recovery.settings import RecoverySettings
    from amprune.report.write import ReportFiles

logger = logging.getLogger(__name__)


def prune(
    model: PathLike,
    out: PathLike,
    *,
    ratio: float | None = None,
    target: str | None = None,
    preset: str = DEFAULT_PRESET,
    criterion: str | None = None,
    allocate: bool | None = None,
    reconstruct: bool | None = None,
    order: Order = "amp",
    only: Only | None = None,
    heads_mode: HeadsMode | None = None,
    heads_ratio: float | None = None,
    neurons_ratio: float | None = None,
    neuron_multiple: NeuronMultiple | None = None,
    head_multiple: int = 1,
    tensor_parallel: int = 1,
    protect_first: int = 4,
    protect_last: int = 2,
    bias_compensation: bool = False,
    calibration: PathLike | list[str] | CalibrationSet | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    max_length: int | None = None,
    prompts_only: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_tokens: int = 4096,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> PrunedModel:
    """Scores, plans, slices, refits and verifies a model in one go; the arguments are those of the single stages.

    What can fail without the weights (OUT, the ratio, the options) is checked before they are loaded.

    In the place of `ratio`, `target` is `params=100M` or `weight-bytes=4GiB`, the most that may stay, or
    `speedup=1.25x`, measured on this device. `preset` is `best`, what does least damage, or `paper`, the method as
    published; it settles what is not given of criterion, calibration, samples, tokens, max_length, `allocate` (choose
    how much of heads and of neurons goes by the damage on held-out calibration tokens; shares set by hand come first),
    `reconstruct` (refit the kept output weights on the calibration tokens) and `neuron_multiple` (`best` keeps a
    multiple that hardware likes, and meets a ratio as nearly as that allows; 1 meets it to within a neuron).

    Raises:
        AmpruneError: one of its children; nothing is left behind then.
    """
    settled = find_preset(preset)
    rule = find_criterion(criterion or settled.criterion)
    allocate, reconstruct = _settle(
        rule, settled, allocate=allocate, reconstruct=reconstruct, order=order, bias_compensation=bias_compensation
    )
    aim = None if target is None else parse_target(target)
    source = open_source(model, revision=revision, dtype=dtype)
    check_output(Path(out).expanduser(), overwrite=overwrite, protected=source.protected)
    parse_size(max_shard_size)
    dense = read_checkpoint(source.folder)
    if neuron_multiple is None:
        neuron_multiple = 1 if rule.depth else settled.neuron_multiple
    asked = PlanOptions(
        ratio=ratio, order=order, only=only, heads_mode=heads_mode, heads_ratio=heads_ratio,
        neurons_ratio=neurons_ratio, neuron_multiple=neuron_multiple, head_multiple=head_multiple,
        tensor_parallel=tensor_parallel, protect_first=protect_first, protect_last=protect_last, seed=seed,
    )  # fmt: skip
    options = with_target(asked, aim, dense, depth=rule.depth)
    speedup = aim.value if aim is not None and aim.kind == "speedup" else None
    if speedup is None:
        check_request(dense.shape, options, depth=rule.depth)
    if bias_compensation:
        check_biases(dense.architecture)
        if not rule.means:
            raise PlanError(f"bias compensation needs mean inputs, which the criterion {rule.name} lacks; use flap")
    drawn = held_out = None
    if rule.calibrated or allocate or reconstruct:
        by_hand = (samples, tokens) != (None, None)
        drawn = calibration_for(
            dense, calibration if calibration is not None else settled.calibration,
            samples=samples if by_hand else settled.samples, tokens=tokens if by_hand else settled.tokens,
            max_length=max_length or settled.max_length, prompts_only=prompts_only, seed=seed,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    fit = drawn
    if drawn is not None and allocate:
        fit, held_out = drawn.split()
    scores = score(
        model, criterion=rule.name, calibration=fit or [], seed=seed, device=device, dtype=dtype,
        device_map=device_map, batch_tokens=batch_tokens, revision=revision, trust_remote_code=trust_remote_code,
        progress=progress,
    )  # fmt: skip
    if rule.depth:
        plan = make_plan(scores, **vars(options))
    else:
        plan = plan_on_model(
            dense, scores, options, speedup=speedup, held_out=held_out if allocate else None,
            refit_on=fit if reconstruct else None, where=Computing(device, dtype, device_map, batch_tokens),
            progress=progress,
        )  # fmt: skip
    plan = replace(plan, provenance={**plan.provenance, "preset": preset})
    return apply_plan(
        model, plan, out, scores=scores, bias_compensation=bias_compensation,
        refit=drawn if reconstruct else None, device=device, batch_tokens=batch_tokens,
        max_shard_size=max_shard_size, overwrite=overwrite, dtype=dtype, revision=revision,
        trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip


def _settle(
    rule: Criterion,
    preset: Preset,
    *,
    allocate: bool | None,
    reconstruct: bool | None,
    order: Order,
    bias_compensation: bool,
) -> tuple[bool, bool]:
    """Returns whether to allocate and to reconstruct: as asked, else as the preset says where that has a meaning."""
    for name, wish in (("allocate", allocate), ("reconstruct", reconstruct)):
        if wish and (rule.depth or (name == "reconstruct" and bias_compensation)):
            what = f"the criterion {rule.name} removes whole blocks" if rule.depth else "so does bias_compensation"
            raise PlanError(f"{name} makes the best of heads and neurons, but {what}; leave out one of them")
    if rule.depth:
        return False, False
    if allocate is None:
        allocate = preset.allocate and order == "amp"
    if reconstruct is None:
        reconstruct = preset.reconstruct and not bias_compensation
    return allocate, reconstruct


def run(
    model: PathLike,
    out: PathLike,
    *,
    ratio: float | None = None,
    recovery: "RecoverySettings | None" = None,
    distil: bool = False,
    data: PathLike = "alpaca",
    training_samples: int | None = None,
    measure: bool = False,
    pruning: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> "ReportFiles":
    """Prunes a model, recovers and measures it when asked to, and draws the report; goes on where it was interrupted.

    Until OUT is whole, `OUT.run.json` holds what was asked for, and with recovery `OUT.pruned` the pruned model. The
    same call finds what is finished and does the rest.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        out: the folder to write; report and figures lie in its folder `amprune/`.
        ratio: share of all parameters to remove; left out where `pruning` has a target.
        recovery: trains after pruning.
        distil: the dense model teaches.
        data: for recovery, as in `recover`.
        training_samples: of `data`; None for all.
        measure: evaluates dense, pruned and recovered model.
        pruning: further arguments of `prune`.
        evaluation: further arguments of `evaluate`.
        device: of every stage.
        overwrite: replace an OUT that is a checkpoint.
        progress: told how far it is.

    Raises:
        AmpruneError: one of its children, from the stage that failed; what was finished stays.
    """
    # Heavy, and of no use to `prune`.
    from amprune.evaluation.run import evaluate
    from amprune.recovery.run import recover
    from amprune.report.write import write_report

    folder = Path(out).expanduser()
    pruned = folder.with_name(f"{folder.name}.pruned") if recovery is not None else folder
    request = {
        "model": str(model), "ratio": ratio, "recovery": asdict(recovery) if recovery else None, "distil": distil,
        "data": str(data), "training_samples": training_samples, "pruning": {**(pruning or {})},
    }  # fmt: skip
    state = _begin(open_source(model).protected, {folder, pruned}, folder, request, overwrite=overwrite)
    replace = overwrite or state.resumed  # what an interrupted run of the same request has written, it may replace
    if "prune" not in state.done:
        prune(model, pruned, ratio=ratio, device=device, overwrite=replace, progress=progress, **(pruning or {}))
        state.finish("prune")
    if recovery is not None and "recover" not in state.done:
        training = folder.with_name(f"{folder.name}.training")
        recover(
            pruned, folder, data=data, samples=training_samples, settings=recovery,
            teacher=model if distil else None, resume=state.resumed and training.exists(), device=device,
            overwrite=replace, progress=progress,
        )  # fmt: skip
        state.finish("recover")
    if measure:
        between = [f"{folder.name}, not recovered={pruned}"] if pruned != folder else []
        place, options = folder / RECORDS / "evaluation.json", evaluation or {}
        evaluate([f"dense={model}", *between, folder], place, device=device, progress=progress, **options)
    files = write_report(folder)
    state.file.unlink()
    if pruned != folder:
        shutil.rmtree(pruned)
    return files


@dataclass(frozen=True)
class _State:
    """What a run was asked for and has finished, in `OUT.run.json`."""

    file: Path
    request: dict[str, Any]
    done: list[str]
    resumed: bool

    def finish(self, stage: str) -> None:
        self.done.append(stage)
        self.save()

    def save(self) -> None:
        partial = self.file.with_name(f"{self.file.name}.partial")
        write_json(partial, {"request": self.request, "done": self.done})
        partial.replace(self.file)


def _begin(
    protected: tuple[Path, ...], places: set[Path], folder: Path, request: dict[str, Any], *, overwrite: bool
) -> _State:
    """Finds an interrupted run of the same request, or begins a new one where nothing is in its way."""
    file, request = folder.with_name(f"{folder.name}.run.json"), json.loads(json.dumps(request, default=str))
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before is not None and before.get("request") == request:
        logger.info("going on with the run that %s tells of; done: %s", file, ", ".join(before["done"]) or "nothing")
        return _State(file, request, before["done"], resumed=True)
    if before is not None and not overwrite:
        raise CheckpointError(
            f"{file} tells of an interrupted run that was asked for with other settings; ask for the same again, or "
            "give --overwrite to start anew"
        )
    for place in places:
        check_output(place, overwrite=overwrite, protected=protected)
    folder.parent.mkdir(parents=True, exist_ok=True)
    state = _State(file, request, [], resumed=False)
    state.save()
    return state
