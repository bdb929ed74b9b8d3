"""Several sources of text, one after the other, as much of each as its weight says."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from amprune.running import Progress, no_progress
from amprune.text.files import Record
from amprune.text.hub import hub_records
from amprune.text.records import read_records
from amprune.text.sources import OWN, Amount, TextSource, parse_sources, shares

logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")
Own = Callable[[Amount], Iterable[Record]]
"""Gives as much as that of the text that the dense model writes."""
Pick = Callable[[str, Sequence[Record], int | None], Iterable[Record]]
"""Draws from a set that is read whole, by its name, so many of its records; None is all."""
Encode = Callable[[Record, str], tuple[Sample | None, int]]
"""Makes of a record of a set, by its name, a sample and its number of tokens; None is left out."""


@dataclass(frozen=True)
class Drawn(Generic[Sample]):
    """What came of a source."""

    source: TextSource
    samples: tuple[Sample, ...]
    tokens: int


def sources_of(value: object, option: str) -> tuple[TextSource, ...]:
    """Returns the sources that an option names; of a list of texts, these as one."""
    return parse_sources(value, option) or (TextSource("texts"),)


def check_sources(value: Any, option: str) -> None:
    """Reads what is read before anything is computed: files whole, the first row of a set of the hub."""
    for source in sources_of(value, option):
        if source.from_hub:
            next(iter(hub_records(source.name, seed=0, option=option)), None)
        elif source.name != OWN:
            read_records(_single(value, source), option=option)


def draw_text(
    value: Any, amount: Amount, encode: "Encode[Sample]", pick: Pick, own: Own, *, seed: int, option: str,
    endless: int = 0, progress: Progress = no_progress,
) -> list[Drawn[Sample]]:  # fmt: skip
    """Draws samples of one source or several.

    The sources are taken in their order. Each is asked for its part of what is still wanted, by its weight against
    those from it on, so that what a source lacks is asked of those after it. Where no amount is wanted, a finite source
    gives all that it has, and one that has no end `endless` tokens.
    """
    sources = sources_of(value, option)
    if amount == Amount() and len({source.weight for source in sources}) > 1:
        logger.warning("weights of sources count only where samples or tokens are asked for; all of each is taken")
    left, found = amount, list[Drawn[Sample]]()
    for source, part in zip(sources, shares(sources), strict=True):
        asked = left.share(part)
        if source.is_endless and asked == Amount():
            asked = Amount(tokens=endless)
        records = _records(value, source, asked, pick, own, seed=seed, option=option)
        found.append(_taken(source, records, asked, encode, progress))
        left = left.less(len(found[-1].samples), found[-1].tokens)
    _tell_of_shortage(found, amount)
    return found


def mixed(found: Sequence[Sequence[Sample]], seed: int) -> list[Sample]:
    """Returns the samples of several sources in one random order; those of one stay in theirs."""
    every = [sample for samples in found for sample in samples]
    if len(found) > 1:
        random.Random(seed).shuffle(every)
    return every


def _single(value: Any, source: TextSource) -> Any:
    """Returns what `read_records` reads: the source, or the list of texts that it stands for."""
    return source.name if isinstance(value, str | tuple) else value


def _records(
    value: Any, source: TextSource, asked: Amount, pick: Pick, own: Own, *, seed: int, option: str
) -> Iterable[Record]:  # fmt: skip
    if asked.met_by(0, 0):
        return ()
    if source.name == OWN:
        return own(asked)
    if source.from_hub:
        return hub_records(source.name, seed=seed, option=option)
    name, records = read_records(_single(value, source), option=option)
    return pick(name, records, asked.samples)


def _taken(
    source: TextSource, records: Iterable[Record], asked: Amount, encode: "Encode[Sample]", progress: Progress
) -> Drawn[Sample]:
    """Encodes records until there are enough samples or tokens; what comes after is not asked for."""
    samples, tokens = list[Sample](), 0
    total = asked.tokens or asked.samples or (len(records) if isinstance(records, Sequence) else 0)
    with progress("Tokenising", total) as advance:
        for record in records:
            sample, count = encode(record, source.shown)
            if sample is not None:
                samples.append(sample)
                tokens += count
            advance(count if asked.tokens else 1)
            if asked.met_by(len(samples), tokens):
                break
    return Drawn(source, tuple(samples), tokens)


def _tell_of_shortage(found: Sequence[Drawn[Any]], amount: Amount) -> None:
    samples, tokens = sum(len(one.samples) for one in found), sum(one.tokens for one in found)
    if amount.met_by(samples, tokens) or (amount.tokens is None and (amount.samples is None or len(found) == 1)):
        return  # of one set, who picks from it says where it has fewer samples
    by_tokens = amount.tokens is not None
    parts = (f"{one.tokens if by_tokens else len(one.samples):,} of {one.source.shown}" for one in found)
    logger.warning(
        "the sources of text end early: %s of %s %s came, %s", f"{tokens if by_tokens else samples:,}",
        f"{amount.tokens if by_tokens else amount.samples:,}", "tokens" if by_tokens else "samples", ", ".join(parts),
    )  # fmt: skip
