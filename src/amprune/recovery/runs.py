"""The folder of a run, `OUT.training`: what was asked for, checkpoints, the log; and going on after an interruption."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amprune.errors import RecoveryError
from amprune.model.writer import write_json

logger = logging.getLogger(__name__)
EPOCHS = "epochs"
_REQUEST = "request.json"


def begin_run(folder: Path, request: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Makes the folder of a run, or finds that of an interrupted run of the same request.

    Raises:
        RecoveryError: it holds an interrupted run and `resume` is off, one of another request, or something else.
    """
    request = json.loads(json.dumps(request))
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _REQUEST).is_file():
            raise RecoveryError(f"{folder} is in the way and was not made by amprune; move it, or choose another OUT")
        if resume:
            _check_same(folder, request)
            start = last_checkpoint(folder)
            logger.info("going on from %s", start.name if start else "the start: there is no checkpoint yet")
            return
        if not overwrite:
            step = last_checkpoint(folder)
            found = f"last checkpoint {step.name}" if step else "without a checkpoint yet"
            raise RecoveryError(f"{folder} holds an interrupted run, {found}; go on with --resume, or remove it")
        shutil.rmtree(folder)
    elif resume:
        logger.info("%s holds no interrupted run; training starts anew", folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _REQUEST, request)


def _check_same(folder: Path, request: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
        different = sorted(_changes(before, request))
    except (OSError, ValueError, AttributeError) as error:
        raise RecoveryError(f"{folder / _REQUEST} is damaged ({error}); remove {folder} and start anew") from error
    if different:
        raise RecoveryError(
            f"the interrupted run in {folder} was asked for with another {', '.join(different)}; ask for the same "
            "again, or remove the folder and start anew"
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields the names of the entries that differ, of settings and data one by one."""
    for name in before.keys() | now.keys():
        ours, theirs = before.get(name), now.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from (f"{name}.{entry}" for entry in _changes(ours, theirs))
        elif ours != theirs:
            yield name


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Removes the folder of a run that fails before there is anything to go on from."""
    try:
        yield
    except BaseException:
        if last_checkpoint(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run; the Trainer writes its state file last."""
    found = {path: state for path in folder.glob("checkpoint-*") if (state := _state(path)) is not None}
    return max(found, key=lambda path: found[path][0]) if found else None


def _state(checkpoint: Path) -> tuple[int, int] | None:
    """Reads the steps that were done and those that were to do; None where the checkpoint is not whole."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept_epochs(folder: Path) -> list[Path]:
    """Returns the weights of every epoch of a run, in their order."""
    return sorted((folder / EPOCHS).iterdir(), key=steps_done)


def steps_done(checkpoint: Path) -> int:
    """Returns after how many optimizer steps a whole checkpoint was saved."""
    state = _state(checkpoint)
    return state[0] if state is not None else 0


def is_finished(checkpoint: Path) -> bool:
    """Tells whether a checkpoint is that of the last step."""
    state = _state(checkpoint)
    return state is not None and state[0] >= state[1]


def where_to_go_on(folder: Path) -> str:
    """Says what the last good checkpoint is."""
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads a training log but for a line that was being written; empty where there is none."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def cut_log(path: Path, step: int) -> None:
    """Leaves out of a log what came after the step that training goes on from."""
    write_log(path, [entry for entry in read_log(path) if entry["step"] <= step])


def write_log(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes a training log, a JSON object a line."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
