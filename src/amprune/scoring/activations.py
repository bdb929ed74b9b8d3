"""One forward pass, with hooks on the output projections, gives what every criterion over activations needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers.pytorch_utils import Conv1D

from amprune.errors import ScoresError
from amprune.model.architecture import Architecture, PreTrainedModel
from amprune.model.loading import input_device
from amprune.model.shape import ModelShape
from amprune.running import Progress, no_progress
from amprune.scoring.batches import batches, check_calibration, padded
from amprune.scoring.formulas import LayerStatistics, ProjectionInputs, contribution_norms, feature_norms, input_moments
from amprune.text.calibration import CalibrationSet

_ATTENTION, _MLP = "attention", "MLP"
_Sums = dict[tuple[str, int], torch.Tensor]


@dataclass
class _Pass:
    """The batch under way and what has been summed up to now, by part and layer."""

    lengths: Sequence[int] = ()
    contributions: _Sums = field(default_factory=dict)
    moments: _Sums = field(default_factory=dict)
    norms: _Sums = field(default_factory=dict)


def measure_activations(
    model: PreTrainedModel,
    architecture: Architecture,
    calibration: CalibrationSet,
    *,
    batch_tokens: int = 4096,
    progress: Progress = no_progress,
) -> tuple[LayerStatistics, ...]:
    """Measures the inputs of every layer's output projections, averaged over the samples.

    Each sample is averaged over its own tokens first; padding never counts. `batch_tokens` bounds the tokens of a
    batch, padding included, and changes no figure beyond rounding.
    """
    check_calibration(model, calibration, batch_tokens=batch_tokens)
    state = _Pass()
    with (
        torch.inference_mode(),
        _hooks(model, architecture, state),
        progress("Scoring", len(calibration.samples)) as advance,
    ):
        for batch in batches(calibration.samples, batch_tokens):
            state.lengths = [len(sample) for sample in batch]
            # The base model leaves out the vocabulary projection, which no score needs.
            model.base_model(**padded(batch, input_device(model)), use_cache=False)
            advance(len(batch))
    samples = len(calibration.samples)
    return tuple(_layer_statistics(state, layer, samples) for layer in range(architecture.shape.num_layers))


@contextmanager
def _hooks(model: PreTrainedModel, architecture: Architecture, state: _Pass) -> Iterator[None]:
    family, shape = architecture.family, architecture.shape
    with ExitStack() as stack:
        for layer in range(shape.num_layers):
            prefix = family.layer_prefix.format(layer=layer)
            for name, hook in (
                (family.attention_output, _hook(state, (_ATTENTION, layer), shape)),
                (family.mlp_output, _hook(state, (_MLP, layer), shape)),
            ):
                handle = model.get_submodule(prefix + name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
        yield


_Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]


def _hook(state: _Pass, key: tuple[str, int], shape: ModelShape) -> _Hook:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        weight = None
        if key[0] == _ATTENTION or key not in state.norms:
            weight = _weight(module, inputs[0].device)
            state.norms.setdefault(key, feature_norms(weight))
        for sample in _samples(inputs, state.lengths):
            _add(state.moments, key, input_moments(sample))
            if key[0] == _ATTENTION and weight is not None:
                norms = contribution_norms(
                    sample, weight, num_heads=shape.num_attention_heads, num_groups=shape.num_key_value_heads
                )
                _add(state.contributions, key, norms)

    return hook


def _weight(module: Any, device: torch.device) -> torch.Tensor:
    """Returns a projection's weight as (features, outputs), in float32 at least, also where it is offloaded."""
    with align_module_device(module):
        weight: torch.Tensor = module.weight if isinstance(module, Conv1D) else module.weight.T
        return weight.to(device).to(torch.promote_types(weight.dtype, torch.float32))


def _samples(inputs: tuple[torch.Tensor, ...], lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields the (tokens, features) activations of each sample, without its padding."""
    activations = inputs[0].reshape(len(lengths), -1, inputs[0].shape[-1])
    for row, length in enumerate(lengths):
        yield activations[row, :length]


def _add(sums: _Sums, key: tuple[str, int], values: torch.Tensor) -> None:
    sums[key] = sums[key] + values if key in sums else values


def _layer_statistics(state: _Pass, layer: int, samples: int) -> LayerStatistics:
    attention, mlp = (_Part(state, name, layer, samples) for name in (_ATTENTION, _MLP))
    contributions = attention.mean(state.contributions)
    return LayerStatistics(contributions[0], contributions[1], attention.inputs(), mlp.inputs())


@dataclass(frozen=True)
class _Part:
    """The attention or the MLP of one layer, after the pass."""

    state: _Pass
    name: str
    layer: int
    samples: int

    def mean(self, sums: _Sums) -> torch.Tensor:
        mean = (sums[self.name, self.layer] / self.samples).cpu()
        if not torch.isfinite(mean).all():
            raise ScoresError(
                f"layer {self.layer}: the {self.name} gives activations that are not finite; score in another dtype "
                "(--dtype bfloat16 or float32: float16 overflows at 65,504), or check the checkpoint"
            )
        return mean

    def inputs(self) -> ProjectionInputs:
        return ProjectionInputs(*self.mean(self.state.moments), *self.state.norms[self.name, self.layer].cpu())
