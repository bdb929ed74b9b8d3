"""Calibration sets: named, seeded, hashed samples of token ids.

`alpaca` is the set of the paper, from the hub; `mixed` (instructions, encyclopaedic and web text, code, dialogue) and
`builtin` (its instructions alone) ship with the package; `self` the model writes; a path is the user's own text.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from amprune.errors import CalibrationError, ScoresError
from amprune.model.loading import load_tokenizer
from amprune.model.reader import Checkpoint, open_model
from amprune.running import Progress, no_progress
from amprune.settings import ApplySettings, Compute, Drawing, PathLike, part, settle, with_preset
from amprune.text.drawing import Own, draw_text, mixed
from amprune.text.files import Record
from amprune.text.own import own_records
from amprune.text.records import render
from amprune.text.sources import Amount
from amprune.text.tokens import start_token, started

logger = logging.getLogger(__name__)

SAMPLES = 50
"""As many as the paper draws."""
MAX_LENGTH = 512
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
    source: PathLike | tuple[PathLike, ...] | Sequence[str], tokenizer: Any, settings: Drawing | None = None,
    **options: Any,
) -> CalibrationSet:  # fmt: skip
    """Draws a seeded random sample of a set, or of several by their weights, and tokenises it.

    Args:
        source: `alpaca`, `mixed`, `builtin`, `hub:OWNER/SET`, a file or folder of records; a tuple of several of these,
            each with `:WEIGHT` behind it where they do not count alike; or a list of texts. `self`, which the model
            writes, only `draw_calibration` has.
        tokenizer: the model's own, as transformers loads it.
        settings: how much is drawn; without samples and tokens it is 50 samples, of at most 512 tokens each.
        options: of `Drawing`, such as `samples=20`.

    Raises:
        CalibrationError: a set cannot be read, is malformed, or holds fewer samples.
    """
    return _drawn(source, tokenizer, settle(Drawing, settings, options), _no_author)


def _no_author(asked: Amount) -> Iterable[Record]:
    raise CalibrationError("self is text that a model writes, and only its tokenizer is given; use draw_calibration")


def _drawn(source: Any, tokenizer: Any, asked: Drawing, own: Own) -> CalibrationSet:
    samples, tokens, max_length = (
        asked.samples,
        asked.tokens,
        MAX_LENGTH if asked.max_length is None else asked.max_length,
    )
    for name, value in (("samples", samples), ("tokens", tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise CalibrationError(f"{name} is {value}, expected at least 1")
    if samples is None and tokens is None:
        samples = SAMPLES
    start, several = start_token(tokenizer), isinstance(source, tuple) and len(source) > 1

    def pick(name: str, records: Sequence[Record], count: int | None) -> Sequence[Record]:
        if count is not None and len(records) < count and not several:
            smaller = f"--samples {len(records)} or " if records else ""
            raise CalibrationError(
                f"{name} holds {len(records)} samples, but {count} were asked for; give {smaller}a larger set"
            )
        most = len(records) if count is None else min(count, len(records))
        return random.Random(asked.seed).sample(records, most)

    def encode(record: Record, name: str) -> tuple[tuple[int, ...], int]:
        place, content = record
        ids = _encode(content, tokenizer, f"{name}, {place}", asked.prompts_only, max_length, start)
        return ids, len(ids)

    found = draw_text(
        source, Amount(samples, tokens), encode, pick, own, seed=asked.seed, option="--calibration"
    )  # fmt: skip
    name = ", ".join(one.source.shown for one in found)
    kept = tuple(mixed([one.samples for one in found], asked.seed))
    return CalibrationSet(name, kept, asked.seed, max_length, asked.prompts_only, start)


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

    The source `self` the model writes, on the device of the settings where they name one.
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
    where = part(Compute, settings) if isinstance(settings, Compute) else Compute()
    own = partial(
        own_records, dense, tokenizer, seed=settings.seed, where=where, max_length=settings.max_length or MAX_LENGTH,
        progress=progress,
    )  # fmt: skip
    return _drawn(source, tokenizer, part(Drawing, settings), own)


def draw_calibration(
    model: PathLike,
    calibration: PathLike | tuple[PathLike, ...] | Sequence[str] | None = None,
    settings: ApplySettings | None = None,
    **options: Any,
) -> CalibrationSet:
    """Draws the calibration samples of a model, to score on, to refit on, or both.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id, whose tokenizer is used.
        calibration: as of `load_calibration`, or `self`, which the model writes; None is the preset's.
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
