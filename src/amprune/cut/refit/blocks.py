"""Two models, dense and pruned, block by block: each block's weights are read as its turn comes, and let go after."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM

from amprune.model.architecture import Architecture, PreTrainedModel, make_config, quiet_transformers
from amprune.model.reader import Checkpoint
from amprune.model.streaming import streamed_model


@dataclass(frozen=True)
class Call:
    """What a block is given beside the hidden states: masks, position embeddings, switches."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool
    """Hidden states are given by name."""

    def run(self, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Runs a block and returns its hidden states, (rows, length, hidden_size)."""
        if self.named:
            output = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = block(hidden, *self.args, **self.kwargs)
        left: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return left


class _Enough(Exception):
    """Ends a forward pass once what it is run for has been seen."""


@contextmanager
def observed(module: torch.nn.Module, *, stop: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Puts what a module is given and gives under `given` and `gives`; with `stop`, the forward pass ends there."""
    seen: dict[str, torch.Tensor] = {}

    def look(_module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["given"], seen["gives"] = inputs[0], output.clone()  # Falcon adds to it in place
        if stop:
            raise _Enough

    handle = module.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def run_until_stop(call: Call, block: torch.nn.Module, hidden: torch.Tensor) -> None:
    """Runs a block up to the module that `observed(..., stop=True)` watches."""
    try:
        call.run(block, hidden)
    except _Enough:
        return


def first_calls(
    checkpoint: Checkpoint, batches: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[list[torch.Tensor], list[dict[int, Call]]]:
    """Runs what stands before the blocks, and records what each block is given, without running any.

    Args:
        checkpoint: the dense model.
        batches: of (rows, length) token ids without padding, of one length.
        dtype: of the computation.
        device: to put the result on.

    Returns:
        The hidden states that enter the first block, a batch each, and for each batch size the call of each block.
    """
    model = streamed_model(checkpoint, dtype)
    architecture = checkpoint.architecture
    blocks = [model.get_submodule(architecture.block(layer)) for layer in range(architecture.shape.num_layers)]
    returns_tuple = _returns_tuple(model, blocks[0])
    entered: list[torch.Tensor] = []
    calls: list[dict[int, Call]] = [{} for _ in blocks]

    def hand_on(layer: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                entered.append(hidden.to(device))
            if len(hidden) not in calls[layer]:
                others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                calls[layer][len(hidden)] = Call(
                    send_to_device(args[1:], device), send_to_device(others, device), named=not args
                )
            return (hidden, None) if returns_tuple else hidden

        return forward

    for layer, block in enumerate(blocks):
        block.forward = hand_on(layer)
    with torch.inference_mode(), quiet_transformers():
        for ids in batches:
            model.base_model(input_ids=ids, use_cache=False)
    return entered, calls


def _returns_tuple(model: PreTrainedModel, block: torch.nn.Module) -> bool:
    """Tells whether blocks return their hidden states alone or first of a tuple, from the first one and two tokens."""
    found: list[bool] = []

    def look(_module: object, _inputs: object, output: object) -> None:
        found.append(isinstance(output, tuple))
        raise _Enough

    handle = block.register_forward_hook(look)
    try:
        with torch.inference_mode(), quiet_transformers():
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


class Blocks:
    """The blocks of one model, each alone in memory while it is used."""

    def __init__(
        self,
        config: Mapping[str, Any],
        architecture: Architecture,
        read: Callable[[str], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(make_config(config, where="config.json"), dtype=dtype)
        self._model = model.eval()
        self._architecture = architecture
        self._read = read
        self._dtype = dtype
        self._device = device

    @contextmanager
    def block(self, layer: int) -> Iterator[torch.nn.Module]:
        """Lends a block with its weights, once; `read` is asked for them by their names in this model."""
        name = self._architecture.block(layer)
        block = self._model.get_submodule(name)
        for module in block.modules():
            for own, buffer in module.named_buffers(recurse=False):
                module._buffers[own] = buffer.to(self._device)
        owned = {own: self._read(f"{name}.{own}").to(self._device, self._dtype) for own, _ in block.named_parameters()}
        block.load_state_dict(owned, strict=False, assign=True)
        try:
            yield block
        finally:
            block.to("meta")
