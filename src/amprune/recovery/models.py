"""The model to train, with its adapters, and the model that teaches, loaded as the settings want them."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from amprune.errors import RecoveryError, required
from amprune.model.architecture import make_config, quiet_transformers
from amprune.model.loading import has_tokenizer, load_tokenizer, loaded_model
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.source import Source
from amprune.records import read_object
from amprune.settings import RecoverySettings, Training

logger = logging.getLogger(__name__)


@contextmanager
def trainable_model(folder: Path, settings: RecoverySettings) -> Iterator[Any]:
    """Loads the model to train, with its adapter unless it is trained in full."""
    if settings.load_in_4bit:
        yield with_adapters(_in_four_bits(folder), settings)
        return
    with loaded_model(folder, dtype=_training_dtype(folder, settings), device="cpu") as model:
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


def _training_dtype(folder: Path, settings: RecoverySettings) -> str:
    """Full fine-tuning keeps its weights in float32; float16 would overflow, and is never trained in."""
    if settings.full:
        return "float32"
    dtype = settings.dtype
    stored = str(read_checkpoint(folder).dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if stored in ("float16", "bfloat16"):
        wanted = "bfloat16" if bfloat16_works(settings.device) else "float32"
        if stored != wanted:
            logger.info("training in %s in place of %s", wanted, stored)
        return wanted
    return "float32" if dtype == "auto" else dtype


def bfloat16_works(device: str | None) -> bool:
    """Tells whether a device computes in bfloat16; every CPU does."""
    on_cuda = torch.cuda.is_available() and not (device or "cuda").startswith("cpu")
    return torch.cuda.is_bf16_supported() if on_cuda else True


def check_device(settings: RecoverySettings) -> None:
    """Refuses what this machine cannot train on."""
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
def teaching_model(source: Source | None, *, dtype: str) -> Iterator[PreTrainedModel | None]:
    """Loads the dense model that teaches, where there is one."""
    if source is None:
        yield None
        return
    with loaded_model(source.folder, dtype=dtype, device="cpu") as teacher:
        yield teacher.requires_grad_(False)
