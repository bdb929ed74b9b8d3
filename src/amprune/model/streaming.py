"""A model whose weights stay in their files: each module reads its own as its turn comes.

Memory holds one module's weights at a time, in one buffer that all modules share, whatever the size of the model.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from amprune.model.architecture import PreTrainedModel, make_config, quiet_transformers
from amprune.model.reader import Checkpoint

_HEAD_ROWS = 2048


def streamed_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the stock model of a checkpoint, on the CPU and in evaluation mode, computing in `dtype`.

    Vocabulary-sized tensors are never held whole: of the input embedding only the rows at hand are read, and the
    language-model head is applied in slabs.
    """
    config = make_config(checkpoint.config, where=str(checkpoint.folder))
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    in_turn = []
    for module, names in _modules(model, checkpoint):
        if module is head:
            _compute_in_slabs(module, checkpoint, names, dtype)
        elif module is embedding:
            _look_up_rows(module, checkpoint, names, dtype)
        else:
            in_turn.append((module, names))
    # Modules that hold other modules would lose the shared buffer to them; there are hardly any.
    leaves = [module for module, _ in in_turn if not list(module.children())]
    sizes = (sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in leaves)
    shared = torch.empty(max(sizes), dtype=dtype)
    for module, names in in_turn:
        _read_in_turn(module, checkpoint, names, shared if module in leaves else torch.empty_like(shared))
    return cast(PreTrainedModel, model.eval())


def _modules(model: torch.nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[torch.nn.Module, dict[str, str]]]:
    """Yields each module with parameters of its own, which are mapped to tensors of the checkpoint.

    Buffers that the checkpoint holds are read on the way.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if (full := f"{prefix}.{name}") in checkpoint:
                setattr(module, name, checkpoint[full].to(buffer.dtype))
        names = {name: checkpoint.resolve(f"{prefix}.{name}") for name, _ in module.named_parameters(recurse=False)}
        if names:
            yield module, names


def _look_up_rows(module: Any, checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype) -> None:
    """Reads only the rows of the tokens at hand: a small embedding, and ids that point into it."""
    empty = module.weight
    module.padding_idx = None  # It names a row of the whole embedding, and matters to gradients alone.

    def before(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids, positions = torch.unique(inputs[0], return_inverse=True)
        rows = checkpoint.rows(names["weight"], ids.tolist())
        module.weight = torch.nn.Parameter(rows.to(dtype), requires_grad=False)
        return (positions, *inputs[1:])

    def after(_module: torch.nn.Module, _inputs: object, _output: object) -> None:
        module.weight = empty

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _compute_in_slabs(module: Any, checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype) -> None:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        slabs = checkpoint.slabs(names["weight"], _HEAD_ROWS)
        logits = torch.cat([linear(hidden, slab.to(dtype)) for slab in slabs], dim=-1)
        return logits + checkpoint[names["bias"]].to(dtype) if "bias" in names else logits

    module.forward = forward


def _read_in_turn(module: torch.nn.Module, checkpoint: Checkpoint, names: dict[str, str], buffer: torch.Tensor) -> None:
    """Reads the module's weights into the buffer before it runs and lets go of them after."""
    empty = dict(module.named_parameters(recurse=False))

    def before(_module: torch.nn.Module, _inputs: object) -> None:
        used = 0
        for name, tensor in names.items():
            values = checkpoint[tensor]
            part = buffer[used : used + values.numel()].view(values.shape)
            module._parameters[name] = torch.nn.Parameter(part.copy_(values), requires_grad=False)
            used += values.numel()

    def after(_module: torch.nn.Module, _inputs: object, _output: object) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
