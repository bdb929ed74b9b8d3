"""Random samples for tiny models, and what these models are made of."""

from typing import Any

import torch
from tiny_models import VOCABULARY, Tiny, config_of

from amprune import CalibrationSet
from amprune.model.architecture import Architecture, describe
from amprune.model.shape import ModelShape


def random_samples(*lengths: int, seed: int = 0) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    samples = (torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths)
    return CalibrationSet("random", tuple(map(tuple, samples)))


CALIBRATION = random_samples(7, 23, 2, 40)


def architecture_of(tiny: Tiny) -> Architecture:
    return describe(config_of(tiny))


def measure_shape(raw: dict[str, Any]) -> ModelShape:
    return describe(raw).shape
