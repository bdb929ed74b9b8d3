"""The divergence of a student's next-token distribution from its teacher's, a few tokens at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK = 64
"""Tokens whose distributions over the vocabulary exist in float32 at a time."""


def divergence(
    student: torch.Tensor, hidden: torch.Tensor, teacher: PreTrainedModel, *, temperature: float
) -> torch.Tensor:
    """Returns the forward KL divergence KL(teacher || student), summed over tokens, times temperature squared.

    Args:
        student: logits of shape (tokens, vocabulary), with a gradient.
        hidden: the teacher's last hidden states of shape (tokens, hidden size), from `teacher_hidden`.
        teacher: whose language-model head is applied a chunk at a time, without a gradient.
        temperature: both distributions are softened by it; its square keeps the gradient's scale (Hinton et al., 2015).
    """
    total = student.new_zeros((), dtype=torch.float32)
    for ours, states in zip(torch.split(student, CHUNK), torch.split(hidden, CHUNK), strict=True):
        # Recomputed in the backward pass, so that no float32 distribution is kept for it.
        total = total + checkpoint(_chunk, ours, states, teacher, temperature, use_reentrant=False)
    return total


def _chunk(student: torch.Tensor, hidden: torch.Tensor, teacher: PreTrainedModel, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        wanted = log_softmax(head_logits(teacher, hidden).float() / temperature, dim=-1)
    ours = log_softmax(student.float() / temperature, dim=-1)
    return kl_div(ours, wanted, reduction="sum", log_target=True) * temperature**2


@torch.no_grad()
def teacher_hidden(teacher: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states, shape (batch, length, hidden size)."""
    output: Any = teacher.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    states: torch.Tensor = output.last_hidden_state
    return states


@torch.no_grad()
def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the logits of hidden states (tokens, hidden size), scaled or capped as the family does it."""
    with _base_replaced(model, hidden[None]):
        output: Any = model(inputs_embeds=hidden[None], use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


@contextmanager
def _base_replaced(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Lets the base model hand out given states, so that the family's own `forward` makes logits of them."""
    base: Any = model.base_model
    own = vars(base).get("forward")  # set where the model is spread over devices
    base.forward = lambda *arguments, **options: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own
