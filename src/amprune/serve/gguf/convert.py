"""A Hugging Face folder -> GGUF, by llama.cpp's own converter and quantiser, each in a process of its own."""

import logging
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from amprune.errors import ExportError, UnsupportedModelError
from amprune.model.backends import GGUF_BLOCK, GGUF_SUPER_BLOCK, NARROW_ATTENTION
from amprune.model.llama_cpp import Program
from amprune.model.reader import Checkpoint
from amprune.records import resolved, write

logger = logging.getLogger(__name__)
_LINES = 3  # of a program's last words, in an error


@dataclass(frozen=True)
class Kind:
    """A type of weights."""

    bytes: float
    """A weight takes on disk, with room for tensors that take a larger type."""
    largest_gap: float | None
    """How far below the best a chosen token's logit may lie, in standard deviations of the logits; None: it is told."""
    block: int = 1
    """A row is quantised in blocks of so many weights; a row that they do not divide takes another type."""
    converted: bool = True
    """Whether the converter writes it; the others are the quantiser's."""


KINDS: Mapping[str, Kind] = {
    "f32": Kind(4.0, 1e-3),
    "f16": Kind(2.0, 0.25),
    "bf16": Kind(2.0, 0.25),
    "q8_0": Kind(1.1, 0.5, GGUF_BLOCK),
    "q4_0": Kind(0.8, None, GGUF_BLOCK, converted=False),
    "q4_k_m": Kind(0.9, None, GGUF_SUPER_BLOCK, converted=False),
}
# Model types of which llama.cpp takes the head size to be the hidden size over the heads, and the config under which it
# computes the same without doing so.
_TWINS: Mapping[str, Mapping[str, Any]] = {
    # Llama with biases of queries, keys and values, which llama.cpp takes where they are there.
    "qwen2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": False},
}
_PLAIN_ROPE = ("default", "linear")


def find_twin(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Returns entries of a config under which llama.cpp computes the same, where it would not load the model as it is.

    None of a model that it loads; one that it does not, and that has no twin, is refused.
    """
    shape, config = checkpoint.shape, checkpoint.config
    narrow = shape.model_type in {*NARROW_ATTENTION["llama.cpp"], *_TWINS}
    if not narrow or shape.num_attention_heads * shape.head_dim == shape.hidden_size:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) in _PLAIN_ROPE and not config.get("use_sliding_window")
    if not plain or shape.model_type not in _TWINS:
        raise UnsupportedModelError(
            f"llama.cpp does not run a {shape.model_type} model with {shape.num_attention_heads} heads of "
            f"{shape.head_dim} on a hidden size of {shape.hidden_size}: of this family it takes the head size to be "
            "the hidden size over the heads; prune neurons alone (--only neurons), or serve it with transformers "
            "or vLLM"
        )
    return {**_TWINS[shape.model_type], "head_dim": shape.head_dim}


@contextmanager
def as_twin(checkpoint: Checkpoint, twin: Mapping[str, Any] | None) -> Iterator[Path]:
    """Yields what to convert: the checkpoint's folder, or links to its files beside the config of its twin."""
    if twin is None:
        yield checkpoint.folder
        return
    with TemporaryDirectory(prefix="amprune-twin-") as place:
        for file in checkpoint.folder.iterdir():
            if file.is_file() and file.name != "config.json":
                os.symlink(resolved(file), Path(place) / file.name)
        write(Path(place) / "config.json", {**checkpoint.config, **twin})
        yield Path(place)


def convert(converter: Program, folder: Path, out: Path, kind: str, *, name: str, model_type: str) -> None:
    """Converts a checkpoint to one of the types that the converter writes."""
    # A name that begins with a dash is no option.
    arguments = (str(folder.absolute()), f"--outfile={out.absolute()}", "--outtype", kind, f"--model-name={name}")
    done = _run(converter, arguments)
    if done.returncode == 0 and out.is_file():
        return
    said = done.stderr
    if found := re.search(r"[Mm]odel (\S+) is not supported|Architecture '?(\S+?)'? not supported", said):
        raise UnsupportedModelError(
            f"llama.cpp does not know the family {model_type} ({found[1] or found[2]}), says its converter "
            f"{converter.path}; a newer llama.cpp may, or serve the model with transformers or vLLM"
        )
    if "pre-tokenizer was not recognized" in said:
        raise UnsupportedModelError(
            f"llama.cpp does not know the tokenizer of this {model_type} model, says its converter {converter.path}; "
            "it tells tokenizers by what they make of a test text, which added tokens can change. A newer llama.cpp "
            "may know it"
        )
    raise ExportError(f"llama.cpp's converter {converter.path} failed on {folder}: {_last_words(said)}")


def quantise(quantiser: Program, source: Path, out: Path, kind: str, *, threads: int) -> None:
    """Quantises a GGUF file."""
    done = _run(quantiser, (str(source.absolute()), str(out.absolute()), kind.upper(), str(threads)))
    if done.returncode != 0 or not out.is_file():
        raise ExportError(
            f"llama.cpp's quantiser {quantiser.path} failed on {kind}: {_last_words(done.stdout + done.stderr)}"
        )


def _run(program: Program, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [*program.command, *arguments]
    logger.debug("running %s", " ".join(command))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except OSError as error:
        raise ExportError(f"{program.path} cannot be run: {error}; give another --llama-cpp") from error
    logger.debug("%s\n%s", done.stdout, done.stderr)
    return done


def _last_words(text: str) -> str:
    """Returns the last lines that are neither bars nor empty."""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith("Writing:")]
    return " / ".join(told[-_LINES:]) or "it said nothing"
