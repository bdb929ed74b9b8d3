"""Logits of an output and of what it should be: the masked dense model, streamed from its files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from transformers import PreTrainedModel

from amprune.architecture import Architecture, quiet_transformers
from amprune.checkpoint import Checkpoint
from amprune.checkpoint.loading import vocabulary_size
from amprune.checkpoint.streaming import streamed_model
from amprune.depth import handed_on
from amprune.errors import VerificationError
from amprune.memory import release_memory
from amprune.plan import PruningPlan
from amprune.slicing import kept_tensors, masks

_SEQUENCES, _LENGTH = 2, 48


def logit_difference(
    output: Checkpoint,
    dense: Checkpoint,
    plan: PruningPlan,
    biases: Mapping[str, torch.Tensor],
    advance: Callable[[int], None],
) -> float:
    """Returns the largest difference of any logit, in units of the masked dense model's standard deviation.

    The masked dense model is given the biases that the output stores in the place of `biases`, by their dense names.
    """
    pruned, shifts = probe_logits(output), _shifts(output, dense, plan, biases)
    advance(1)
    expected = probe_logits(dense, partial(_masked, plan=plan, architecture=dense.architecture, shifts=shifts))
    advance(1)
    for name, logits in (("the masked dense model", expected), ("the pruned model", pruned)):
        if not torch.isfinite(logits).all():
            raise VerificationError(f"{name} gives logits that are not finite")
    return float((pruned - expected).abs().max() / expected.std())


def probe_logits(
    checkpoint: Checkpoint, changed: Callable[[PreTrainedModel], AbstractContextManager[None]] | None = None
) -> torch.Tensor:
    """Computes (2, length, vocabulary) logits of seeded random tokens in float64, streaming the model from its files.

    `changed(model)` is entered around the forward pass and may put hooks on the model.
    """
    model = streamed_model(checkpoint, torch.float64)
    vocabulary = vocabulary_size(model)
    length = min(_LENGTH, checkpoint.positions or _LENGTH)
    ids = torch.randint(vocabulary, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), quiet_transformers(), changed(model) if changed else nullcontext():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    del model
    release_memory()  # Modules and their hooks refer to each other; the next model must not stand beside this one.
    return logits


@contextmanager
def _masked(
    model: PreTrainedModel, plan: PruningPlan, architecture: Architecture, shifts: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Zeroes the inputs of output projections where units are removed, and lets removed blocks hand on their input.

    The first is the same as zeroing columns of the projections. `shifts` are added to what projections give.
    """
    with ExitStack() as stack:
        for name, mask in masks(plan, architecture):
            hook = lambda _, inputs, mask=mask: (inputs[0] * mask, *inputs[1:])  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for name, shift in shifts.items():
            add = lambda _module, _inputs, output, shift=shift: output + shift  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_hook(add).remove)
        skip = lambda _, args, kwargs, output: handed_on(args, kwargs, output)  # noqa: E731
        for layer in set(range(len(plan.layers))).difference(plan.kept_layers):
            block = model.get_submodule(architecture.block(layer))
            stack.callback(block.register_forward_hook(skip, with_kwargs=True).remove)
        yield


def _shifts(
    output: Checkpoint, dense: Checkpoint, plan: PruningPlan, biases: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns by how much the output's biases differ from the dense ones, by the module of the dense model."""
    changed = kept_tensors(dense.architecture, plan, biases)
    return {old.removesuffix(".bias"): output[name].double() - dense[old].double() for name, old in changed.items()}
