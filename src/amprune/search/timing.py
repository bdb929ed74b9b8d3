"""Models of random weights, timed side by side with the dense one: the speed of a shape depends on no weight."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from amprune.cut.slicing import output_config
from amprune.errors import EvaluationError
from amprune.model.architecture import Architecture, PreTrainedModel, make_config, quiet_transformers
from amprune.model.latency import LatencySettings, measure_latency
from amprune.model.loading import device_of
from amprune.model.shape import ModelShape
from amprune.plan.artefact import LayerPlan, PruningPlan
from amprune.running import Progress, free_memory, no_progress, release_memory

DECODING = LatencySettings(new_tokens=64, warmup=2, runs=5)
"""What is timed of a shape: greedy decoding of one sequence; fewer runs than where results are reported."""
_SHARE = 0.8
"""Of the free memory that models may fill; the rest is for caches and activations."""


@dataclass(frozen=True)
class Timing:
    """How shapes are timed."""

    speedup: Callable[[ModelShape], float]
    """The median over rounds of the dense model's time over the shape's; extrapolated, the ratio of the medians."""
    layers: tuple[int, ...]
    """Layers of the models that are timed: all, or two numbers between which the time of a layer is taken."""

    def words(self, total: int) -> str:
        """Says what a figure rests on, where whole models do not fit into memory."""
        if self.layers == (total,):
            return "whole models of random weights"
        return f"models of {self.layers[0]} and {self.layers[1]} of {total} layers, extrapolated linearly"


@contextmanager
def shape_timer(
    config: Mapping[str, Any],
    architecture: Architecture,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> Iterator[Timing]:
    """Builds the dense model with random weights, and lets shapes be timed beside it, run by run in turn.

    Where the dense model and a second one of its size do not fit into memory, models of fewer layers are timed: two
    numbers of layers give the time of one layer and of the rest, from which the time of the whole is extrapolated.
    That magnifies noise by as much.
    """
    where = device_of(device)
    layers = _layers(architecture.shape, dtype, free_memory(where))
    build = partial(_random_model, config, architecture, device=where, dtype=dtype)
    dense = {f"dense {count}": build(architecture.shape, count) for count in layers}

    def speedup(shape: ModelShape) -> float:
        models = {f"shape {count}": build(shape, count) for count in layers}
        found = measure_latency({**dense, **models}, DECODING, progress=progress)
        del models
        release_memory()
        times = {
            name: _whole([found[f"{name} {count}"].decode for count in layers], layers, shape.num_layers)
            for name in ("dense", "shape")
        }
        return statistics.median(before / after for before, after in zip(times["dense"], times["shape"], strict=True))

    try:
        yield Timing(speedup, layers)
    finally:
        dense.clear()
        release_memory()


def _whole(seconds: list[list[float]], layers: tuple[int, ...], total: int) -> list[float]:
    """Returns the seconds of whole models: of each round, or, extrapolated, of the medians, which noise moves less."""
    if len(layers) == 1:
        return seconds[0]
    few, more = map(statistics.median, seconds)
    whole = few + (total - layers[0]) / (layers[1] - layers[0]) * (more - few)
    if whole <= 0:
        raise EvaluationError(
            f"the times of models of {layers[0]} and {layers[1]} layers are too noisy to tell that of {total} layers; "
            "time on a device that is not in use, or with more runs"
        )
    return [whole]


def _layers(shape: ModelShape, dtype: torch.dtype, free: int) -> tuple[int, ...]:
    """Returns how many layers are timed: all, or half of what fits and what fits."""
    units = (shape.attention_parameters + shape.mlp_parameters) // shape.num_layers
    layer = max(shape.layer_parameters, units)
    rest, fitting = shape.parameters - shape.num_layers * layer, _SHARE * free / dtype.itemsize
    if 2 * shape.parameters <= fitting:
        return (shape.num_layers,)
    most = min(int((fitting / 2 - 2 * rest) // (1.5 * layer)), shape.num_layers)
    if most < 2:
        raise EvaluationError(
            f"models of 1 and 2 layers, dense and pruned, do not fit into the {free / 1e9:.1f} GB that are free; time "
            "on a larger device, or in a smaller dtype"
        )
    return most // 2, most


def _random_model(
    config: Mapping[str, Any],
    architecture: Architecture,
    shape: ModelShape,
    layers: int,
    *,
    device: str,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Builds the stock model of a shape, of its first layers, with the initial weights of its class."""
    reduced = output_config(config, architecture, _plan(architecture.shape, shape, layers))
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), quiet_transformers(), torch.device(device):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(make_config(reduced, where="a shape that is timed"), dtype=dtype)
    return cast(PreTrainedModel, model.eval())


def _plan(before: ModelShape, after: ModelShape, layers: int) -> PruningPlan:
    """Returns a plan that says how many units stay in how many layers, but not which."""
    shape = before.shrunk(
        query_heads=after.num_attention_heads,
        key_value_heads=after.num_key_value_heads,
        neurons=after.intermediate_size,
        layers=layers,
    )
    kept = (LayerPlan((), (), ()),) * layers
    return PruningPlan(0.0, 0.0, before, shape, (*kept, *(None,) * (before.num_layers - layers)), {})
