"""From parameters or bytes of weights to the most parameters that may stay."""

from dataclasses import replace

from amprune.errors import PlanError
from amprune.model.reader import Checkpoint
from amprune.plan.budget import largest_ratio
from amprune.plan.heads import usable_heads
from amprune.plan.multiples import smallest_multiple
from amprune.plan.options import check_units
from amprune.plan.target import Target
from amprune.settings import PlanOptions


def with_target(options: PlanOptions, target: Target | None, dense: Checkpoint, *, depth: bool) -> PlanOptions:
    """Returns the options with a target of parameters or bytes as the most parameters that may stay.

    A speedup is searched for, see `search/`: the options stay as they are then.

    Raises:
        PlanError: the target is out of reach, stands beside a ratio, or asks for a speedup of whole blocks.
    """
    if target is None:
        return options
    if options.ratio is not None:
        raise PlanError(f"a ratio of {options.ratio} and the target {target} both say how much goes; give one of them")
    if target.kind == "speedup":
        if depth:
            raise PlanError("a speedup is searched for in numbers of heads and neurons; give depth pruning a ratio")
        return options
    return replace(options, target_parameters=target_parameters(target, dense, options, depth=depth))


def target_parameters(target: Target, checkpoint: Checkpoint, options: PlanOptions, *, depth: bool = False) -> int:
    """Returns the most parameters that may stay of a checkpoint: the `target_parameters` of `make_plan`.

    Bytes are those of all tensors that are written, so that removed bytes are removed parameters times the bytes of an
    element. Where tensors that shrink are of several dtypes, the smallest counts: the target is not exceeded then, but
    met less closely.

    Args:
        target: of parameters or of bytes.
        checkpoint: the dense model.
        options: what else is asked of the plan; tells what can be reached.
        depth: whole blocks are removed.

    Raises:
        PlanError: the weights are no larger than the target, or cannot become so small; or the target is a speedup.
    """
    if target.kind == "speedup":
        raise PlanError(f"the target {target} is one of time, which has to be measured; use targets.find_shapes")
    if target.kind == "params":
        return int(target.value)
    shape, element = checkpoint.shape, _element_bytes(checkpoint, depth=depth)
    if not depth:
        check_units(shape, options)
        usable_heads(shape, options)
    neurons = smallest_multiple(options) * shape.neuron_parameters * shape.num_layers
    step = shape.layer_parameters if depth else neurons
    excess = checkpoint.bytes - int(target.value)
    if excess <= 0:
        raise PlanError(
            f"a target of {int(target.value):,} bytes would remove nothing: the weights have {checkpoint.bytes:,}; the "
            f"next below is {checkpoint.bytes - step * element:,}"
        )
    smallest = 1 if depth else shape.parameters - round(largest_ratio(shape, options) * shape.parameters)
    parameters = shape.parameters - -(-excess // element)
    if parameters < smallest:
        raise PlanError(
            f"a target of {int(target.value):,} bytes cannot be reached: of {checkpoint.bytes:,} the options leave at "
            f"least {checkpoint.bytes - (shape.parameters - smallest) * element:,}"
        )
    return parameters


def _element_bytes(checkpoint: Checkpoint, *, depth: bool) -> int:
    """Returns the bytes of an element of the tensors that shrink, or of all that belong to blocks."""
    architecture = checkpoint.architecture
    blocks = tuple(f"{architecture.block(layer)}." for layer in range(architecture.shape.num_layers))
    names = (name for name in checkpoint if name.startswith(blocks)) if depth else architecture.cut_tensors()
    dtypes = (checkpoint.header(name).dtype for name in names)
    return min(dtype.itemsize for dtype in dtypes if dtype is not None)
