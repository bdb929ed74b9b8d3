"""Criteria over the weights that a unit owns: every slice that pruning it would remove."""

from collections.abc import Mapping

import numpy as np
import torch

from amprune.model.architecture import unit_counts, unit_width
from amprune.model.families import Cut, Unit
from amprune.model.shape import ModelShape
from amprune.scoring.scores import LayerScores


def magnitude(weights: Mapping[Cut, torch.Tensor], shape: ModelShape) -> LayerScores:
    """Scores by the L2 norm of all weights and biases that a unit owns.

    Args:
        weights: the tensors of one layer that pruning cuts.
        shape: of the model.
    """
    sums = unit_sums({cut: weight.float().square() for cut, weight in weights.items()}, shape)
    return _scores({name: total.sqrt() for name, total in _with_groups(sums, shape).items()})


def taylor(
    weights: Mapping[Cut, torch.Tensor], gradients: Mapping[Cut, torch.Tensor], shape: ModelShape
) -> LayerScores:
    """Scores by `sum |w * dL/dw|` over all weights and biases that a unit owns.

    Args:
        weights: the tensors of one layer that pruning cuts.
        gradients: of the loss over the whole calibration set, of the same shapes.
        shape: of the model.
    """
    products = {cut: (weight.float() * gradients[cut]).abs() for cut, weight in weights.items()}
    return _scores(_with_groups(unit_sums(products, shape), shape))


def unit_sums(values: Mapping[Cut, torch.Tensor], shape: ModelShape) -> dict[Unit, torch.Tensor]:
    """Adds up, for every unit of one layer, the values in the slices that the unit owns.

    Args:
        values: a tensor for each cut, of the shape of the weight.
        shape: of the model.

    Returns:
        (units,) float64 for query heads, key-value heads and neurons, each without what another kind owns.
    """
    counts = unit_counts(shape)
    sums = {unit: torch.zeros(count, dtype=torch.float64) for unit, count in counts.items()}
    for cut, tensor in values.items():
        line = tensor.movedim(cut.axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        line = line.sum(dim=1, dtype=torch.float64).cpu()
        for unit in cut.units:
            width = unit_width(cut, unit, shape.head_dim)
            block, line = line[: counts[unit] * width], line[counts[unit] * width :]
            sums[unit] += block.reshape(-1, width).sum(dim=1)
    return sums


def _with_groups(sums: Mapping[Unit, torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """A key-value group owns its key-value head and the query heads that read it."""
    heads = sums[Unit.QUERY_HEAD]
    groups = sums[Unit.KEY_VALUE_HEAD] + heads.reshape(shape.num_key_value_heads, -1).sum(dim=1)
    return {"heads": heads, "groups": groups, "neurons": sums[Unit.NEURON]}


def _scores(values: Mapping[str, torch.Tensor]) -> LayerScores:
    return LayerScores(**{name: value.numpy().astype(np.float32) for name, value in values.items()})


def random_scores(shape: ModelShape, *, seed: int, layer: int) -> LayerScores:
    """Draws scores between 0 and 1, for every layer anew."""
    draw = np.random.default_rng([seed, layer])
    sizes = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    return LayerScores(*(draw.random(size, dtype=np.float32) for size in sizes))
