"""Instructions with responses as token ids and labels: the loss is on the response alone."""

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amprune.errors import CalibrationError, RecoveryError
from amprune.running import Progress, no_progress
from amprune.settings import RecoverySettings
from amprune.text.files import Record
from amprune.text.own import Author
from amprune.text.records import read_records, render
from amprune.text.sources import TextSource, gather, names_of, parse_sources, stream
from amprune.text.tokens import spans, start_token, started

logger = logging.getLogger(__name__)
IGNORED = -100
"""The label of a token that no loss is taken on."""

_OPTION = "--data"
_MOST_HELD_OUT = 64
"""Rows; more cost time and tell little more."""
_SHORTEST_ROW = 8
"""Tokens of what is left for the last row."""

Sample = dict[str, list[int]]
"""`input_ids` and `labels`, equally long."""


@dataclass(frozen=True)
class TrainingData:
    """What a model is recovered on."""

    name: str
    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    truncated: int
    """Samples that were longer than the length."""
    skipped: int
    """Samples with no response token left."""
    sources: tuple[dict[str, Any], ...] = ()
    """Of each set its name and weight, and the samples and tokens that came of it."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what a record keeps."""
        tokens = sum(len(sample["input_ids"]) for sample in self.training)
        return {
            "name": self.name, "training": len(self.training), "tokens": tokens, "validation": len(self.validation),
            "truncated": self.truncated, "skipped": self.skipped, "sources": list(self.sources),
        }  # fmt: skip


def load_training_data(
    settings: RecoverySettings, tokenizer: Any, *, max_length: int | None = None, author: Author | None = None,
    progress: Progress = no_progress,
) -> TrainingData:  # fmt: skip
    """Reads, draws, tokenises and splits one set or several.

    Prompt and response are one text when they are tokenised, with an end-of-sequence token after it, so that no second
    start token stands in the middle. Labels are the tokens of the response; of plain text, and where not responses
    alone are learnt, all.

    Of each set at least one sample is held out for validation, unless the share is 0.

    Args:
        settings: with the values of their preset.
        tokenizer: the model's.
        max_length: counts instead of the settings' where the model has fewer positions.
        author: who writes the texts of `self`.
        progress: told how many samples were tokenised.
    """
    length = max_length or settings.max_length or 1
    whole = settings.packing and not settings.responses_only  # a long text fills several rows
    reader = _Reader(
        tokenizer,
        sys.maxsize if whole else length,
        bool(settings.responses_only),
        bool(settings.packing),
        start_token(tokenizer),
    )
    sources = parse_sources(settings.data, _OPTION)
    if len(sources) > 1 or settings.tokens is not None or any(one.endless for one in sources):
        found = _of_several(sources or (TextSource("texts"),), settings, reader, author)
    else:
        found = [_of_one(settings, reader, progress)]
    name = names_of(sources) if sources else "texts"
    reader.say(name)
    training: list[Sample] = []
    validation: list[Sample] = []
    for kept in found:
        held = _held_out(len(kept), settings.validation_share or 0)
        validation += kept[:held]
        training += kept[held:]
    if not training:
        raise RecoveryError(
            f"{name} leaves {sum(map(len, found))} samples with a response within {length} tokens; training needs one, "
            "and one more for the validation loss: give more samples or a larger --max-length"
        )
    if len(found) > 1:
        random.Random(settings.seed).shuffle(training)
    if settings.packing:
        training = _packed(training, length, reader.start)
        if not settings.responses_only:
            validation = _packed(validation, length, reader.start)[:_MOST_HELD_OUT]
    told = tuple(
        {"name": names_of([source]), "weight": source.weight, "samples": len(kept), "tokens": sum(map(_tokens, kept))}
        for source, kept in zip(sources, found, strict=False)
    )
    return TrainingData(name, tuple(training), tuple(validation), reader.truncated, reader.skipped, told)


def _held_out(samples: int, share: float) -> int:
    """Returns how many samples of a set are held out."""
    return max(0, min(samples - 1, max(1, round(samples * share)))) if share else 0


def _of_one(settings: RecoverySettings, reader: "_Reader", progress: Progress) -> list[Sample]:
    """Reads one set that has an end, all of it or as many samples as were asked for."""
    samples, (name, records) = settings.samples, read_records(settings.data, option=_OPTION)
    drawn = random.Random(settings.seed).sample(records, len(records))
    if samples is not None:
        if not 1 <= samples <= len(records):
            raise RecoveryError(f"{name} holds {len(records)} samples, but --samples {samples} were asked for")
        drawn = drawn[:samples]
    kept = []
    with progress("Tokenising", len(drawn)) as advance:
        for where, record in drawn:
            kept += reader.read(record, f"{name}, {where}")
            advance(1)
    return kept


def _of_several(
    sources: Sequence[TextSource], settings: RecoverySettings, reader: "_Reader", author: Author | None
) -> list[list[Sample]]:
    """Reads sets by their weights, so many samples or tokens of all."""

    def draw(one: TextSource, share: float) -> Iterator[Sample]:
        if one.name == "texts" and not isinstance(settings.data, str | tuple):
            _, records = read_records(settings.data, option=_OPTION)
            drawn: Iterable[Record] = random.Random(settings.seed).sample(records, len(records))
        else:
            drawn = stream(
                one, settings.seed, author, share * ((settings.max_length or 1) if settings.samples else 1), _OPTION
            )
        for where, record in drawn:
            yield from reader.read(record, f"{one.name}, {where}")

    if settings.samples is not None:
        return gather(sources, settings.samples, draw, lambda sample: 1, "samples")
    if settings.tokens is None and (endless := next((one.name for one in sources if one.endless), None)):
        raise RecoveryError(f"{endless} has no end; say by --tokens or --samples how much of it is wanted")
    return gather(sources, settings.tokens, draw, _tokens, "tokens")


def _tokens(sample: Sample) -> int:
    return len(sample["input_ids"])


@dataclass
class _Reader:
    """Makes samples of records, and counts those that are cut or left out."""

    tokenizer: Any
    length: int
    responses_only: bool
    packing: bool
    start: int | None
    read_so_far: int = 0
    truncated: int = 0
    skipped: int = 0

    def read(self, record: Mapping[str, Any], where: str) -> list[Sample]:
        """Returns the sample of a record, or none where it has nothing to learn."""
        sample, cut = _encode(record, self.tokenizer, where, self.length, self.start)
        if not self.responses_only:
            first = (
                sample["input_ids"][0] if self.packing else IGNORED
            )  # which in a packed row the text before predicts
            sample["labels"] = [first, *sample["input_ids"][1:]]
        self.read_so_far += 1
        self.truncated += cut
        learnt = any(label != IGNORED for label in sample["labels"][1:])
        self.skipped += not learnt
        return [sample] if learnt else []

    def say(self, name: str) -> None:
        """Says what was cut and left out."""
        if self.truncated:
            logger.info("%s: %d of %d samples are cut at %d tokens", name, self.truncated, self.read_so_far,
                        self.length)  # fmt: skip
        if self.skipped:
            logger.warning("%s: %d of %d samples have no response within %d tokens and are left out", name,
                           self.skipped, self.read_so_far, self.length)  # fmt: skip


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
