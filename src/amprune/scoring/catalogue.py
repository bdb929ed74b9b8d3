"""Every criterion by its name: what it needs, its formula and where it is from."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from amprune.errors import ScoresError, guess
from amprune.scoring import formulas as activations
from amprune.scoring.formulas import Rule


class Needs(str, Enum):
    """What a criterion is computed from."""

    ACTIVATIONS = "activations"
    """One forward pass, which serves all criteria of this kind."""
    GRADIENTS = "gradients"
    """One forward and one backward pass."""
    LOSSES = "losses"
    """A forward pass without each block in turn."""
    WEIGHTS = "weights"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Criterion:
    """A rule by which units, or whole blocks, are ranked; `docs/criteria.md` says more of each."""

    name: str
    needs: Needs
    formula: str
    """Of a head, then of a neuron; or of a block."""
    source: str
    score: Rule | None = None
    """Of a criterion over activations."""
    depth: bool = False
    """Ranks whole blocks."""
    means: bool = False
    """Its scores carry the mean inputs, from which biases can make up for what is removed."""

    @property
    def calibrated(self) -> bool:
        """Whether a calibration set has a part in it."""
        return self.needs not in (Needs.WEIGHTS, Needs.NOTHING)


_AMP, _SHORTENED = "AMP, arXiv 2504.21174", "Shortened LLaMA, arXiv 2402.02834"
_MINITRON, _FLAP, _LLM_PRUNER = "Minitron, arXiv 2407.14679", "FLAP, arXiv 2312.11983", "LLM-Pruner, arXiv 2305.11627"

CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "amp", Needs.ACTIVATIONS, "||h_n W_n||_1 / S; mean |a_m|", f"{_AMP}, Eq. 8 and 9", score=activations.amp
        ),
        Criterion(
            "amp-l2", Needs.ACTIVATIONS, "||h_n W_n||_2 / sqrt(S); sqrt(mean a_m^2)", f"{_AMP}, with the L2 norm",
            score=activations.amp_l2,
        ),
        Criterion(
            "amp-weighted", Needs.ACTIVATIONS, "||h_n W_n||_1 / S; mean |a_m| * ||W_m||_2",
            f"{_AMP}, neurons weighted by the down projection", score=activations.amp_weighted,
        ),
        Criterion(
            "activation-l2", Needs.ACTIVATIONS, "sqrt(mean ||h_n||^2); sqrt(mean a_m^2)", _MINITRON,
            score=activations.activation_l2,
        ),
        Criterion(
            "wanda-sp", Needs.ACTIVATIONS, "sum over the unit of |W_ij| * ||x_j||_2",
            "Wanda, arXiv 2306.11695, made structured by FLAP's authors", score=activations.wanda_sp,
        ),
        Criterion(
            "flap", Needs.ACTIVATIONS, "sum over the unit of Var(x_j) * ||W_j||_2^2, standardised", _FLAP,
            score=activations.flap, means=True,
        ),
        Criterion("taylor", Needs.GRADIENTS, "sum over the unit's weights of |w * dL/dw|", _LLM_PRUNER),
        Criterion("magnitude", Needs.WEIGHTS, "L2 norm of the unit's weights", f"baseline of {_LLM_PRUNER}"),
        Criterion("random", Needs.NOTHING, "a seeded draw", f"{_AMP}, Table II"),
        Criterion(
            "reversed", Needs.ACTIVATIONS, "amp with the sign turned", f"{_AMP}, Table II",
            score=activations.reversed_amp,
        ),
        Criterion("depth", Needs.LOSSES, "rise of log perplexity without the block", _SHORTENED, depth=True),
        Criterion(
            "depth-taylor", Needs.GRADIENTS, "sum over the block's weights of |w * dL/dw|", _SHORTENED, depth=True
        ),
    )
}  # fmt: skip
"""In the order in which tables show them."""


def find_criterion(name: str) -> Criterion:
    """Returns the criterion of a name."""
    if name in CRITERIA:
        return CRITERIA[name]
    raise ScoresError(f"unknown criterion {name!r}; {guess(name, CRITERIA)}The criteria are {', '.join(CRITERIA)}")
