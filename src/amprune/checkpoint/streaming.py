"""A model whose weights stay in their files: each module reads its own as its turn comes.

Memory holds one module's weights at a time, in one buffer that all modules share, whatever the size of the model.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from amprune.architecture import make_config, quiet_transformers
from amprune.checkpoint.reader import Checkpoint

_HEAD_ROWS = 4096


def streamed_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the stock model of a checkpoint, on the CPU and in evaluation mode, computing in `dtype`.

    Vocabulary-sized tensors are never held whole: embeddings are read row by row, the language-model head in slabs.
    """
    config = make_config(checkpoint.config, where=str(checkpoint.folder))
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    in_turn = []
    for module, names in _modules(model, checkpoint):
        if isinstance(module, torch.nn.Embedding):
            _map_embedding(module, checkpoint, names, dtype)
        elif module is head:
            _compute_in_slabs(module, checkpoint, names, dtype)
        else:
            in_turn.append((module, names))
    sizes = (sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module, _ in in_turn)
    buffer = torch.empty(max(sizes), dtype=dtype)
    for module, names in in_turn:
        # A module that holds both weights and other modules would lose its weights when their turn comes.
        own = buffer if not list(module.children()) else torch.empty_like(buffer)
        _read_in_turn(module, checkpoint, names, own)
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


def _map_embedding(
    module: torch.nn.Embedding, checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype
) -> None:
    """Backs an embedding by its file, so that only rows that are looked up are read; its output is cast."""
    module.weight = torch.nn.Parameter(checkpoint.mapped(names["weight"]), requires_grad=False)
    module.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))


def _compute_in_slabs(module: Any, checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype) -> None:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        slabs = torch.split(checkpoint.mapped(names["weight"]), _HEAD_ROWS)
        logits = torch.cat([linear(hidden, slab.to(dtype)) for slab in slabs], dim=-1)
        return logits + checkpoint[names["bias"]].to(dtype) if "bias" in names else logits

    module.forward = forward


def _read_in_turn(module: torch.nn.Module, checkpoint: Checkpoint, names: dict[str, str], buffer: torch.Tensor) -> None:
    """Reads the module's weights into the buffer before it runs and lets go of them after."""
    empty = dict(module.named_parameters(recurse=False))

    def before(_module: torch.nn.Module, _inputs: object) -> None:
        used = 0
        for name, tensor in names.items():
            size, shape = empty[name].numel(), empty[name].shape
            values = buffer[used : used + size].view(shape).copy_(checkpoint.mapped(tensor))
            module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
            used += size

    def after(_module: torch.nn.Module, _inputs: object, _output: object) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
