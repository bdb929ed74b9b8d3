"""Training after pruning, and the whole way in one command: recover and run."""

from typing import Annotated

import typer

from amprune.cli.display import emit, progress, reported, show_recovery, show_report
from amprune.cli.options import (
    Allocate,
    DataDir,
    Debug,
    Device,
    Dtype,
    HeadMultiple,
    Json,
    Limit,
    MaxShardSize,
    Model,
    Out,
    Overwrite,
    PresetCalibration,
    PresetCriterion,
    PresetNeuronMultiple,
    PresetOption,
    Ratio,
    Reconstruct,
    Revision,
    Samples,
    Target,
    TensorParallel,
    Tokens,
    TrustRemoteCode,
    Windows,
    app,
    words,
)
from amprune.settings import DEFAULT as DEFAULT_PRESET

Data = Annotated[str, typer.Option(help="alpaca (from the hub), builtin, or a .json, .jsonl, .parquet or .txt file.")]
TrainingSamples = Annotated[int | None, typer.Option("--samples", help="Samples to draw (default: all).")]
Teacher = Annotated[str | None, typer.Option(help="Dense model to learn from, beside the data.", metavar="MODEL")]
MaxSteps = Annotated[int | None, typer.Option(help="Optimizer steps, in place of --epochs.")]


@app.command("recover")
def recover_command(
    model: Model,
    out: Out,
    data: Data = "alpaca",
    samples: TrainingSamples = None,
    teacher: Teacher = None,
    teacher_weight: Annotated[float, typer.Option(help="Of the teacher in the loss; the rest is the data's.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 2.0,
    max_steps: MaxSteps = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; falls linearly to 0.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass, on each device.")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes an optimizer step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each sample.")] = 512,
    packing: Annotated[bool, typer.Option("--packing", help="Fill sequences with several samples.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="The adapters are scaled by alpha / rank.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Of the adapters' inputs.")] = 0.05,
    full: Annotated[bool, typer.Option("--full", help="Train every weight in place of LoRA.")] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="QLoRA; needs CUDA and bitsandbytes.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")
    ] = False,
    validation_share: Annotated[float, typer.Option(help="Held out for the validation loss.")] = 0.02,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    logging_steps: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    evaluate_each_epoch: Annotated[
        bool, typer.Option("--evaluate-each-epoch", help="Measure perplexity and tasks after every epoch.")
    ] = False,
    data_dir: DataDir = None,
    limit: Limit = None,
    windows: Windows = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the order, the adapters and the dropout.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring a pruned model back by LoRA fine-tuning, and write it as an ordinary checkpoint."""
    with reported(debug, kept=out.with_name(f"{out.name}.training"), again="--resume"):
        from amprune.recovery.run import measure_epochs, recover
        from amprune.recovery.settings import RecoverySettings

        settings = RecoverySettings(
            lora_rank=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, full=full, load_in_4bit=load_in_4bit,
            learning_rate=learning_rate, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
            gradient_accumulation=gradient_accumulation, max_length=max_length, packing=packing,
            validation_share=validation_share, save_steps=save_steps, logging_steps=logging_steps,
            temperature=temperature, teacher_weight=teacher_weight, gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )  # fmt: skip
        result = recover(
            model, out, data=data, samples=samples, settings=settings, teacher=teacher, resume=resume,
            keep_epochs=evaluate_each_epoch, device=device, dtype=dtype, max_shard_size=max_shard_size,
            overwrite=overwrite, revision=revision, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
        if result is None:  # one of the processes that do not write
            return
        if evaluate_each_epoch:
            measure_epochs(
                model, result, data_dir=data_dir, limit=limit, windows=windows, device=device, progress=progress
            )
        emit({"out": str(result.folder), **result.record}, as_json, lambda: show_recovery(result))


@app.command("run")
def run_command(
    model: Model,
    out: Out,
    ratio: Ratio = None,
    target: Target = None,
    preset: PresetOption = DEFAULT_PRESET,
    recover: Annotated[bool, typer.Option("--recover", help="Train after pruning.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure dense, pruned and recovered model.")] = False,
    criterion: PresetCriterion = None,
    allocate: Allocate = None,
    reconstruct: Reconstruct = None,
    calibration: PresetCalibration = None,
    calibration_samples: Samples = None,
    calibration_tokens: Tokens = None,
    neuron_multiple: PresetNeuronMultiple = None,
    head_multiple: HeadMultiple = 1,
    tensor_parallel: TensorParallel = 1,
    data: Data = "alpaca",
    training_samples: Annotated[int | None, typer.Option(help="Samples to train on (default: all).")] = None,
    distil: Annotated[bool, typer.Option("--distil", help="Let the dense model teach.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 2.0,
    max_steps: MaxSteps = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes an optimizer step.")] = 16,
    data_dir: DataDir = None,
    measure: Annotated[
        str, typer.Option(help="What --evaluate measures, with commas.")
    ] = "perplexity,zero_shot,latency,energy",
    limit: Limit = None,
    windows: Windows = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Do it all: prune, recover, evaluate, report; the same command goes on where it was interrupted."""
    with reported(debug, kept=out.with_name(f"{out.name}.run.json")):
        from amprune.pipeline import run
        from amprune.recovery.settings import RecoverySettings

        training = RecoverySettings(
            epochs=epochs, max_steps=max_steps, gradient_accumulation=gradient_accumulation, seed=seed
        )
        files = run(
            model, out, ratio=ratio, recovery=training if recover else None, distil=distil, data=data,
            training_samples=training_samples, measure=evaluate, device=device, overwrite=overwrite,
            pruning={
                "target": target, "preset": preset, "criterion": criterion, "allocate": allocate,
                "reconstruct": reconstruct, "calibration": calibration, "samples": calibration_samples,
                "tokens": calibration_tokens, "seed": seed, "neuron_multiple": neuron_multiple,
                "head_multiple": head_multiple, "tensor_parallel": tensor_parallel,
            },
            evaluation={
                "measure": words(measure), "data_dir": data_dir, "limit": limit, "windows": windows,
            },
            progress=progress,
        )  # fmt: skip
        summary = {"out": str(out), "markdown": str(files.markdown), "html": str(files.html)}
        emit(summary, as_json, lambda: show_report(files))
