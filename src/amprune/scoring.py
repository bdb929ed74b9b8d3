"""One forward pass over the calibration set, with hooks on the output projections, serves heads and neurons alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from amprune.architecture import Architecture
from amprune.calibration import CalibrationSet
from amprune.checkpoint.loading import input_device, vocabulary_size
from amprune.criteria import amp_heads, amp_neurons
from amprune.errors import ScoresError
from amprune.progress import Progress, no_progress
from amprune.scores import LayerScores
from amprune.shape import ModelShape

CRITERION = "amp"


@dataclass
class _Pass:
    """The batch under way and what has been summed up to now."""

    lengths: Sequence[int] = ()
    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    neurons: dict[int, torch.Tensor] = field(default_factory=dict)


def score_layers(
    model: PreTrainedModel,
    architecture: Architecture,
    calibration: CalibrationSet,
    *,
    batch_tokens: int = 4096,
    progress: Progress = no_progress,
) -> tuple[LayerScores, ...]:
    """Scores every head, group and neuron by AMP's criterion (Eq. 8 and 9), averaged over the samples.

    Each sample is averaged over its own tokens first; padding never counts. `batch_tokens` bounds the tokens of a
    batch, padding included, and changes no score beyond rounding.

    Raises:
        ScoresError: an activation is not finite (names the layer), a token id is outside of the vocabulary, or a
            sample is longer than the model's positions.
    """
    if batch_tokens < 1:
        raise ScoresError(f"batch_tokens is {batch_tokens}, expected at least 1")
    if not calibration.samples or not all(calibration.samples):
        raise ScoresError(f"the calibration set {calibration.name!r} is empty or holds an empty sample")
    _check_ids(calibration, vocabulary_size(model))
    _check_lengths(calibration, getattr(model.config, "max_position_embeddings", None))
    state = _Pass()
    with (
        torch.inference_mode(),
        _hooks(model, architecture, state),
        progress("Scoring", len(calibration.samples)) as advance,
    ):
        for batch in _batches(calibration.samples, batch_tokens):
            state.lengths = [len(sample) for sample in batch]
            # The base model leaves out the vocabulary projection, which no score needs.
            model.base_model(**_padded(batch, input_device(model)), use_cache=False)
            advance(len(batch))
    samples, shape = len(calibration.samples), architecture.shape
    return tuple(_layer_scores(state, layer, samples, shape) for layer in range(shape.num_layers))


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


def _batches(samples: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Groups samples of like length, so that little is padded."""
    batch: list[Sequence[int]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def _padded(batch: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Pads on the right, where causal attention keeps padding from reaching any token."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(batch):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextmanager
def _hooks(model: PreTrainedModel, architecture: Architecture, state: _Pass) -> Iterator[None]:
    family, shape = architecture.family, architecture.shape
    with ExitStack() as stack:
        for layer in range(shape.num_layers):
            prefix = family.layer_prefix.format(layer=layer)
            for name, hook in (
                (family.attention_output, _head_hook(state, layer, shape)),
                (family.mlp_output, _neuron_hook(state, layer)),
            ):
                handle = model.get_submodule(prefix + name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
        yield


_Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]


def _samples(inputs: tuple[torch.Tensor, ...], lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields the (tokens, features) activations of each sample, without its padding."""
    activations = inputs[0].reshape(len(lengths), -1, inputs[0].shape[-1])
    for row, length in enumerate(lengths):
        yield activations[row, :length]


def _head_hook(state: _Pass, layer: int, shape: ModelShape) -> _Hook:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        with align_module_device(module):
            weight = module.weight if isinstance(module, Conv1D) else module.weight.T
            weight = weight.to(inputs[0].device).to(torch.promote_types(weight.dtype, torch.float32))
        for outputs in _samples(inputs, state.lengths):
            scores = amp_heads(
                outputs, weight, num_heads=shape.num_attention_heads, num_groups=shape.num_key_value_heads
            )
            state.heads[layer] = state.heads.get(layer, 0) + scores

    return hook


def _neuron_hook(state: _Pass, layer: int) -> _Hook:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        for activations in _samples(inputs, state.lengths):
            state.neurons[layer] = state.neurons.get(layer, 0) + amp_neurons(activations)

    return hook


def _layer_scores(state: _Pass, layer: int, samples: int, shape: ModelShape) -> LayerScores:
    means = {}
    for part, sums in (("attention", state.heads), ("MLP", state.neurons)):
        mean = (sums[layer] / samples).cpu()
        if not torch.isfinite(mean).all():
            raise ScoresError(
                f"layer {layer}: the {part} gives activations that are not finite; score in another dtype (--dtype "
                "bfloat16 or float32: float16 overflows at 65,504), or check the checkpoint"
            )
        means[part] = mean.numpy().astype(np.float32)
    heads = means["attention"]
    return LayerScores(
        heads=heads[: shape.num_attention_heads],
        groups=heads[shape.num_attention_heads :],
        neurons=means["MLP"],
    )
