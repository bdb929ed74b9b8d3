"""An output: its shards, index and sidecar files, and the one rename by which it appears."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from amprune.errors import AmpruneError, CheckpointError
from amprune.model.files import WEIGHT_INDEX, TensorHeader, module_folders
from amprune.records import alone, resolved, umask, write
from amprune.running import release_memory

logger = logging.getLogger(__name__)

RECORDS = "amprune"
"""Subfolder of an output that holds how it was made: plan, scores, verification."""
_REPLACED = ("config.json", "README.md", "params.json")
"""Files that speak of the dense model; engines read params.json, Mistral's own config, in place of config.json."""
LOADED = (
    "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json",
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "spiece.model",
)  # fmt: skip
"""Files that loaders read beside config and weights; an output has those of its source."""
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite",
    ".npz", ".distcp",
}  # fmt: skip
_LEFTOVER = re.compile(r"checkpoint-\d+|global_step\d+|runs|wandb|trainer_state\.json|zero_to_fp32\.py|events\.out\..*")
"""Files and folders that a training leaves beside a model."""
_WEIGHT_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: str | int) -> int:
    """Returns the bytes of a size such as 200MB or 5GB; a number is one of bytes."""
    text = f"{size}B" if isinstance(size, int) else str(size)
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?B)\s*", text, flags=re.IGNORECASE)
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise CheckpointError(f"max_shard_size is {size!r}, expected a size above 0 such as 200MB or 5GB")
    return found


def write_shards(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    get: Callable[[str], torch.Tensor],
    *,
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] = MappingProxyType({}),
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Writes tensors as safetensors shards plus index, holding one shard in memory at a time; returns the file names.

    `headers` gives the final shapes, from which the shards are planned before the first byte is read; `get` reads and
    slices one tensor; every file gets the `metadata`; `advance` is told the bytes written.
    """
    sizes = {name: header.bytes for name, header in headers.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size),
    )
    total = sum(sizes.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise CheckpointError(
            f"{folder} needs {total / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on that disk"
        )
    for file, names in split.filename_to_tensors.items():
        save_file({name: get(name) for name in names}, folder / file, metadata={"format": "pt", **metadata})
        (folder / file).chmod(0o666 & ~umask())
        release_memory()
        advance(sum(sizes[name] for name in names))
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write(folder / WEIGHT_INDEX, index)
    return list(split.filename_to_tensors)


def copy_sidecars(source: Path, target: Path) -> list[str]:
    """Copies what belongs to a model beside its weights, and says in one line what is left out; returns the names."""
    copied, left = sidecars(source)
    for name in copied:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    if left:
        logger.info("not carried over: %s%s", ", ".join(left[:8]), f" and {len(left) - 8} more" if left[8:] else "")
    if code := [name for name in copied if name.endswith(".py")]:
        logger.info("carried over, never run: %s, the model's own code", ", ".join(code[:8]))
    return copied


def sidecars(source: Path) -> tuple[list[str], list[str]]:
    """Sorts the files beside a model's weights: what an output has, too, and what is left out.

    Left out are weights in any format, what a training leaves, the model card, records, descriptions of the dense
    sizes, hidden files, and links out of the folder but for files that loaders read. Of an embedding model the modules
    that `modules.json` names are carried over whole, weights included.
    """
    modules = module_folders(source)
    copied: list[str] = []
    left: list[str] = []
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if not file.is_file() or any(part.startswith(".") for part in relative.parts) or relative.parts[0] == RECORDS:
            continue
        if str(relative) in _REPLACED or relative.parts[0] == "original":
            continue
        weights = file.suffix.lower() in WEIGHT_SUFFIXES or _WEIGHT_INDEX.search(file.name)
        if (weights or any(map(_LEFTOVER.fullmatch, relative.parts))) and relative.parts[0] not in modules:
            left += [] if file.parent == source and weights else [str(relative)]
        elif _leads_out(file, source) and str(relative) not in LOADED:
            left.append(f"{relative} (a link out of the folder)")
        else:
            copied.append(str(relative))
    return copied, left


def _leads_out(file: Path, source: Path) -> bool:
    """Tells whether a link leads out of its folder; the hub's cache links to `blobs` beside its snapshots."""
    inside = (resolved(source), resolved(source).parent.parent / "blobs")
    return not any(folder in resolved(file).parents for folder in inside)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields `OUT.partial`; renames it to OUT when the block succeeds and removes it when the block raises.

    One run at a time writes an OUT. What a killed process leaves, the next run puts right: it removes the `.partial`
    folder and moves an OUT that was about to be replaced back; OUT is whole or absent. Where OUT is a symlink, the
    folder that it points to is written.
    """
    with _partial(out, partial(check_output, overwrite=overwrite, protected=protected)) as (folder, target, finish):
        yield folder
        finish()
        if target.exists():
            _replace(folder, target)
        else:
            folder.rename(target)


@contextmanager
def staged_file(out: Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields where to write a file, in a folder `OUT.partial` with room for more; at the end the file becomes OUT.

    The folder is gone afterwards; that of a killed process is removed by the next run.
    """
    with _partial(out, partial(check_file, overwrite=overwrite, protected=protected)) as (folder, target, finish):
        yield folder / target.name
        finish()
        (folder / target.name).replace(target)


