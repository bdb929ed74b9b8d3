"""The dense model made to compute what a pruned one would: removed units masked, removed blocks skipped."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from amprune.cut.slicing import cuts_by_tensor, masks
from amprune.model.architecture import Architecture, PreTrainedModel
from amprune.plan.artefact import PruningPlan
from amprune.scoring.blocks import handed_on


@contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan, architecture: Architecture) -> Iterator[None]:
    """Zeroes the inputs of output projections where units are removed, and lets removed blocks hand on their input.

    The first is the same as zeroing columns of the projections. Masks follow the activations to their device and dtype.
    """
    with ExitStack() as stack:
        for name, mask in masks(plan, architecture):
            hook = lambda _, inputs, mask=mask: (inputs[0] * mask.to(inputs[0]), *inputs[1:])  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        skip = lambda _, args, kwargs, output: handed_on(args, kwargs, output)  # noqa: E731
        for layer in set(range(len(plan.layers))).difference(plan.kept_layers):
            block = model.get_submodule(architecture.block(layer))
            stack.callback(block.register_forward_hook(skip, with_kwargs=True).remove)
        yield


def whole_tensors(
    model: PreTrainedModel, plan: PruningPlan, architecture: Architecture, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Brings tensors of a pruned model, by their dense names, to the sizes of the dense one.

    Of a tensor that the plan cuts, the given one has what stays; the rest is the dense model's, which `masked` leaves
    without effect.
    """
    changes, whole = cuts_by_tensor(architecture, plan), {}
    for name, tensor in tensors.items():
        dense = model.get_parameter(name).detach()
        whole[name] = tensor.detach().to(dense)
        if name in changes:
            cut, kept = changes[name]
            whole[name] = dense.index_copy(cut.axis, kept.to(dense.device), whole[name])
    return whole


@contextmanager
def swapped(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Puts tensors of the same sizes in the place of parameters, by their names."""
    before = {name: model.get_parameter(name).data for name in tensors}
    try:
        for name, tensor in tensors.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor
