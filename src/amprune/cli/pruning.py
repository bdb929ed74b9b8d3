"""From a model to a smaller one: inspect, score, plan, apply, verify, prune, demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from amprune.cli.display import (
    emit,
    plan_summary,
    progress,
    reported,
    result_summary,
    show_inspection,
    show_plan,
    show_result,
    show_scores,
    show_verification,
    stdout,
)
from amprune.cli.options import (
    Allocate,
    BatchTokens,
    BiasCompensation,
    Calibration,
    CriterionOption,
    Debug,
    Device,
    DeviceMap,
    Dtype,
    GgufDtype,
    HeadMultiple,
    HeadsModeOption,
    HeadsRatio,
    Json,
    MaxLength,
    MaxShardSize,
    Model,
    NeuronMultiple,
    NeuronsRatio,
    OnlyOption,
    OrderOption,
    Out,
    Overwrite,
    PresetCalibration,
    PresetCriterion,
    PresetMaxLength,
    PresetNeuronMultiple,
    PresetOption,
    PromptsOnly,
    ProtectFirst,
    ProtectLast,
    Ratio,
    Reconstruct,
    Revision,
    Samples,
    Seed,
    Target,
    TensorParallel,
    Tokens,
    TrustRemoteCode,
    app,
    options_of,
)
from amprune.settings import DEFAULT as DEFAULT_PRESET
from amprune.settings import PRESETS


@app.command("inspect")
def inspect_command(model: Model, revision: Revision = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what a model is made of and what can be removed from it."""
    with reported(debug):
        from amprune import inspect

        found = inspect(model, revision=revision)
        emit(found.to_dict(), as_json, lambda: show_inspection(found))


@app.command("score")
def score_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Score file to write.")],
    criterion: CriterionOption = "amp",
    calibration: Calibration = "alpaca",
    samples: Samples = None,
    tokens: Tokens = None,
    max_length: MaxLength = 512,
    prompts_only: PromptsOnly = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    batch_tokens: BatchTokens = 4096,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score every head, key-value group and neuron, or every block, by a criterion."""
    options = options_of(locals(), "output")
    with reported(debug):
        from amprune import score

        scores = score(**options, progress=progress)
        scores.save(output)
        summary = {
            "scores": str(output),
            "criterion": scores.criterion,
            "calibration": scores.calibration,
            "settings": scores.settings,
            "fingerprint": scores.fingerprint,
            "shape": scores.shape.to_dict(),
        }
        emit(summary, as_json, lambda: show_scores(scores, output))


@app.command("plan")
def plan_command(
    scores: Annotated[Path, typer.Argument(help="Score file.", metavar="SCORES")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan to write.")],
    ratio: Ratio = None,
    target_parameters: Annotated[
        str | None, typer.Option(help="In the place of a ratio, the most parameters that may stay, such as 100M.")
    ] = None,
    order: OrderOption = "amp",
    only: OnlyOption = None,
    heads_mode: HeadsModeOption = None,
    heads_ratio: HeadsRatio = None,
    neurons_ratio: NeuronsRatio = None,
    neuron_multiple: NeuronMultiple = 1,
    head_multiple: HeadMultiple = 1,
    tensor_parallel: TensorParallel = 1,
    protect_first: ProtectFirst = 4,
    protect_last: ProtectLast = 2,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose what to keep under an exact budget; needs neither the model nor a GPU."""
    options = options_of(locals(), "scores", "output", "target_parameters")
    with reported(debug):
        from amprune import ImportanceScores, make_plan
        from amprune.plan.target import parse_target

        most = None if target_parameters is None else int(parse_target(f"params={target_parameters}").value)
        plan = make_plan(ImportanceScores.load(scores), target_parameters=most, **options)
        plan.save(output)
        emit({"plan": str(output), **plan_summary(plan)}, as_json, lambda: show_plan(plan, f"Plan in {output}"))


