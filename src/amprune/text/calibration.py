"""Calibration sets: named, seeded, hashed samples of token ids.

`alpaca` is the set of the paper, from the hub; `mixed` (instructions, encyclopaedic and web text, code, dialogue) and
`builtin` (its instructions alone) ship with the package; `self` is what the model writes; a path is the user's own.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from amprune.errors import CalibrationError, ScoresError
from amprune.model.loading import load_tokenizer
from amprune.model.reader import Checkpoint, open_model
from amprune.running import Progress, no_progress
from amprune.settings import ApplySettings, Compute, Drawing, PathLike, part, settle, with_preset
from amprune.text.files import Record
from amprune.text.own import LENGTH, Author
from amprune.text.records import read_records, render
from amprune.text.sources import TextSource, gather, names_of, parse_sources, stream
from amprune.text.tokens import start_token, started

logger = logging.getLogger(__name__)

_OPTION = "--calibration"
SAMPLES = 50
"""As many as the paper draws."""
HELD_OUT = 8
"""One sample in so many is held out, where something is chosen by what others do not fit."""


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of token ids, in the order in which they were drawn."""

    name: str
    samples: tuple[tuple[int, ...], ...]
    seed: int | None = None
    max_length: int | None = None
    prompts_only: bool = False
    start: int | None = None
    """The token that rows of the refit begin with, where the tokenizer begins texts with one."""

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(map(len, self.samples))

    @property
    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.samples, separators=(",", ":")).encode()).hexdigest()

    def split(self) -> tuple["CalibrationSet", "CalibrationSet"]:
        """Returns all but the last eighth of the samples, and that eighth to hold out; of one sample both are it."""
        held_out = -(-len(self.samples) // HELD_OUT)
        if held_out == len(self.samples):
            return self, self
        return replace(self, samples=self.samples[:-held_out]), replace(self, samples=self.samples[-held_out:])

    def first(self, tokens: int) -> "CalibrationSet":
        """Returns the first samples that hold as many tokens, or all."""
        return replace(self, samples=tuple(_until(self.samples, tokens)))

    def to_dict(self) -> dict[str, Any]:
        """Returns what a score file records of the set."""
        return {
            "name": self.name, "samples": len(self.samples), "tokens": self.tokens, "seed": self.seed,
            "max_length": self.max_length, "prompts_only": self.prompts_only, "sha256": self.sha256,
        }  # fmt: skip


def load_calibration(
    source: PathLike | Sequence[str], tokenizer: Any, settings: Drawing | None = None, *, author: Author | None = None,
    **options: Any,
) -> CalibrationSet:  # fmt: skip
    """Draws a seeded random sample of a set and tokenises it.

    Args:
        source: what `--calibration` names (sources.py), a tuple of several, or a list of texts.
        tokenizer: the model's own, as transformers loads it.
        settings: how much is drawn; without samples and tokens it is 50 samples, of at most 512 tokens each.
        author: who writes the texts of `self`.
        options: of `Drawing`, such as `samples=20`.

    Raises:
        CalibrationError: the set cannot be read, is malformed, or holds fewer samples.
    """
    asked = settle(Drawing, settings, options)
    samples, tokens, max_length = asked.samples, asked.tokens, 512 if asked.max_length is None else asked.max_length
    for name, value in (("samples", samples), ("tokens", tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise CalibrationError(f"{name} is {value}, expected at least 1")
    start, sources = start_token(tokenizer), parse_sources(source, _OPTION)

    def encoded(name: str, records: Iterable[Record]) -> Iterator[tuple[int, ...]]:
        return (_encode(one, tokenizer, f"{name}, {at}", asked.prompts_only, max_length, start) for at, one in records)

    if len(sources) > 1 or any(one.endless for one in sources):
        name, kept = names_of(sources), _of_several(sources, asked, author, encoded)
    else:
        name, drawn = _of_one(source if not sources else sources[0].name, asked)
        kept = tuple(encoded(name, drawn) if tokens is None else _until(encoded(name, drawn), tokens))
        if tokens is not None and (came := sum(map(len, kept))) < tokens:
            logger.warning("%s holds %s of the %s tokens that were asked for", name, f"{came:,}", f"{tokens:,}")
    return CalibrationSet(name, kept, asked.seed, max_length, asked.prompts_only, start)


def _of_one(source: PathLike | Sequence[str], asked: Drawing) -> tuple[str, list[Record]]:
    """Draws from one set that has an end, all of it where tokens are counted."""
    samples = SAMPLES if asked.samples is None and asked.tokens is None else asked.samples
    name, records = read_records(source)
    if samples is not None and len(records) < samples:
        smaller = f"--samples {len(records)} or " if records else ""
        raise CalibrationError(
            f"{name} holds {len(records)} samples, but {samples} were asked for; give {smaller}a larger set"
        )
    return name, random.Random(asked.seed).sample(records, len(records) if samples is None else samples)


def _of_several(
    sources: Sequence[TextSource], asked: Drawing, author: Author | None,
    encoded: Callable[[str, Iterable[Record]], Iterator[tuple[int, ...]]],
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """Draws from several sources by their weights, and mixes what was drawn."""
    samples = SAMPLES if asked.samples is None and asked.tokens is None else asked.samples
    length = 1 if samples is None else asked.max_length or LENGTH

    def draw(one: TextSource, share: float) -> Iterator[tuple[int, ...]]:
        return encoded(one.name, stream(one, asked.seed, author, share * length, _OPTION))

    wanted, size, what = (samples, _one, "samples") if samples is not None else (asked.tokens, len, "tokens")
    kept = [sample for items in gather(sources, wanted, draw, size, what) for sample in items]
    if not kept:
        raise CalibrationError(f"{names_of(sources)}: not one sample came; give another set")
    random.Random(asked.seed).shuffle(kept)
    return tuple(kept)


def _one(sample: tuple[int, ...]) -> int:
    return 1


def _until(samples: Iterable[tuple[int, ...]], tokens: int) -> Iterator[tuple[int, ...]]:
    """Yields samples until there are so many tokens; what comes after is not asked for."""
    total = 0
    for sample in samples:
        yield sample
        if (total := total + len(sample)) >= tokens:
            return


def draw(
    dense: Checkpoint, settings: Drawing, *, trust_remote_code: bool = False, progress: Progress = no_progress
) -> CalibrationSet:
    """Draws a set for a model, by its own tokenizer and no longer than its positions; a set stays as it is.

    Of `self` it writes the text, computing as the settings say, where they do.
    """
    positions, source = dense.positions, settings.calibration
    if isinstance(source, CalibrationSet):
        longest = max(map(len, source.samples), default=0)
        if positions is not None and longest > positions:
            raise ScoresError(
                f"a sample of {source.name} has {longest} tokens, but the model has {positions} positions; cut the "
                "samples"
            )
        return source
    if positions is not None and settings.max_length is not None and positions < settings.max_length:
        logger.info(
            "samples are cut at %d tokens, the model's positions, instead of %d", positions, settings.max_length
        )
        settings = replace(settings, max_length=positions)
    tokenizer = load_tokenizer(dense.folder, trust_remote_code=trust_remote_code)
    where = Compute(**{one.name: getattr(settings, one.name) for one in fields(Compute) if hasattr(settings, one.name)})
    author = Author(dense, where, settings.seed, trust_remote_code=trust_remote_code, progress=progress)
    return load_calibration(source, tokenizer, part(Drawing, settings), author=author)


def draw_calibration(
    model: PathLike,
    calibration: PathLike | Sequence[str] | None = None,
    settings: ApplySettings | None = None,
    **options: Any,
) -> CalibrationSet:
    """Draws the calibration samples of a model, to score on, to refit on, or both.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id, whose tokenizer is used.
        calibration: `alpaca`, `mixed`, `builtin`, a file, or a list of texts; None is the preset's.
        settings: how much is drawn; what is left open, the preset says.
        options: of `ApplySettings`, such as `samples=50`.

    Raises:
        CalibrationError: the set cannot be read, is malformed, or holds fewer samples.
        CheckpointError: the model cannot be opened, or has no tokenizer.
    """
    given = {} if calibration is None else {"calibration": calibration}
    asked = with_preset(settle(ApplySettings, settings, {**options, **given}))
    _, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
    return draw(dense, asked, trust_remote_code=asked.trust_remote_code)


def _encode(
    record: Mapping[str, Any], tokenizer: Any, where: str, prompts_only: bool, max_length: int, start: int | None
) -> tuple[int, ...]:
    found = render(record, tokenizer, where, prompts_only=prompts_only)
    if prompts_only and not found.prompt:
        nothing = "leaves nothing of messages that are one assistant turn"
        plain = "needs records with a prompt, but this one is plain text"
        raise CalibrationError(f"{where}: prompts_only {nothing if 'messages' in record else plain}")
    text = found.prompt if prompts_only else found.prompt + found.response
    special = found.add_special_tokens
    try:
        ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=max_length)["input_ids"]
    except Exception as error:  # tokenizers raise many types, for a lone surrogate for instance
        raise CalibrationError(f"{where}: the tokenizer refuses this sample: {error}") from error
    if not ids:
        raise CalibrationError(f"{where}: the tokenizer makes no token of this sample")
    return tuple(started(ids, start)[:max_length])  # some tokenizers do not truncate to fewer than their special tokens
