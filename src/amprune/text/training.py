"""Text as token ids and labels: the loss is on the responses alone, or on every token."""

import logging
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from amprune.errors import CalibrationError, RecoveryError
from amprune.model.reader import Checkpoint
from amprune.running import Progress, no_progress
from amprune.settings import Compute, RecoverySettings
from amprune.text.drawing import Drawn, draw_text, mixed
from amprune.text.files import Record
from amprune.text.own import own_records
from amprune.text.records import render
from amprune.text.sources import Amount
from amprune.text.tokens import spans, start_token, started

logger = logging.getLogger(__name__)
IGNORED = -100
"""The label of a token that no loss is taken on."""

Sample = dict[str, list[int]]
"""`input_ids` and `labels`, equally long."""


ENDLESS_TOKENS = 200_000
"""Taken of a source that has no end where no number is asked for."""
_HELD_OUT_ROWS = 64
"""More full rows than that tell nothing more about a loss."""
_SHORTEST_ROW = 8


@dataclass(frozen=True)
class UsedSource:
    """What a source of text gave, before it was split and packed."""

    name: str
    weight: float
    samples: int
    tokens: int


@dataclass(frozen=True)
class TrainingData:
    """What a model is recovered on."""

    name: str
    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    truncated: int
    """Samples that were longer than the length."""
    skipped: int
    """Samples with no token left to learn."""
    sources: tuple[UsedSource, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns what a record keeps."""
        tokens = sum(len(sample["input_ids"]) for sample in self.training)
        return {
            "name": self.name, "training": len(self.training), "tokens": tokens, "validation": len(self.validation),
            "truncated": self.truncated, "skipped": self.skipped, "sources": [asdict(one) for one in self.sources],
        }  # fmt: skip


def load_training_data(
    settings: RecoverySettings, tokenizer: Any, *, max_length: int | None = None, author: Checkpoint | None = None,
    progress: Progress = no_progress,
) -> TrainingData:  # fmt: skip
    """Reads, draws, tokenises and splits a set, or several by their weights.

    Prompt and response are one text when they are tokenised, with an end-of-sequence token after it, so that no second
    start token stands in the middle. Labels are the tokens of the response, or with `responses_only` off all but the
    first; of plain text they always are.

    Args:
        settings: those that the preset has settled.
        tokenizer: the model's own.
        max_length: counts instead of the settings' where the model has fewer positions.
        author: the dense model, which writes the source `self`.
        progress: told how far it is.

    At least one sample of each source is held out for validation, unless the share is 0.
    """
    length = max_length or settings.max_length or 0
    whole = settings.packing and not settings.responses_only  # then a long text goes on in the next row
    most = sys.maxsize if whole else length
    reader = _Reader(tokenizer, start_token(tokenizer), most, bool(settings.responses_only), bool(settings.packing))
    several = isinstance(settings.data, tuple) and len(settings.data) > 1

    def pick(name: str, records: Sequence[Record], count: int | None) -> Sequence[Record]:
        if settings.samples is not None and not several and not 1 <= settings.samples <= len(records):
            raise RecoveryError(f"{name} holds {len(records)} samples, but --samples {settings.samples} were asked for")
        return random.Random(settings.seed).sample(records, len(records))[:count]

    def own(asked: Amount) -> Iterable[Record]:
        if author is None:
            raise RecoveryError("self is text that the dense model writes; give it by --teacher")
        where = Compute(device=settings.device, dtype=settings.dtype)
        return own_records(
            author, tokenizer, asked, seed=settings.seed, where=where, max_length=length, progress=progress
        )

    found = draw_text(
        settings.data, Amount(settings.samples, settings.tokens), reader.encode, pick, own, seed=settings.seed,
        option="--data", endless=ENDLESS_TOKENS, progress=progress,
    )  # fmt: skip
    reader.tell()
    name = ", ".join(one.source.shown for one in found)
    training, validation = _split(found, settings, length, name)
    if settings.packing:
        training = _packed(training, length, reader.start)
    if settings.packing and not settings.responses_only:
        validation = _packed(validation, length, reader.start)[:_HELD_OUT_ROWS]
    used = (UsedSource(one.source.shown, one.source.weight, len(one.samples), one.tokens) for one in found)
    return TrainingData(
        name, tuple(training), tuple(validation), sum(reader.truncated.values()), sum(reader.skipped.values()),
        tuple(used),
    )  # fmt: skip


@dataclass
class _Reader:
    """Makes samples of records, and counts by source what is cut and what is left out."""

    tokenizer: Any
    start: int | None
    length: int
    responses_only: bool
    packing: bool
    read: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def encode(self, record: Record, name: str) -> tuple[Sample | None, int]:
        """Returns a sample and its tokens, or None where nothing of it could be learnt."""
        place, content = record
        sample, cut = _encode(content, self.tokenizer, f"{name}, {place}", self.length, self.start)
        if not self.responses_only:  # of a packed row, the text before predicts the first token of the next
            first = sample["input_ids"][:1] if self.packing else [IGNORED]
            sample["labels"] = [*first, *sample["input_ids"][1:]]
        learnt = any(label != IGNORED for label in sample["labels"][1:])
        self.read[name] += 1
        self.truncated[name] += cut
        self.skipped[name] += not learnt
        return (sample, len(sample["input_ids"])) if learnt else (None, 0)

    def tell(self) -> None:
        """Says what was cut and what was left out."""
        for name, total in self.read.items():
            if count := self.truncated[name]:
                logger.info("%s: %d of %d samples are cut at %d tokens", name, count, total, self.length)
            if count := self.skipped[name]:
                logger.warning("%s: %d of %d samples have no response within %d tokens and are left out", name, count,
                               total, self.length)  # fmt: skip


def _split(
    found: Sequence[Drawn[Sample]], settings: RecoverySettings, length: int, name: str
) -> tuple[list[Sample], list[Sample]]:
    """Holds the first samples of each source out; those of several are mixed then."""
    share, tokens = settings.validation_share or 0.0, sum(one.tokens for one in found)
    if settings.packing and not settings.responses_only and tokens:
        share = min(share, _HELD_OUT_ROWS * length / tokens)
    held = [max(0, min(len(one.samples) - 1, max(1, round(len(one.samples) * share)))) if share else 0 for one in found]
    training = [one.samples[count:] for one, count in zip(found, held, strict=True)]
    if not any(training):
        raise RecoveryError(
            f"{name} leaves {sum(len(one.samples) for one in found)} samples with a response within {length} tokens; "
            "training needs one, and one more for the validation loss: give more samples or a larger --max-length"
        )
    validation = [one.samples[:count] for one, count in zip(found, held, strict=True)]
    return mixed(training, settings.seed), mixed(validation, settings.seed)


def _encode(
    record: Mapping[str, Any], tokenizer: Any, where: str, max_length: int, start: int | None
) -> tuple[Sample, bool]:
    """Returns one sample and whether it was cut."""
    found = render(record, tokenizer, where)
    text = found.prompt + found.response
    try:
        ids = tokenizer(text, add_special_tokens=found.add_special_tokens, verbose=False)["input_ids"]
        prompt = _prompt_tokens(tokenizer, text, ids, found.prompt, special=found.add_special_tokens)
    except Exception as error:  # tokenizers raise many types
        raise CalibrationError(f"{where}: the tokenizer refuses this sample: {error}") from error
    if found.add_special_tokens and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    whole = started(ids, start)
    prompt, ids = prompt + len(whole) - len(ids), whole
    prompt = max(1, prompt)  # nothing predicts the first token
    labels = [IGNORED] * prompt + ids[prompt:]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}, len(ids) > max_length


def _prompt_tokens(tokenizer: Any, text: str, ids: Sequence[int], prompt: str, *, special: bool) -> int:
    """Counts the leading tokens that end within the prompt.

    A token that spans both belongs to the response: it is what the model has to say after the prompt.
    """
    if not prompt:
        return 0
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ends = enumerate(end for _, end in offsets["offset_mapping"])
        return next((index for index, end in ends if end > len(prompt)), len(ids))
    alone = tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]
    pairs = enumerate(zip(alone, ids, strict=False))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(alone), len(ids)))


def _packed(samples: Sequence[Sample], length: int, start: int | None) -> list[Sample]:
    """Joins samples, in their order, and cuts the whole into sequences, each with the start token before it.

    The first label of a sequence is left out, as that of a sample is: nothing predicts it.
    """
    ids: list[int] = []
    labels: list[int] = []
    for sample in samples:
        ids += sample["input_ids"]
        labels += sample["labels"]
    pieces = [
        {"input_ids": head + ids[part], "labels": [IGNORED, *(head + labels[part])[1:]]}
        for head, part in spans(ids, length, start)
    ]
    if len(pieces) > 1 and len(pieces[-1]["input_ids"]) < _SHORTEST_ROW:
        pieces.pop()
    return [piece for piece in pieces if any(label != IGNORED for label in piece["labels"])]
