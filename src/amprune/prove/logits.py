"""Logits of an output and of what it should be: the masked dense model, streamed from its files."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from amprune.cut.masking import masked
from amprune.cut.slicing import kept_tensors, masks
from amprune.errors import VerificationError
from amprune.model.architecture import Architecture, quiet_transformers
from amprune.model.loading import vocabulary_size
from amprune.model.reader import Checkpoint
from amprune.model.streaming import streamed_model
from amprune.plan.artefact import PruningPlan
from amprune.running import release_memory

_SEQUENCES, _LENGTH = 2, 48

_Projection = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
"""Reads the weight and the bias of an output projection."""


def logit_difference(
    output: Checkpoint,
    dense: Checkpoint,
    plan: PruningPlan,
    replaced: Collection[str],
    advance: Callable[[int], None],
) -> float:
    """Returns the largest difference of any logit, in units of the masked dense model's standard deviation.

    The masked dense model is given what the output stores in the place of the weights and biases of output
    projections that are `replaced`, by their dense names.
    """
    pruned, projections = probe_logits(output), _projections(output, dense, plan, replaced)
    advance(1)
    changed = partial(_masked, plan=plan, architecture=dense.architecture, projections=projections)
    expected = probe_logits(dense, changed)
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
    ids = probe_ids(model, checkpoint.positions)
    with torch.inference_mode(), quiet_transformers(), changed(model) if changed else nullcontext():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    del model
    release_memory()  # Modules and their hooks refer to each other; the next model must not stand beside this one.
    return logits


def probe_ids(model: PreTrainedModel, positions: int | None) -> torch.Tensor:
    """Draws the (2, length) token ids that `probe_logits` computes with, the same for every model of a vocabulary."""
    shape = (_SEQUENCES, min(_LENGTH, positions or _LENGTH))
    return torch.randint(vocabulary_size(model), shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def _masked(
    model: PreTrainedModel, plan: PruningPlan, architecture: Architecture, projections: Mapping[str, _Projection]
) -> Iterator[None]:
    """Makes the dense model compute what the pruned one should; `projections` stand in for those of the dense model."""
    with ExitStack() as stack:
        stack.enter_context(masked(model, plan, architecture))
        for name, mask in masks(plan, architecture):
            if name in projections:
                stack.callback(_stand_in(model.get_submodule(name), mask, projections[name]))
        yield


def _stand_in(module: torch.nn.Module, mask: torch.Tensor, projection: _Projection) -> Callable[[], None]:
    kept = mask.nonzero().flatten()

    def project(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> torch.Tensor:
        weight, bias = projection()
        return linear(inputs[0].index_select(-1, kept), weight.T if isinstance(module, Conv1D) else weight, bias)

    return module.register_forward_hook(project).remove


def _projections(
    output: Checkpoint, dense: Checkpoint, plan: PruningPlan, replaced: Collection[str]
) -> dict[str, _Projection]:
    """Maps each output projection of the dense model with a replaced tensor to a reader of what the output stores."""
    new = {old: name for name, old in kept_tensors(dense.architecture, plan, dense).items()}

    def reader(module: str) -> _Projection:
        def read() -> tuple[torch.Tensor, torch.Tensor | None]:
            bias = new.get(f"{module}.bias")
            return output[new[f"{module}.weight"]].double(), None if bias is None else output[bias].double()

        return read

    modules = {name.rpartition(".")[0] for name in replaced}
    return {module: reader(module) for module in modules if f"{module}.weight" in new}
