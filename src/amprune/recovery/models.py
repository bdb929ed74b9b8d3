"""The model to train, with its adapters, and the model that teaches, loaded as the settings want them."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from amprune.cut.slicing import check_plan_fits
from amprune.errors import AmpruneError, MissingDependencyError, PlanError, RecoveryError, guess, required
from amprune.model.architecture import make_config, quiet_transformers
from amprune.model.loading import has_tokenizer, is_emulated, load_tokenizer, loaded_model
from amprune.model.reader import Checkpoint, open_model
from amprune.model.recovered import RECORD
from amprune.model.source import Source
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.prove.checks import VERIFICATION
from amprune.records import read_object
from amprune.settings import RecoverySettings, Training

logger = logging.getLogger(__name__)
_REPORTERS = ("tensorboard", "wandb", "trackio")


@contextmanager
def trainable_model(base: Checkpoint, settings: RecoverySettings) -> Iterator[Any]:
    """Loads the model to train, with its adapter unless it is trained in full."""
    if settings.load_in_4bit:
        yield with_adapters(_in_four_bits(base.folder), settings)
        return
    kind, asked = training_dtype(base, settings), base.computed_in(settings.dtype)
    if not settings.full and kind != asked:
        logger.info("training in %s in place of %s", _name_of(kind), _name_of(asked))
    with loaded_model(base, dtype=_name_of(kind), device="cpu") as model:
        model.config.use_cache = False
        if settings.gradient_checkpointing:
            # transformers 5.23 gave the method another name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        yield model if settings.full else with_adapters(model, settings)


def with_adapters(model: Any, settings: Training) -> Any:
    """Freezes a model and puts an adapter, in float32, on every linear layer but the language-model head."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    with quiet_transformers(), warnings.catch_warnings():
        # PEFT speaks of its own doing: names that transformers renames, and how GPT-2 stores its layers.
        warnings.filterwarnings("ignore", r"`.*gradient_checkpointing.*` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        if settings.load_in_4bit:
            model = prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=settings.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )  # fmt: skip
        return get_peft_model(model, config)


def training_dtype(checkpoint: Checkpoint, settings: RecoverySettings) -> torch.dtype:
    """Returns the dtype that weights are held in while a model is trained, or teaches.

    All that are trained are in float32. Others keep theirs, but for float16, which would overflow, and for what the
    device only emulates.
    """
    if settings.full:
        return torch.float32
    kind = checkpoint.computed_in(settings.dtype)
    if kind in (torch.float16, torch.bfloat16):
        kind = torch.bfloat16 if bfloat16_works(settings.device) or settings.dtype == "bfloat16" else torch.float32
    return kind if settings.dtype != "auto" or kind == torch.bfloat16 else torch.float32


def on_accelerator(device: str | None) -> bool:
    """Tells whether training is on CUDA."""
    return torch.cuda.is_available() and not (device or "cuda").startswith("cpu")


