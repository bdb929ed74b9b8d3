"""Presets: what `prune` and `run` do where nothing else is said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from amprune.errors import PlanError, guess

DEFAULT = "best"


@dataclass(frozen=True)
class Preset:
    """Settings that stand until they are given by hand."""

    criterion: str
    calibration: str
    samples: int | None
    tokens: int | None
    """Samples are drawn until there are as many."""
    max_length: int
    allocate: bool
    """Heads and neurons lose what does least damage, instead of equal shares."""
    reconstruct: bool
    """Kept output weights are refitted."""
    neuron_multiple: int | Literal["hardware"]
    """Of which multiple the neurons that stay are; see `make_plan`."""


PRESETS: Mapping[str, Preset] = {
    # Algorithm 1 of the paper, arXiv 2504.21174: Eq. 8 and 9 on 50 samples of Alpaca, equal shares, nothing refitted.
    "paper": Preset("amp", "alpaca", 50, None, 512, allocate=False, reconstruct=False, neuron_multiple=1),
    # What won on held-out text (docs/results.md has the figures), in shapes that hardware likes.
    "best": Preset(
        "activation-l2", "mixed", None, 32_768, 1024, allocate=True, reconstruct=True, neuron_multiple="hardware"
    ),
}


def find_preset(name: str) -> Preset:
    """Returns the preset of a name.

    Raises:
        PlanError: there is none; the message suggests the nearest and lists all.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise PlanError(f"unknown preset {name!r}; {guess(name, PRESETS)}The presets are {', '.join(PRESETS)}")
