"""Importance criteria: functions from captured activations and weights to scores."""

import torch


def amp_heads(outputs: torch.Tensor, weight: torch.Tensor, *, num_heads: int, num_groups: int) -> torch.Tensor:
    """Scores heads and key-value groups of one sample by the L1 norm of what they add to the residual stream (Eq. 8).

    One head at a time, so that no (tokens, heads, hidden_size) tensor is ever held.

    Args:
        outputs: (tokens, num_heads * head_dim), the concatenated heads `h_n`.
        weight: (num_heads * head_dim, hidden_size), the stacked blocks `W_n` of the output projection (Eq. 6).
        num_heads: query heads.
        num_groups: key-value heads; each group of consecutive query heads scores by the norm of its sum.

    Returns:
        (num_heads + num_groups,) float64: `||h_n W_n||_1 / tokens` for the heads, then for the groups.
    """
    head_outputs = _wide(outputs).tensor_split(num_heads, dim=1)
    head_weights = _wide(weight).tensor_split(num_heads, dim=0)
    group_size = num_heads // num_groups
    heads, groups = [], []
    for first in range(0, num_heads, group_size):
        group = torch.zeros(())
        for head in range(first, first + group_size):
            contribution = head_outputs[head] @ head_weights[head]
            heads.append(_l1(contribution))
            group = contribution if head == first else group.add_(contribution)
        groups.append(heads[-1] if group_size == 1 else _l1(group))
    return torch.stack(heads + groups) / len(outputs)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Widens to float32 at least: float16 overflows in these sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _l1(values: torch.Tensor) -> torch.Tensor:
    return values.abs().sum(dim=1).sum(dtype=torch.float64)


def amp_neurons(inputs: torch.Tensor) -> torch.Tensor:
    """Scores neurons of one sample by their mean absolute activation (Eq. 9).

    Args:
        inputs: (tokens, intermediate_size), the input of the MLP's last projection.

    Returns:
        (intermediate_size,) float64.
    """
    return _wide(inputs).abs().sum(dim=0).double() / len(inputs)
