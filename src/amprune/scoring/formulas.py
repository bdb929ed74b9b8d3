"""Criteria over what enters the two output projections of a layer, all from one pass over the calibration set.

A pass measures each sample (`contribution_norms`, `input_moments`) and averages over samples, each sample over its own
tokens first; a criterion turns the averages of a layer into scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from amprune.model.shape import ModelShape
from amprune.scoring.scores import LayerScores


@dataclass(frozen=True)
class ProjectionInputs:
    """What enters an output projection, averaged over the samples, and the norms of the weights that it meets.

    All of shape (features,), float64.
    """

    mean: torch.Tensor
    absolute: torch.Tensor
    """Mean absolute value."""
    square: torch.Tensor
    """Mean square."""
    root: torch.Tensor
    """Root mean square of each sample, averaged over the samples."""
    weight_l1: torch.Tensor
    """L1 norm of the weights that read the feature."""
    weight_l2: torch.Tensor
    """L2 norm of the weights that read the feature."""

    @property
    def variance(self) -> torch.Tensor:
        """Returns the variance over all tokens."""
        return (self.square - self.mean.square()).clamp(min=0)


@dataclass(frozen=True)
class LayerStatistics:
    """All that the criteria of this module need of one decoder layer."""

    contributions_l1: torch.Tensor
    """(num_heads + num_groups,): `||h_n W_n||_1 / tokens` of heads, then of key-value groups (Eq. 8)."""
    contributions_l2: torch.Tensor
    """(num_heads + num_groups,): the same with the entry-wise L2 norm, over the square root of the tokens."""
    attention: ProjectionInputs
    """Of the attention's output projection: num_heads * head_dim features."""
    mlp: ProjectionInputs
    """Of the MLP's last projection: a feature is a neuron."""


Rule = Callable[[LayerStatistics, ModelShape], LayerScores]
"""Turns what was measured of a layer into scores of its units."""


def contribution_norms(outputs: torch.Tensor, weight: torch.Tensor, *, num_heads: int, num_groups: int) -> torch.Tensor:
    """Measures what heads and key-value groups of one sample add to the residual stream (Eq. 8).

    One head at a time, so that no (tokens, heads, hidden_size) tensor is ever held.

    Args:
        outputs: (tokens, num_heads * head_dim), the concatenated heads `h_n`.
        weight: (num_heads * head_dim, hidden_size), the stacked blocks `W_n` of the output projection (Eq. 6).
        num_heads: query heads.
        num_groups: key-value heads; of each group of consecutive query heads, the sum is measured.

    Returns:
        (2, num_heads + num_groups) float64: `||h_n W_n||_1 / tokens` and `||h_n W_n||_2 / sqrt(tokens)`.
    """
    head_outputs = _wide(outputs).tensor_split(num_heads, dim=1)
    head_weights = _wide(weight).tensor_split(num_heads, dim=0)
    group_size = num_heads // num_groups
    heads, groups = [], []
    for first in range(0, num_heads, group_size):
        group = torch.zeros(())
        for head in range(first, first + group_size):
            contribution = head_outputs[head] @ head_weights[head]
            heads.append(_norms(contribution))
            group = contribution if head == first else group.add_(contribution)
        groups.append(heads[-1] if group_size == 1 else _norms(group))
    return torch.stack(heads + groups, dim=1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Widens to float32 at least: float16 overflows in these sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _norms(values: torch.Tensor) -> torch.Tensor:
    tokens = len(values)
    l1 = values.abs().sum(dim=1).sum(dtype=torch.float64) / tokens
    l2 = torch.linalg.vector_norm(values, dim=1).double().square().mean().sqrt()
    return torch.stack([l1, l2])


def input_moments(inputs: torch.Tensor) -> torch.Tensor:
    """Measures what enters a projection for one sample.

    Args:
        inputs: (tokens, features).

    Returns:
        (4, features) float64: mean, mean absolute value (Eq. 9 for the MLP), mean square, root mean square.
    """
    wide = _wide(inputs)
    sums = [values.sum(dim=0, dtype=torch.float64) for values in (wide, wide.abs(), wide.square())]
    mean, absolute, square = (total / len(inputs) for total in sums)
    return torch.stack([mean, absolute, square, square.sqrt()])


def feature_norms(weight: torch.Tensor) -> torch.Tensor:
    """Measures the weights that read each feature.

    Args:
        weight: (features, hidden_size).

    Returns:
        (2, features) float64: their L1 and L2 norms.
    """
    wide = _wide(weight)
    return torch.stack([wide.abs().sum(dim=1), torch.linalg.vector_norm(wide, dim=1)]).double()


def amp(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores heads by Eq. 8 and neurons by Eq. 9 of AMP."""
    return _scores(layer.contributions_l1, layer.mlp.absolute, shape)


def reversed_amp(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores by AMP with the sign turned, so that the most important units go (the coherence check of the paper)."""
    return _scores(-layer.contributions_l1, -layer.mlp.absolute, shape)


def amp_l2(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores as AMP with the L2 norm in place of the L1 norm in both equations."""
    return _scores(layer.contributions_l2, layer.mlp.root, shape)


def amp_weighted(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores heads as AMP, neurons by Eq. 9 times the L2 norm of the weights that read the neuron."""
    return _scores(layer.contributions_l1, layer.mlp.absolute * layer.mlp.weight_l2, shape)


def activation_l2(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores by the root mean square of a head's output and of a neuron, whatever weights read them."""
    return _scores(_per_unit(layer.attention.square, shape).sqrt(), layer.mlp.square.sqrt(), shape)


def wanda_sp(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores by `sum |W_ij| * ||x_j||_2` over the weights of the output projection that read the unit."""
    heads, neurons = (inputs.weight_l1 * inputs.square.sqrt() for inputs in (layer.attention, layer.mlp))
    return _scores(_per_unit(heads, shape), neurons, shape)


def flap(layer: LayerStatistics, shape: ModelShape) -> LayerScores:
    """Scores by `Var(x_j) * ||W_j||_2^2` over the unit, standardised over the features of the projection."""
    heads, neurons = (
        _standardised(inputs.variance * inputs.weight_l2.square()) for inputs in (layer.attention, layer.mlp)
    )
    return _scores(_per_unit(heads, shape) / shape.head_dim, neurons, shape)


def _standardised(values: torch.Tensor) -> torch.Tensor:
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    return (values - values.mean()) / spread if spread > 0 else torch.zeros_like(values)


def _per_unit(features: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Sums (num_heads * head_dim,) features over each head and each key-value group: (num_heads + num_groups,)."""
    heads = features.reshape(shape.num_attention_heads, -1).sum(dim=1)
    return torch.cat([heads, heads.reshape(shape.num_key_value_heads, -1).sum(dim=1)])


def _scores(attention: torch.Tensor, neurons: torch.Tensor, shape: ModelShape) -> LayerScores:
    heads = attention.float().cpu().numpy()
    return LayerScores(
        heads=heads[: shape.num_attention_heads],
        groups=heads[shape.num_attention_heads :],
        neurons=neurons.float().cpu().numpy(),
    )
