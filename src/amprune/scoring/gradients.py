"""First-order Taylor scores: one forward pass, then one backward pass block by block.

The forward pass keeps what enters each block and nothing else. From the last block to the first, each block is then
computed again, this time with gradients, for all batches in turn: memory holds the weights, what enters the blocks, and
the gradients of one block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from amprune.errors import ScoresError
from amprune.model.architecture import Architecture, PreTrainedModel, make_config
from amprune.model.families import Cut
from amprune.model.loading import input_device
from amprune.model.reader import Checkpoint
from amprune.running import Progress, binary, free_memory, no_progress
from amprune.scoring.batches import batches, check_calibration, padded, predicting_samples
from amprune.scoring.scores import LayerScores, Scores
from amprune.scoring.weights import taylor
from amprune.text.calibration import CalibrationSet

_BATCH_TOKENS = 512
"""Bounds the logits of a batch; a longer sample is a batch of its own."""
_LOGITS = 12
"""Bytes of a logit beside its own: in float32, its log-probability and its gradient."""


@dataclass
class _Batch:
    """What one batch was in the forward pass."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Arguments of each block, in order."""
    upstream: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Gradient of the loss by the output of the block under way."""


def check_memory(checkpoint: Checkpoint, calibration: CalibrationSet, dtype: torch.dtype, *, device: str) -> None:
    """Refuses a model whose gradients do not fit into the memory that is free."""
    shape, size = checkpoint.shape, dtype.itemsize
    weights = shape.parameters * size
    states = calibration.tokens * shape.hidden_size * size * (shape.num_layers + 1)
    gradients = (shape.attention_parameters + shape.mlp_parameters) // shape.num_layers * 4
    longest = max(_BATCH_TOKENS, *map(len, calibration.samples))
    logits = longest * make_config(checkpoint.config, where=str(checkpoint.folder)).vocab_size * (size + _LOGITS)
    needed, free = weights + states + gradients + logits, free_memory(device)
    if needed > free:
        raise ScoresError(
            f"a criterion that needs gradients takes about {binary(needed)} here (weights {binary(weights)}, what "
            f"enters the blocks {binary(states)}, gradients of one block {binary(gradients)}, logits "
            f"{binary(logits)}), but {binary(free)} are free on {device}; give a larger --device, a smaller --dtype, "
            "fewer --samples, or a criterion that needs no gradients, such as amp"
        )


def score_gradients(
    model: PreTrainedModel,
    architecture: Architecture,
    calibration: CalibrationSet,
    *,
    progress: Progress = no_progress,
) -> tuple[tuple[LayerScores, ...], Scores]:
    """Scores every unit and every block by the sum of `|w * dL/dw|` over the weights and biases that it owns.

    L is the mean next-token cross-entropy of each sample, averaged over the samples; gradients add up in float32 over
    the whole calibration set before the absolute value is taken.

    Returns:
        The scores of each layer's units, and (num_layers,) float32 of the blocks.
    """
    check_calibration(model, calibration, batch_tokens=_BATCH_TOKENS)
    samples = predicting_samples(calibration)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _without_gradients(frozen), progress("Gradients", len(samples) + architecture.shape.num_layers) as advance:
        passed = [
            _forward(model, architecture, batch, len(samples), advance) for batch in batches(samples, _BATCH_TOKENS)
        ]
        layers, blocks = [], []
        for layer in reversed(range(architecture.shape.num_layers)):
            scores, block = _score_block(model, architecture, layer, passed)
            layers.append(scores)
            blocks.append(block)
            advance(1)
    return tuple(reversed(layers)), np.array(blocks[::-1], dtype=np.float32)


@contextmanager
def _without_gradients(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _forward(
    model: PreTrainedModel,
    architecture: Architecture,
    samples: Sequence[Sequence[int]],
    total: int,
    advance: Callable[[int], None],
) -> _Batch:
    """Runs a batch, keeps the arguments of each block, and derives the loss by the output of the last one."""
    batch, leaf = _Batch(), list[torch.Tensor]()
    inputs = padded(samples, input_device(model))

    def keep(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch.calls.append((args, kwargs))

    def cut(_module: object, _args: object, output: Any) -> Any:
        """Starts the graph here: what comes before is computed without one."""
        leaf.append(_hidden(output).detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    with ExitStack() as stack, torch.enable_grad():
        blocks = [model.get_submodule(architecture.block(layer)) for layer in range(architecture.shape.num_layers)]
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.callback(blocks[-1].register_forward_hook(cut).remove)
        logits = model(**inputs, use_cache=False).logits
        (batch.upstream,) = torch.autograd.grad(_loss(logits, inputs) / total, leaf)
    advance(len(samples))
    return batch


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _loss(logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the sum over samples of each sample's mean next-token cross-entropy."""
    targets, counted = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, reduction="none")
    return ((losses * counted).sum(dim=1) / counted.sum(dim=1)).sum()


def _score_block(
    model: PreTrainedModel, architecture: Architecture, layer: int, passed: Sequence[_Batch]
) -> tuple[LayerScores, float]:
    """Adds up the gradients of one block over all batches, and hands each batch's on to the block before."""
    parameters = dict(model.named_parameters())
    weights = {cut: parameters[name] for cut, name in architecture.layer_tensors(layer).items()}
    block = model.get_submodule(architecture.block(layer))
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        gradients = _block_gradients(block, weights, passed)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    if not all(torch.isfinite(gradient).all() for gradient in gradients.values()):
        raise ScoresError(
            f"layer {layer}: a gradient is not finite; score in another dtype (--dtype bfloat16 or float32), or check "
            "the checkpoint"
        )
    with torch.no_grad():
        return taylor(weights, gradients, architecture.shape), _block_sum(weights, gradients)


def _block_gradients(
    block: torch.nn.Module, weights: dict[Cut, torch.nn.Parameter], passed: Sequence[_Batch]
) -> dict[Cut, torch.Tensor]:
    sums = {cut: torch.zeros_like(weight, dtype=torch.float32) for cut, weight in weights.items()}
    for batch in passed:
        args, kwargs = batch.calls.pop()
        named = not args  # some models name every argument
        hidden = (kwargs["hidden_states"] if named else args[0]).detach().requires_grad_()
        kwargs = {**kwargs, "hidden_states": hidden} if named else kwargs
        with torch.enable_grad():
            output = _hidden(block(*(() if named else (hidden, *args[1:])), **kwargs))
            upstream, *found = torch.autograd.grad(output, [hidden, *weights.values()], batch.upstream)
        batch.upstream = upstream
        for cut, gradient in zip(weights, found, strict=True):
            sums[cut] += gradient
    return sums


def _block_sum(weights: dict[Cut, torch.nn.Parameter], gradients: dict[Cut, torch.Tensor]) -> float:
    products = ((weight.float() * gradients[cut]).abs().sum(dtype=torch.float64) for cut, weight in weights.items())
    return float(sum(products))
