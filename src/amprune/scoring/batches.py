"""The calibration set as padded batches of samples of like length."""

from collections.abc import Iterator, Sequence

import torch

from amprune.errors import ScoresError
from amprune.model.architecture import PreTrainedModel
from amprune.model.loading import vocabulary_size
from amprune.text.calibration import CalibrationSet


def check_calibration(model: PreTrainedModel, calibration: CalibrationSet, *, batch_tokens: int) -> None:
    """Refuses a set that the model cannot read."""
    if batch_tokens < 1:
        raise ScoresError(f"batch_tokens is {batch_tokens}, expected at least 1")
    if not calibration.samples or not all(calibration.samples):
        raise ScoresError(f"the calibration set {calibration.name!r} is empty or holds an empty sample")
    _check_ids(calibration, vocabulary_size(model))
    _check_lengths(calibration, getattr(model.config, "max_position_embeddings", None))


def _check_ids(calibration: CalibrationSet, vocabulary: int) -> None:
    for extreme in (min(map(min, calibration.samples)), max(map(max, calibration.samples))):
        if not 0 <= extreme < vocabulary:
            raise ScoresError(
                f"the calibration set {calibration.name!r} holds token id {extreme}, but the model embeds the ids 0 to "
                f"{vocabulary - 1}; use the tokenizer of this very model"
            )


def _check_lengths(calibration: CalibrationSet, positions: int | None) -> None:
    longest = max(map(len, calibration.samples))
    if positions is not None and longest > positions:
        raise ScoresError(
            f"the calibration set {calibration.name!r} holds a sample of {longest} tokens, but the model has "
            f"{positions} positions; cut the samples at {positions} tokens"
        )


def predicting_samples(calibration: CalibrationSet) -> list[Sequence[int]]:
    """Returns the samples that have a next token to predict."""
    samples: list[Sequence[int]] = [sample for sample in calibration.samples if len(sample) > 1]
    if not samples:
        raise ScoresError(
            f"no sample of the calibration set {calibration.name!r} has two tokens, so there is no next token to "
            "predict; give longer samples"
        )
    return samples


def batches(samples: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Groups samples of like length, so that little is padded."""
    batch: list[Sequence[int]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def padded(batch: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Pads on the right, where causal attention keeps padding from reaching any token."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(batch):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
