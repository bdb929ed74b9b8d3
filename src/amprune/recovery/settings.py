"""How a pruned model is recovered; the defaults are the paper's recipe (section IV-A)."""

from dataclasses import asdict, dataclass
from typing import Any

from amprune.errors import RecoveryError


@dataclass(frozen=True)
class RecoverySettings:
    """LoRA fine-tuning on instructions, or full fine-tuning, with or without a teacher."""

    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    full: bool = False
    """Train every weight in place of LoRA."""
    load_in_4bit: bool = False
    """QLoRA: the frozen weights in four bits while training; needs CUDA and bitsandbytes."""
    learning_rate: float = 3e-4
    epochs: float = 2.0
    max_steps: int | None = None
    """Stop after this many optimizer steps in place of `epochs`."""
    batch_size: int = 1
    """Samples a forward pass, on each device."""
    gradient_accumulation: int = 16
    """Forward passes an optimizer step: the paper's text says batch size 1, its released code accumulates 16."""
    max_length: int = 512
    packing: bool = False
    """Fill sequences of `max_length` tokens with several samples, which then see each other's tokens."""
    validation_share: float = 0.02
    """Held out for the validation loss; 0 for none."""
    save_steps: int = 200
    logging_steps: int = 10
    validation_steps: int | None = None
    """None: five times in the run."""
    temperature: float = 1.0
    teacher_weight: float = 0.5
    """Of the divergence from the teacher in the loss; the rest is the data's. Only with a teacher."""
    gradient_checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises RecoveryError for what cannot be trained with."""
        least = {"lora_rank": 1, "batch_size": 1, "gradient_accumulation": 1, "max_length": 2, "save_steps": 1,
                 "logging_steps": 1}  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise RecoveryError(f"{_words(name)} is {getattr(self, name)}, expected {smallest} or more")
        for name in ("lora_alpha", "learning_rate", "epochs", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecoveryError(f"{_words(name)} is {getattr(self, name)}, expected a positive number")
        for name in ("lora_dropout", "validation_share", "teacher_weight"):
            value, whole = getattr(self, name), name == "teacher_weight"
            if not (0 <= value < 1 or (whole and value == 1)):
                expected = "0 to 1" if whole else "0 or more and below 1"
                raise RecoveryError(f"{_words(name)} is {value}, expected {expected}")
        for name in ("max_steps", "validation_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecoveryError(f"{_words(name)} is {value}, expected 1 or more")
        if self.full and self.load_in_4bit:
            raise RecoveryError("weights in four bits cannot be trained in full; leave out --full or --load-in-4bit")

    def to_dict(self) -> dict[str, Any]:
        """Returns what a record keeps."""
        return asdict(self)


def _words(name: str) -> str:
    return f"--{name.replace('_', '-')}"
