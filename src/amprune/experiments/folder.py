"""The folder of an experiment: alone in it, begun or gone on with, and emptied of another."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from amprune.errors import EvaluationError
from amprune.evaluation.session import versions
from amprune.experiments.cells import EVALUATION, MODELS, SCORES, Bench
from amprune.experiments.recipes import Recipe
from amprune.experiments.results import FILE, ModelResults, Results, changes
from amprune.experiments.settings import Settings
from amprune.report.write import remove_report

logger = logging.getLogger(__name__)
_LOCK = ".experiment.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder; the system lets go of the lock when the process dies.

    Raises:
        EvaluationError: another run is in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(blocking=False)
    except Timeout:
        raise EvaluationError(f"another run writes {folder}; wait until it ends, or choose another folder") from None
    except OSError as error:
        raise EvaluationError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # it stays unless the request was refused, and left it empty
            folder.rmdir()


def begin(folder: Path, recipe: Recipe, settings: Settings, benches: Sequence[Bench], *, overwrite: bool) -> Results:
    """Finds what an earlier run of the same request has finished, or begins anew where nothing is in the way.

    Raises:
        EvaluationError: the folder holds another experiment, and `overwrite` is off, or something else.
    """
    request = {"settings": settings.to_dict(), "models": {bench.model: bench.fingerprint for bench in benches}}
    new = Results(
        folder / FILE, recipe.name, request, versions(), [ModelResults(b.model, b.folder.name) for b in benches]
    )
    request = json.loads(json.dumps(request))
    if new.path.is_file():
        before = Results.load(new.path)
        other = sorted(set(changes(before.request, request)))
        if before.experiment == recipe.name and not other:
            _tell(before)
            return before
        if not overwrite:
            what = (
                f"with another {', '.join(other)}" if before.experiment == recipe.name else f"for {before.experiment}"
            )
            raise EvaluationError(
                f"{folder} holds an experiment that was asked for {what}; ask for the same again, choose another "
                "folder, or give --overwrite to remove it"
            )
        _remove(before)
    elif there := [path.name for path in folder.iterdir() if path.name != _LOCK]:
        raise EvaluationError(f"{folder} holds {there[0]} and no {FILE}; choose an empty folder or a new one")
    new.save()
    return new


def _tell(results: Results) -> None:
    finished = sum(found.is_finished(cell) for found in results.models for cell in found.cells)
    if finished or results.failed:
        again = f", {len(results.failed)} failed ones are tried again" if results.failed else ""
        logger.info("going on with the experiment in %s: %d cells are finished%s", results.path, finished, again)


def _remove(results: Results) -> None:
    """Removes what an experiment has written, and nothing else; its record last."""
    folder = results.path.parent
    for found in results.models:
        place = folder / found.folder
        for name in (SCORES, MODELS):
            if (place / name).is_dir():
                shutil.rmtree(place / name)
        (place / EVALUATION).unlink(missing_ok=True)
        with suppress(OSError):  # it stays where someone else has put something into it
            place.rmdir()
    remove_report(folder)
    results.path.unlink()
