"""The folder that an output, a folder or a file, is written in, and the one rename by which it appears."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from amprune.errors import AmpruneError, CheckpointError
from amprune.model.writer import RECORDS, WEIGHT_SUFFIXES

logger = logging.getLogger(__name__)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields `OUT.partial`; renames it to OUT when the block succeeds and removes it when the block raises.

    One run at a time writes an OUT. What a killed process leaves, the next run puts right: it removes the `.partial`
    folder and moves an OUT that was about to be replaced back; OUT is whole or absent. Where OUT is a symlink, the
    folder that it points to is written.
    """
    check_output(out, overwrite=overwrite, protected=protected)
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial")
    with _only_writer(out, partial):
        with _write_errors(partial):
            _finish_replacing(out)
            check_output(out, overwrite=overwrite, protected=protected)  # it may be there by now, or again
            _remove_stale(partial)
        try:
            with _write_errors(partial):
                (partial / RECORDS).mkdir(parents=True)
                yield partial
                _sync(partial)
                check_output(out, overwrite=overwrite, protected=protected)  # it may have appeared in the meantime
                if out.exists():
                    _replace(partial, out)
                else:
                    partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def staged_file(out: Path, *, overwrite: bool = False, protected: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields where to write a file, in a folder `OUT.partial` with room for more; at the end the file becomes OUT.

    The folder is gone afterwards; that of a killed process is removed by the next run.
    """
    check_file(out, overwrite=overwrite, protected=protected)
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial")
    with _only_writer(out, partial):
        with _write_errors(partial):
            _remove_stale(partial)
        try:
            with _write_errors(partial):
                (partial / RECORDS).mkdir(parents=True)
                yield partial / out.name
                _sync(partial)
                check_file(out, overwrite=overwrite, protected=protected)  # it may have appeared in the meantime
                (partial / out.name).replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_file(out: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """Refuses an OUT that would touch a source, that exists, or that is no file to overwrite."""
    target = out.resolve()
    for source in (path.resolve() for path in protected):
        if target == source or source in target.parents:
            raise CheckpointError(f"OUT {out} lies in the source {source}; choose a place outside of it")
    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise CheckpointError(f"OUT {out} exists and is no file; choose another name")
    if not overwrite:
        raise CheckpointError(f"OUT {out} exists; choose another name, or give --overwrite to replace it")


@contextmanager
def _only_writer(out: Path, partial: Path) -> Iterator[None]:
    """Locks `OUT.partial.lock` and removes it at the end; the system unlocks it when the process dies."""
    file = partial.with_name(f"{partial.name}.lock")
    lock = FileLock(file)
    with _write_errors(partial):
        with suppress(FileExistsError):
            out.parent.mkdir(parents=True)
        os.scandir(out.parent).close()  # it may be a file
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise CheckpointError(
                f"OUT {out} is being written by another run, which holds {file}; wait until it ends, or choose "
                "another folder"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            if file.stat().st_size == 0:  # else it is the user's
                file.unlink()  # while it is locked: afterwards it may be that of the next run
        lock.release()


def check_output(out: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """Refuses an OUT that would touch a source, that exists, or that is no checkpoint to overwrite."""
    target = out.resolve()
    for source in (path.resolve() for path in protected):
        if target == source or source in target.parents or target in source.parents:
            raise CheckpointError(f"OUT {out} and the source {source} overlap; choose a folder outside of the source")
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(f"OUT {out} exists; choose another folder, or give --overwrite to replace it")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise CheckpointError(f"OUT {out} is the current folder, or holds it; change to another folder and run again")
    if not out.is_dir() or not (_is_checkpoint(out) or not any(out.iterdir())):
        raise CheckpointError(
            f"OUT {out} exists and is no checkpoint folder; it is not overwritten: remove it yourself"
        )


def _is_checkpoint(folder: Path) -> bool:
    weights = any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir())
    return weights and (folder / "config.json").is_file()


def _remove_stale(partial: Path) -> None:
    """Removes what a killed run left; anything else under that name is the user's."""
    if not os.path.lexists(partial):
        return
    ours = partial.is_dir() and not partial.is_symlink()
    if not ours or not ((partial / RECORDS).is_dir() or not any(partial.iterdir())):
        raise CheckpointError(f"{partial} is in the way and was not made by amprune; move it and run again")
    logger.info("removing %s, left by an interrupted run", partial)
    shutil.rmtree(partial)


def _replace(partial: Path, out: Path) -> None:
    """Puts `partial` in the place of `out`; the old folder is gone only once the new one stands.

    It has another name while it is deleted, so that a folder `OUT.replaced-PID` is always whole.
    """
    old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
    out.rename(old)
    try:
        partial.rename(out)
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
def _write_errors(partial: Path) -> Iterator[None]:
    """Turns failures of the disk into one clear error."""
    try:
        yield
    except AmpruneError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {partial}: {error}. Nothing was kept; free some space, or choose another folder, and run "
            "again"
        ) from error


def _sync(folder: Path) -> None:
    """Flushes every file, so that the rename never precedes the data."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