def processes() -> int:
    """Returns how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def bfloat16_works(device: str | None) -> bool:
    """Tells whether a device computes in bfloat16 with units of its own."""
    return torch.cuda.is_bf16_supported() if on_accelerator(device) else not is_emulated(torch.bfloat16)


def check_device(settings: RecoverySettings) -> None:
    """Refuses what this machine cannot train on, or tell of."""
    device = settings.device
    if device not in (None, "cpu", "cuda", "cuda:0"):
        raise RecoveryError(
            f"--device is {device!r}, expected cpu or cuda; choose one of several by CUDA_VISIBLE_DEVICES, or train on "
            "all of them with `accelerate launch -m amprune recover ...`"
        )
    if device not in (None, "cpu") and not torch.cuda.is_available():
        raise RecoveryError(f"--device is {device}, but there is no CUDA device here; leave it out, or give cpu")
    if settings.load_in_4bit and (device == "cpu" or not torch.cuda.is_available()):
        raise RecoveryError("--load-in-4bit needs a CUDA device, and there is none here; leave it out")
    if settings.load_in_4bit:
        required("--load-in-4bit", "bitsandbytes")
    for name in settings.report_to:
        if name not in _REPORTERS:
            raise RecoveryError(f"--report-to is {name!r}; {guess(name, _REPORTERS)}expected {', '.join(_REPORTERS)}")
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"--report-to {name} needs {name}, which is not installed: `pip install {name}`"
            )


def _in_four_bits(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32,
    )  # fmt: skip
    place = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with quiet_transformers(bars_on_terminal=True):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=place)
    model.config.use_cache = False
    return model


def find_teacher(settings: RecoverySettings, source: Source) -> tuple[Source | None, Checkpoint | None]:
    """Finds the dense model that teaches: the one that is named, else of the preset `best` that of the records.

    Raises RecoveryError where there should be one and none is found, or another than the model was pruned from.
    """
    if settings.teacher_weight == 0 or (settings.teacher is None and settings.preset != "best"):
        return None, None
    if settings.teacher is not None:
        return open_model(settings.teacher, dtype=settings.dtype)
    otherwise = "give the dense model by --teacher, or --teacher-weight 0 to learn from the data alone"
    if (name := dense_of(source)) is None:
        raise RecoveryError(f"the records of {source.name} do not say which model it was made from; {otherwise}")
    plan = PruningPlan.load(source.folder / RECORDS / "plan.json")
    try:
        teacher, dense = open_model(name, dtype=settings.dtype)
        check_plan_fits(plan, dense.shape, dense.fingerprint, where=name)
    except PlanError as error:
        raise RecoveryError(f"{name} is no longer the model that {source.name} was made from; {otherwise}") from error
    except AmpruneError as error:
        raise RecoveryError(
            f"{source.name} was made from {name}, which cannot be opened here: {error}; {otherwise}"
        ) from error
    logger.info("%s teaches, which %s was made from", name, source.name)
    return teacher, dense


def dense_of(source: Source) -> str | None:
    """Returns the MODEL that a folder was made from, as its records say."""
    for record in (VERIFICATION, RECORD):
        if (file := source.folder / RECORDS / record).is_file():
            name = read_object(file).get("dense")
            return name if isinstance(name, str) else None
    return None


def check_teacher(teacher: Source | None, student: Checkpoint, tokenizer: Any) -> None:
    """Refuses a teacher whose distributions are over other tokens, however many they are."""
    if teacher is None:
        return
    theirs, ours = (
        int(make_config(read_object(folder / "config.json"), where=str(folder)).vocab_size)
        for folder in (teacher.folder, student.folder)
    )
    padded = has_tokenizer(teacher.folder) and max(tokenizer.get_vocab().values(), default=0) < min(ours, theirs)
    if ours != theirs and not padded:
        raise RecoveryError(
            f"the teacher {teacher.name} has a vocabulary of {theirs:,} tokens, the student one of {ours:,}; give the "
            "dense model that it was pruned from"
        )
    if has_tokenizer(teacher.folder):
        of_teacher, of_student = load_tokenizer(teacher.folder).get_vocab(), tokenizer.get_vocab()
        if other := sorted(token for token in of_student if of_teacher.get(token) != of_student[token]):
            raise RecoveryError(
                f"the teacher {teacher.name} has other tokens than the student: {len(other):,} of {len(of_student):,} "
                f"have another id or none, such as {other[0]!r}; give the dense model that it was pruned from"
            )


@contextmanager
def teaching_model(dense: Checkpoint | None, settings: RecoverySettings) -> Iterator[PreTrainedModel | None]:
    """Loads the dense model that teaches, where there is one."""
    if dense is None:
        yield None
        return
    kind = training_dtype(dense, replace(settings, full=False))
    with loaded_model(dense, dtype=_name_of(kind), device="cpu") as teacher:
        yield teacher.requires_grad_(False)


def _name_of(kind: torch.dtype) -> str:
    """Returns what a dtype is called in settings."""
    return str(kind).removeprefix("torch.")
