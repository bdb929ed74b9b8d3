"""The loss of next-token distributions: the data's, and the divergence from a teacher's, a few tokens at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

CHUNK_BYTES = 2**28
"""What a float32 tensor over the vocabulary takes at most, of which a few exist at a time."""


@dataclass(frozen=True)
class Teaching:
    """What a model is taught on some tokens: the teacher's last hidden states, and how its word counts."""

    model: PreTrainedModel
    hidden: torch.Tensor
    """Shape (tokens, hidden size); the head is applied a chunk at a time."""
    weight: float = 1.0
    """Of the divergence from the teacher; the rest is the data's loss."""
    temperature: float = 1.0

    def at(self, where: slice | torch.Tensor) -> "Teaching":
        """Returns the same on some of the tokens."""
        return replace(self, hidden=self.hidden[where])


def summed_loss(
    logits: torch.Tensor, targets: torch.Tensor, teaching: Teaching | None = None, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the loss of next-token distributions, summed over tokens, and has its gradient ready.

    It is the cross-entropy with the targets, or with a teacher `(1 - weight) * cross-entropy + weight *
    temperature^2 * KL(teacher || student)`, the forward divergence of the softened distributions; the square keeps the
    gradient's scale (Hinton et al., 2015, arXiv 1503.02531). Where one vocabulary is padded further than the other, the
    divergence is that over the ids of both.

    Where a gradient is wanted, it is computed along with the loss and written over the logits, which the caller must
    not read again: so no second tensor of this size exists.

    Args:
        logits: shape (tokens, vocabulary).
        targets: the next token of each, shape (tokens,).
        teaching: the teacher, on the same tokens.
        counted: whether a token counts, shape (tokens,); None is all.
    """
    total: torch.Tensor = _Loss.apply(logits, targets, teaching, counted)  # type: ignore[no-untyped-call]
    return total


class _Loss(torch.autograd.Function):
    """The loss, and along with it its gradient, in place of the logits and in their dtype."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, teaching: Teaching | None, counted: torch.Tensor | None
    ) -> torch.Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
        values = logits.detach()  # shares what tells autograd of changes: who had kept the logits would be refused
        for start in range(0, len(values), size):
            part = slice(start, start + size)
            loss, slope = _chunk(values[part], targets[part], teaching and teaching.at(part), ctx.needs_input_grad[0])
            if counted is not None:
                loss = torch.where(counted[part], loss, 0)
                slope = None if slope is None else slope.mul_(counted[part, None])
            total += loss.sum()
            if slope is not None:
                values[part].copy_(slope)
        ctx.gradient = values if ctx.needs_input_grad[0] else None
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(float(upstream)), None, None, None  # a tensor would be rounded to the logits' dtype first


def _chunk(
    logits: torch.Tensor, targets: torch.Tensor, teaching: Teaching | None, with_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the loss of each token, and its derivatives by the logits in float32."""
    weight = 0.0 if teaching is None else teaching.weight
    loss, slope = logits.new_zeros(len(logits), dtype=torch.float32), None
    if weight < 1:
        found = log_softmax(logits, dim=-1, dtype=torch.float32)
        loss -= (1 - weight) * found.gather(-1, targets[:, None])[:, 0]
        if with_slope:
            slope = found.exp_().mul_(1 - weight)
            slope.scatter_add_(-1, targets[:, None], slope.new_full((len(slope), 1), weight - 1))
    if teaching is not None and weight > 0:
        heat, given = teaching.temperature, head_logits(teaching.model, teaching.hidden)
        known = min(logits.shape[-1], given.shape[-1])
        wanted, found = (_log_chances(one[:, :known], heat) for one in (given, logits))
        del given
        chances = wanted.exp()
        loss += weight * heat**2 * wanted.sub_(found).mul_(chances).sum(-1)
        if with_slope:
            apart = found.exp_().sub_(chances).mul_(weight * heat)
            slope = slope if slope is not None else apart if known == logits.shape[-1] else torch.zeros_like(logits)
            if slope is not apart:
                slope[:, :known] += apart
    return loss, slope


def _log_chances(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return log_softmax(logits if temperature == 1 else logits.float() / temperature, dim=-1, dtype=torch.float32)


@torch.no_grad()
def teacher_hidden(teacher: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states, shape (batch, length, hidden size)."""
    output: Any = teacher.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    states: torch.Tensor = output.last_hidden_state
    return states


@torch.no_grad()
def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the logits of hidden states (tokens, hidden size), scaled or capped as the family does it."""
    with _decoder_replaced(model, hidden[None]):
        output: Any = model(inputs_embeds=hidden[None], use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


@contextmanager
def _decoder_replaced(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Lets the decoder hand out given states, so that the family's own `forward` makes logits of them."""
    decoder: Any = model.get_decoder()
    own = vars(decoder).get("forward")  # set where the model is spread over devices
    given = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)  # which GPT-2 reads, too
    decoder.forward = lambda *arguments, **options: given
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
