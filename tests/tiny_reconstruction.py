"""Plans of tiny models that remove much, and outputs that are refitted after it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_calibration import architecture_of, random_samples
from tiny_models import Tiny, save_model

from amprune import PruningPlan, VerificationReport, apply_plan
from amprune.model.shape import ModelShape
from amprune.plan.artefact import LayerPlan, check_plan

LENGTH = 64
CALIBRATION = random_samples(*[LENGTH] * 40)


def kept_groups(shape: ModelShape) -> int:
    """All key-value groups but as few as can be removed."""
    fewer = (k for k in range(shape.num_key_value_heads - 1, 0, -1) if k * shape.group_size in shape.query_head_counts)
    return shape.num_key_value_heads if shape.heads_refused else next(fewer, shape.num_key_value_heads)


def plan_of(shape: ModelShape, *, neurons: int | None = None, groups: int | None = None, seed: int = 0) -> PruningPlan:
    """Keeps other random units in each layer, as many in all."""
    draw = np.random.default_rng(seed)
    neurons = shape.intermediate_size if neurons is None else neurons
    groups = shape.num_key_value_heads if groups is None else groups

    def some(count: int, total: int) -> tuple[int, ...]:
        return tuple(sorted(map(int, draw.permutation(total)[:count])))

    layers = []
    for _ in range(shape.num_layers):
        heads = some(groups, shape.num_key_value_heads)
        readers = tuple(head * shape.group_size + i for head in heads for i in range(shape.group_size))
        layers.append(LayerPlan(readers, heads, some(neurons, shape.intermediate_size)))
    after = shape.shrunk(
        query_heads=groups * shape.group_size, key_value_heads=groups, neurons=neurons, layers=shape.num_layers
    )
    ratio = 1 - after.parameters / shape.parameters
    plan = PruningPlan(ratio, ratio, shape, after, tuple(layers), {})
    check_plan(plan)
    return plan


def harsh(tiny: Tiny) -> PruningPlan:
    """Removes a third of the neurons, and heads where they can go."""
    shape = architecture_of(tiny).shape
    return plan_of(shape, neurons=shape.intermediate_size * 2 // 3, groups=kept_groups(shape))


def write(
    tiny: Tiny, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Path, VerificationReport]:
    """Writes a dense model, and the pruned and refitted one beside it; returns the latter and its proof."""
    save_model(tiny, folder / "dense", dtype=dtype)
    options = {"refit": CALIBRATION, "device": "cpu", "batch_tokens": 512, **options}
    made = apply_plan(folder / "dense", harsh(tiny), folder / "out", **options)
    return made.folder, made.verification
