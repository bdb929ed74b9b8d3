"""Data sets of the hub, read as a stream: no more of them than is asked for."""

from collections.abc import Iterator
from typing import Any

from amprune.errors import CalibrationError, reason
from amprune.text.files import Record
from amprune.text.records import is_blank
from amprune.text.sources import parse_hub

_BUFFER = 1_000
"""Rows among which the next is drawn at random; so many are read before the first."""


def hub_records(name: str, *, seed: int, option: str) -> Iterator[Record]:
    """Yields the rows of a source `hub:OWNER/SET[/CONFIG][:SPLIT]` but for blank texts, shuffled by the seed."""
    import datasets

    repository, config, split = parse_hub(name, option)
    try:
        rows: Any = datasets.load_dataset(repository, config, split=split, streaming=True)
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_BUFFER), 1):
            if not is_blank(row):
                yield f"row {number}", row
    except datasets.exceptions.DatasetNotFoundError as error:
        raise CalibrationError(
            f"{option} {name}: the hub has no data set {repository}, or it is private or gated; check the name, or run "
            "`hf auth login`"
        ) from error
    except ValueError as error:  # what datasets raises of an unknown configuration or split, and lists the known ones
        raise CalibrationError(
            f"{option} {name}: {' '.join(str(error).split())}; a configuration is named as hub:{repository}/CONFIG, a "
            f"split as hub:{repository}:SPLIT"
        ) from error
    except Exception as error:  # network failures come in many types
        raise CalibrationError(
            f"{option} {name}: the data set {repository} of the hub cannot be read ({reason(error)}); check the "
            f"network, or use {option} mixed, which ships with amprune, or the path of a file of your own"
        ) from error