@contextmanager
def _partial(out: Path, check: Callable[[Path], None]) -> Iterator[tuple[Path, Path, Callable[[], None]]]:
    """Yields `OUT.partial`, OUT without links, and what is to be called before the one becomes the other."""
    check(out)
    out = resolved(out)
    folder = out.with_name(f"{out.name}.partial")

    def finish() -> None:
        _sync(folder)
        check(out)  # it may have appeared in the meantime

    with _only_writer(out, folder) as killed, _write_errors(folder):
        if killed:
            _finish_replacing(out)
        _remove_stale(folder, killed=killed)
        check(out)  # it may be there by now, or again
        try:
            (folder / RECORDS).mkdir(parents=True)
            yield folder, out, finish
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # it is gone where it became OUT


def check_target(out: Path, protected: Iterable[Path], *, records: bool = False) -> None:
    """Refuses a file to write that is a source or lies in one, `records` aside where they may be added to."""
    target = resolved(out)
    for source in (resolved(path) for path in protected):
        if records and source / RECORDS in target.parents:
            continue
        if target == source or source in target.parents:
            raise CheckpointError(f"OUT {out} lies in the source {source}; choose a place outside of it")


def check_file(out: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """Refuses an OUT that would touch a source, that exists, or that is no file to overwrite."""
    check_target(out, protected)
    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise CheckpointError(f"OUT {out} exists and is no file; choose another name")
    if not overwrite:
        raise CheckpointError(f"OUT {out} exists; choose another name, or give --overwrite to replace it")


@contextmanager
def _only_writer(out: Path, folder: Path) -> Iterator[bool]:
    """Locks `OUT.partial.lock`; yields whether it was there, as a killed run leaves it.

    Without it, folders with the names that a run gives to its own are the user's.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    killed = lock.is_file() and lock.stat().st_size == 0
    with _write_errors(folder):
        with suppress(FileExistsError):
            out.parent.mkdir(parents=True)
        os.scandir(out.parent).close()  # it may be a file
    with alone(lock, f"OUT {out}"):
        yield killed


def check_output(out: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """Refuses an OUT that would touch a source, that exists, or that is no checkpoint to overwrite."""
    target = resolved(out)
    for source in (resolved(path) for path in protected):
        if target == source or source in target.parents or target in source.parents:
            raise CheckpointError(f"OUT {out} and the source {source} overlap; choose a folder outside of the source")
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(f"OUT {out} exists; choose another folder, or give --overwrite to replace it")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise CheckpointError(f"OUT {out} is the current folder, or holds it; change to another folder and run again")
    files = list(out.iterdir()) if out.is_dir() else [out]
    weights = any(file.suffix in WEIGHT_SUFFIXES for file in files)
    if files and not (weights and (out / "config.json").is_file()):
        raise CheckpointError(
            f"OUT {out} exists and is no checkpoint folder; it is not overwritten: remove it yourself"
        )


def _remove_stale(folder: Path, *, killed: bool) -> None:
    """Removes what a killed run left; anything else under that name is the user's."""
    if not os.path.lexists(folder):
        return
    is_folder = folder.is_dir() and not folder.is_symlink()
    if not is_folder or (any(folder.iterdir()) and not (killed and (folder / RECORDS).is_dir())):
        raise CheckpointError(f"{folder} is in the way and was not made by amprune; move it and run again")
    logger.info("removing %s, left by an interrupted run", folder)
    shutil.rmtree(folder)


def _replace(folder: Path, out: Path) -> None:
    """Replaces OUT by a folder; the old one is gone only once the new one stands.

    It has another name while it is deleted, so that a folder `OUT.replaced-PID` is always whole.
    """
    old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old.rename(out.with_name(f"{out.name}.removed-{os.getpid()}")))


def _finish_replacing(out: Path) -> None:
    """Ends what a killed `_replace` began: moves the old folder back where OUT is missing, and removes it otherwise.

    The caller holds OUT's lock, so that no process that owns such a folder is alive.
    """
    name = re.compile(re.escape(out.name) + r"\.(replaced|removed)-\d+")
    for old in sorted(out.parent.iterdir()):
        if not (found := name.fullmatch(old.name)) or old.is_symlink() or not old.is_dir():
            continue
        if found[1] == "replaced" and not out.exists():
            logger.info("moving %s back to %s, which an interrupted run was replacing", old, out)
            old.rename(out)
        else:
            logger.info("removing %s, left by an interrupted run", old)
            shutil.rmtree(old)


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turns failures of the disk into one clear error."""
    try:
        yield
    except AmpruneError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. Nothing was kept; free some space, or choose another folder, and run "
            "again"
        ) from error


def _sync(folder: Path) -> None:
    """Flushes every file, so that the rename never precedes the data."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
