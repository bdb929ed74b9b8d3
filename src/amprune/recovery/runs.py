"""The folder of a run, `OUT.training`: what was asked for, checkpoints, the log; and going on after an interruption."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amprune.errors import RecoveryError
from amprune.records import go_on, read_object, write, write_text

logger = logging.getLogger(__name__)
EPOCHS = "epochs"
_REQUEST = "request.json"


def begin_run(folder: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Makes the folder of a run, or finds that of an interrupted run of the same request."""
    file = folder / _REQUEST
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
            logger.info("going on from %s", start.name if start else "the start: there is no checkpoint yet")
            return
        if not overwrite:
            found = f"last checkpoint {start.name}" if start else "without a checkpoint yet"
            raise RecoveryError(f"{folder} holds an interrupted run, {found}; go on with --resume, or remove it")
        shutil.rmtree(folder)
    elif resume:
        logger.info("%s holds no interrupted run; training starts anew", folder)
    write(file, request, error=RecoveryError)


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
