"""Random samples for tiny models, and what these models are made of."""

import json
from functools import cache

import torch
from tiny_models import VOCABULARY, Tiny, config_of

from amprune import CalibrationSet
from amprune.model.architecture import Architecture, describe


def random_samples(*lengths: int, seed: int = 0) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    samples = (torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths)
    return CalibrationSet("random", tuple(map(tuple, samples)))


CALIBRATION = random_samples(7, 23, 2, 40)


def architecture_of(tiny: Tiny) -> Architecture:
    return _architecture(json.dumps(config_of(tiny)))


@cache
def _architecture(config: str) -> Architecture:
    return describe(json.loads(config))