@app.command("apply")
def apply_command(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Plan file.", metavar="PLAN")],
    out: Out,
    scores: Annotated[
        Path | None, typer.Option(help="The score file that the plan was made from; kept with the output.")
    ] = None,
    bias_compensation: BiasCompensation = False,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Refit kept output weights in closed form, on the calibration set.")
    ] = False,
    calibration: Calibration = PRESETS[DEFAULT_PRESET].calibration,
    samples: Samples = None,
    tokens: Tokens = None,
    max_length: MaxLength = PRESETS[DEFAULT_PRESET].max_length,
    seed: Seed = 0,
    device: Device = None,
    batch_tokens: BatchTokens = 4096,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dtype: GgufDtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Slice a model by a plan, write it shard by shard, and verify it."""
    drawing: dict[str, Any] = {
        "calibration": calibration, "samples": samples, "tokens": tokens, "max_length": max_length, "seed": seed,
        "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    options = options_of(
        locals(), "scores", "reconstruct", "calibration", "samples", "tokens", "max_length", "seed", "drawing"
    )
    with reported(debug):
        from amprune import ImportanceScores, apply_plan, draw_calibration

        refit = draw_calibration(model, **drawing) if reconstruct else None
        known = None if scores is None else ImportanceScores.load(scores)
        result = apply_plan(**options, scores=known, refit=refit, progress=progress)
        emit(result_summary(result), as_json, lambda: show_result(result))


@app.command("verify")
def verify_command(
    out: Out,
    dense: Annotated[str, typer.Option(help="The model that OUT was made from.", metavar="MODEL")],
    dtype: GgufDtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove that a written checkpoint is the dense model without the removed units."""
    options = options_of(locals())
    with reported(debug):
        from amprune import verify

        report = verify(**options, progress=progress)
        emit(report.to_dict(), as_json, lambda: show_verification(report))
        report.require()


@app.command("prune")
def prune_command(
    model: Model,
    out: Out,
    ratio: Ratio = None,
    target: Target = None,
    preset: PresetOption = DEFAULT_PRESET,
    criterion: PresetCriterion = None,
    allocate: Allocate = None,
    reconstruct: Reconstruct = None,
    order: OrderOption = "amp",
    only: OnlyOption = None,
    heads_mode: HeadsModeOption = None,
    heads_ratio: HeadsRatio = None,
    neurons_ratio: NeuronsRatio = None,
    neuron_multiple: PresetNeuronMultiple = None,
    head_multiple: HeadMultiple = 1,
    tensor_parallel: TensorParallel = 1,
    protect_first: ProtectFirst = 4,
    protect_last: ProtectLast = 2,
    bias_compensation: BiasCompensation = False,
    calibration: PresetCalibration = None,
    samples: Samples = None,
    tokens: Tokens = None,
    max_length: PresetMaxLength = None,
    prompts_only: PromptsOnly = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    batch_tokens: BatchTokens = 4096,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score, plan, slice, refit, write and verify in one go."""
    options = options_of(locals())
    with reported(debug):
        from amprune import prune

        result = prune(**options, progress=progress)
        emit(result_summary(result), as_json, lambda: show_result(result))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write, replaced when it exists.")] = Path("demo-smollm2-135m"),
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove.")] = 0.2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune SmolLM2-135M and let the dense and the pruned model answer a question."""
    with reported(debug):
        from amprune.cli.demo import MODEL, QUESTION, TOKENS, answers
        from amprune.pipeline import prune

        result = prune(MODEL, out, ratio=ratio, tokens=TOKENS, overwrite=True, progress=progress)
        dense, pruned = answers(out, progress=progress)
        summary = {**result_summary(result), "question": QUESTION, "dense_answer": dense, "pruned_answer": pruned}

        def show() -> None:
            show_result(result)
            stdout.print(f"\nQ: {QUESTION}\n\ndense:  {dense}\n\npruned: {pruned}\n", markup=False)
            stdout.print("The pruned model was not trained after pruning; that is what a recovery stage is for.")

        emit(summary, as_json, show)
