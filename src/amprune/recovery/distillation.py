"""The divergence of a student's next-token distribution from its teacher's, a few tokens at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

CHUNK = 64
"""Tokens whose distributions over the vocabulary exist in float32 at a time."""


def divergence(
    student: torch.Tensor, hidden: torch.Tensor, teacher: PreTrainedModel, *, temperature: float
) -> torch.Tensor:
    """Returns the forward KL divergence KL(teacher || student), summed over tokens, times temperature squared.

    `student` are logits (tokens, vocabulary) with a gradient, `hidden` the teacher's last states (tokens, hidden size):
    its head is applied a chunk at a time. The square keeps the gradient's scale (Hinton et al., 2015). Where one
    vocabulary is padded further than the other, the divergence is that over the ids of both.
    """
    total: torch.Tensor = _Divergence.apply(student, hidden, teacher, temperature)  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    """The divergence, and along with it its gradient, `temperature * (student - teacher)` in probabilities.

    Automatic differentiation would keep several float32 tensors over the vocabulary for each token; this keeps one, in
    the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, hidden: torch.Tensor, teacher: PreTrainedModel, temperature: float
    ) -> torch.Tensor:
        total, gradient = student.new_zeros((), dtype=torch.float32), torch.empty_like(student)
        chunks = (torch.split(tensor, CHUNK) for tensor in (student, hidden, gradient))
        for ours, states, slope in zip(*chunks, strict=True):
            given = head_logits(teacher, states)
            known = min(ours.shape[-1], given.shape[-1])
            wanted = log_softmax(given[:, :known].float() / temperature, dim=-1)
            found = log_softmax(ours[:, :known].float() / temperature, dim=-1)
            total += kl_div(found, wanted, reduction="sum", log_target=True) * temperature**2
            slope[:, :known].copy_(found.exp_().sub_(wanted.exp_()).mul_(temperature))
            slope[:, known:] = 0
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * float(upstream), None, None, None  # a tensor would be rounded to the logits' dtype first


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
