"""The folder of a run, `OUT.training`: what was asked for, checkpoints, the log; and going on after an interruption."""

import json
import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amprune.errors import CheckpointError, RecoveryError
from amprune.model.recovered import LOG
from amprune.records import check_readable, go_on, read_object, sha256, write, write_text

logger = logging.getLogger(__name__)
EPOCHS = "epochs"
_REQUEST = "request.json"
_HASHES = "sha256.json"
_STATE = "trainer_state.json"
_OWN = re.compile(r"checkpoint-\d+|epochs|training\.jsonl|\..+\.partial")


def begin_run(folder: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Makes the folder of a run, or finds that of an interrupted run of the same request."""
    file = folder / _REQUEST
    if folder.exists() and not folder.is_dir():
        raise RecoveryError(f"{folder} is in the way, which is no folder; move it, or choose another OUT")
    _remove_remains(folder)
    if folder.exists() and any(folder.iterdir()):
        if not file.is_file():
            raise RecoveryError(f"{folder} is in the way and was not made by amprune; move it, or choose another OUT")
        start = last_checkpoint(folder)
        if resume:
            before = read_object(file, error=RecoveryError, hint=f"; it is damaged: remove {folder} and start anew")
            if otherwise := go_on({"request": before, "done": []}, request).otherwise:
                raise RecoveryError(
                    f"the interrupted run in {folder} was asked for with another {', '.join(otherwise)}; ask for the "
                    "same again, or remove the folder and start anew"
                )
            if (log := folder / LOG).exists():
                check_readable(log, error=RecoveryError, hint="; remove it")
            discard_damaged(folder)
            start = last_checkpoint(folder)
            logger.info("going on from %s", start.name if start else "the start: there is no checkpoint yet")
            return
        if not overwrite:
            found = f"last checkpoint {start.name}" if start else "without a checkpoint yet"
            raise RecoveryError(f"{folder} holds an interrupted run, {found}; go on with --resume, or remove it")
        shutil.rmtree(folder)
    elif resume:
        logger.info("%s holds no interrupted run; training starts anew", folder)
    write(file, request, error=RecoveryError)


def _remove_remains(folder: Path) -> None:
    """Removes what a run that was killed while it removed its folder has left: all of it its own, but no request."""
    left = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if left and _REQUEST not in left and all(map(_OWN.fullmatch, left)):
        logger.info("removing %s, left by an interrupted run", folder)
        shutil.rmtree(folder)


def mark_whole(checkpoint: Path) -> None:
    """Keeps the hashes of a checkpoint that was saved, by which damage is noticed."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and not path.name.startswith("rng_state"))
    write(checkpoint / _HASHES, {path.name: sha256(path) for path in files}, error=RecoveryError)


def discard_damaged(folder: Path) -> None:
    """Removes checkpoints from the newest on until one is as it was saved."""
    while (last := last_checkpoint(folder)) is not None and (damaged := _damaged(last)) is not None:
        logger.warning("%s is damaged (%s) and removed; going on from the one before", last, damaged)
        shutil.rmtree(last)


def _damaged(checkpoint: Path) -> str | None:
    """Names a file of a checkpoint that is not as it was saved; other processes' random states by their own sums."""
    if endless := [path for path in checkpoint.iterdir() if not (path.is_file() or path.is_dir())]:
        return endless[0].name
    if (checkpoint / _HASHES).exists():
        try:
            hashes = read_object(checkpoint / _HASHES)
        except CheckpointError:
            return _HASHES
        for name, expected in hashes.items():
            if not (file := checkpoint / name).is_file() or sha256(file) != expected:
                return name
    for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("rng_state*.pth")]:
        try:
            with zipfile.ZipFile(file) as content:
                sound = content.testzip() is None
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error):
            sound = False
        if not sound:
            return file.name
    return None


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Removes the folder of a run that fails before there is anything to go on from."""
    try:
        yield
    except BaseException:
        if last_checkpoint(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def settings_before(folder: Path) -> Mapping[str, Any]:
    """Returns the settings of an interrupted run, in which all was settled; none where there is no such run."""
    try:
        found = read_object(folder / _REQUEST)["settings"]
    except (CheckpointError, KeyError):
        return {}
    return found if isinstance(found, dict) else {}


def best_checkpoint(folder: Path, *, chosen: bool) -> Path | None:
    """Returns the checkpoint that a finished run is about: the best validated where it was `chosen`, or the last."""
    last = last_checkpoint(folder)
    if last is None or not chosen:
        return last
    step = read_object(last / _STATE).get("best_global_step")
    best = folder / f"checkpoint-{step}"
    if step is None or _state(best) is None:
        return last
    if (damaged := _damaged(best)) is not None:
        logger.warning("%s, the best, is damaged (%s); the last is taken", best, damaged)
        return last
    return best


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run; the Trainer writes its state file last."""
    found = {path: state for path in folder.glob("checkpoint-*") if (state := _state(path)) is not None}
    return max(found, key=lambda path: found[path][0]) if found else None


def _state(checkpoint: Path) -> tuple[int, int] | None:
    """Reads the steps that were done and those that were to do; None where the checkpoint is not whole."""
    try:
        state = read_object(checkpoint / _STATE)
        return int(state["global_step"]), int(state["max_steps"])
    except (CheckpointError, ValueError, KeyError, TypeError, OverflowError):
        return None


def steps_done(checkpoint: Path) -> int:
    """Returns after how many optimizer steps a whole checkpoint was saved."""
    return (_state(checkpoint) or (0, 0))[0]


def is_finished(checkpoint: Path) -> bool:
    """Tells whether a checkpoint is that of the last step."""
    state = _state(checkpoint)
    return state is not None and state[0] >= state[1]


def where_to_go_on(folder: Path) -> str:
    """Says what the last good checkpoint is."""
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def write_log(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes a training log, a JSON object a line."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
