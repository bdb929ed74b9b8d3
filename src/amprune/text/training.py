"""Instructions with responses as token ids and labels: the loss is on the response alone."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amprune.errors import CalibrationError, RecoveryError
from amprune.running import Progress, no_progress
from amprune.settings import RecoverySettings
from amprune.text.records import read_records, render
from amprune.text.tokens import spans, start_token, started

logger = logging.getLogger(__name__)
IGNORED = -100
"""The label of a token that no loss is taken on."""

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

    def to_dict(self) -> dict[str, Any]:
        """Returns what a record keeps."""
        tokens = sum(len(sample["input_ids"]) for sample in self.training)
        return {
            "name": self.name, "training": len(self.training), "tokens": tokens, "validation": len(self.validation),
            "truncated": self.truncated, "skipped": self.skipped,
        }  # fmt: skip


def load_training_data(
    settings: RecoverySettings, tokenizer: Any, *, max_length: int | None = None, progress: Progress = no_progress
) -> TrainingData:
    """Reads, draws, tokenises and splits a set.

    Prompt and response are one text when they are tokenised, with an end-of-sequence token after it, so that no second
    start token stands in the middle. Labels are the tokens of the response; of plain text, all.

    `max_length` counts instead of the settings' where the model has fewer positions. At least one sample is held out
    for validation, unless the share is 0.
    """
    samples, max_length = settings.samples, max_length or settings.max_length
    name, records = read_records(settings.data, option="--data")
    drawn = random.Random(settings.seed).sample(records, len(records))
    if samples is not None:
        if not 1 <= samples <= len(records):
            raise RecoveryError(f"{name} holds {len(records)} samples, but --samples {samples} were asked for")
        drawn = drawn[:samples]
    kept: list[Sample] = []
    start = start_token(tokenizer)
    truncated = 0
    with progress("Tokenising", len(drawn)) as advance:
        for where, record in drawn:
            sample, cut = _encode(record, tokenizer, f"{name}, {where}", max_length, start)
            truncated += cut
            if any(label != IGNORED for label in sample["labels"][1:]):
                kept.append(sample)
            advance(1)
    skipped = len(drawn) - len(kept)
    if truncated:
        logger.info("%s: %d of %d samples are cut at %d tokens", name, truncated, len(drawn), max_length)
    if skipped:
        logger.warning("%s: %d of %d samples have no response within %d tokens and are left out", name, skipped,
                       len(drawn), max_length)  # fmt: skip
    held = min(len(kept) - 1, max(1, round(len(kept) * settings.validation_share))) if settings.validation_share else 0
    if len(kept) - max(held, 0) < 1:
        raise RecoveryError(
            f"{name} leaves {len(kept)} samples with a response within {max_length} tokens; training needs one, and "
            "one more for the validation loss: give more samples or a larger --max-length"
        )
    training = kept[held:]
    packed = _packed(training, max_length, start) if settings.packing else training
    return TrainingData(name, tuple(packed), tuple(kept[:held]), truncated, skipped)


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
    return [piece for piece in pieces if any(label != IGNORED for label in piece["labels"])]
