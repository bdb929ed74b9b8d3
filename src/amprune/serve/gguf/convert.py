"""A Hugging Face folder -> GGUF, by llama.cpp's own converter and quantiser, each in a process of its own."""

import logging
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from amprune.errors import ExportError, UnsupportedModelError
from amprune.model.llama_cpp_tools import Program

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]
CONVERTED: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
"""Types that the converter writes; the others are the quantiser's."""

logger = logging.getLogger(__name__)
_LINES = 3  # of a program's last words, in an error


def convert(converter: Program, folder: Path, out: Path, kind: str, *, name: str, model_type: str) -> None:
    """Converts a checkpoint to one of the types that the converter writes.

    Raises:
        UnsupportedModelError: the converter does not know the architecture, or the tokenizer.
        ExportError: the converter failed.
    """
    arguments = (str(folder), "--outfile", str(out), "--outtype", kind, "--model-name", name)
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
    """Quantises a GGUF file.

    Raises:
        ExportError: the quantiser failed.
    """
    done = _run(quantiser, (str(source), str(out), kind.upper(), str(threads)))
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
