"""LoRA: adapters on every linear layer of attention and MLP, and their way into the weights."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from amprune.errors import RecoveryError, reason
from amprune.model.architecture import quiet_transformers
from amprune.model.reader import Checkpoint
from amprune.settings import Training

_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight: `scale * up @ down`."""

    down: torch.Tensor
    """Shape (rank, inputs)."""
    up: torch.Tensor
    """Shape (outputs, rank)."""
    scale: float
    transposed: bool
    """The weight has the shape (inputs, outputs), as in GPT-2."""

    def to_weight(self) -> torch.Tensor:
        """Returns the product, in float32 and in the weight's own shape."""
        product = self.scale * (self.up @ self.down)
        return product.T if self.transposed else product

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns what the adapter adds to the layer's output, without multiplying the factors."""
        down, up = self.down.to(inputs.dtype), self.up.to(inputs.dtype)
        return self.scale * (inputs @ down.T) @ up.T


def with_adapters(model: Any, settings: Training) -> Any:
    """Freezes a model and puts an adapter, in float32, on every linear layer but the language-model head."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with quiet_transformers(), _quiet_peft():
        if settings.load_in_4bit:
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=settings.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        return get_peft_model(model, config)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silences what PEFT says of its own doing: names that transformers renames, and how GPT-2 stores its layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`.*gradient_checkpointing.*` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        yield


def enable_gradient_checkpointing(model: Any) -> None:
    """Lets a model compute activations anew in the backward pass; transformers 5.23 gave the method another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def read_adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, Update]:
    """Reads a saved adapter as updates of a checkpoint's tensors.

    Raises:
        RecoveryError: it is no adapter, a damaged one, or one of another model.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        stored = load_file(folder / "adapter_model.safetensors")
        scale, transposed = float(config["lora_alpha"]) / int(config["r"]), bool(config["fan_in_fan_out"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RecoveryError(f"{folder} holds no adapter, or a damaged one: {reason(error)}") from error
    modules = {name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in stored if name.endswith(_DOWN)}
    if stored.keys() != {f"{_PREFIX}{module}{factor}" for module in modules for factor in (_DOWN, _UP)}:
        raise RecoveryError(f"{folder} is no LoRA adapter, or a damaged one: its tensors are not in pairs")
    updates = {}
    for module in sorted(modules):
        down, up = (stored[f"{_PREFIX}{module}{factor}"].float() for factor in (_DOWN, _UP))
        updates[f"{module}.weight"] = Update(down, up, scale, transposed)
        _check_fits(updates[f"{module}.weight"], f"{module}.weight", checkpoint, folder)
    return updates


def _check_fits(update: Update, tensor: str, checkpoint: Checkpoint, folder: Path) -> None:
    if tensor not in checkpoint:
        raise RecoveryError(f"{folder} is the adapter of another model: {checkpoint.folder} has no tensor {tensor}")
    shape = (update.up.shape[0], update.down.shape[1])
    expected, found = checkpoint.header(tensor).shape, shape[::-1] if update.transposed else shape
    if found != expected:
        raise RecoveryError(
            f"{folder} is the adapter of another model: it changes {tensor} by a matrix of {found}, but in "
            f"{checkpoint.folder} it is {expected}"
        )
