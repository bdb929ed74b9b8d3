"""The model to train and the model that teaches, loaded as the settings want them."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from amprune.errors import RecoveryError, required
from amprune.model.architecture import make_config, quiet_transformers
from amprune.model.files import read_json
from amprune.model.loading import loaded_model
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.source import Source
from amprune.recovery.adapters import enable_gradient_checkpointing, with_adapters
from amprune.settings import RecoverySettings

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
            enable_gradient_checkpointing(model)
        yield model if settings.full else with_adapters(model, settings)


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
    """Refuses what this machine cannot train on.

    Raises:
        RecoveryError: no such device.
        MissingDependencyError: four bits without bitsandbytes.
    """
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


def check_teacher(teacher: Source | None, student: Checkpoint) -> None:
    """Refuses a teacher whose distributions are over other tokens.

    Raises:
        RecoveryError: its vocabulary is another.
    """
    if teacher is None:
        return
    theirs, ours = _vocabulary(teacher.folder), _vocabulary(student.folder)
    if ours != theirs:
        raise RecoveryError(
            f"the teacher {teacher.name} has a vocabulary of {theirs:,} tokens, the student one of {ours:,}; give the "
            "dense model that it was pruned from"
        )


def _vocabulary(folder: Path) -> int:
    return int(make_config(read_json(folder / "config.json"), where=str(folder)).vocab_size)


@contextmanager
def teaching_model(source: Source | None, *, dtype: str) -> Iterator[PreTrainedModel | None]:
    """Loads the dense model that teaches, where there is one."""
    if source is None:
        yield None
        return
    with loaded_model(source.folder, dtype=dtype, device="cpu") as teacher:
        yield teacher.requires_grad_(False)
