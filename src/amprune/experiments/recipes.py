"""Which models each experiment makes, and what is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amprune.errors import EvaluationError, guess
from amprune.evaluation.identity import names_of
from amprune.scoring.catalogue import CRITERIA
from amprune.settings import Measurement, Only, Order

if TYPE_CHECKING:
    from amprune.experiments.settings import Settings

DENSE = "dense"
QUALITY: tuple[Measurement, ...] = ("perplexity", "zero_shot")
BEST = "best"
"""The preset of amprune, as a method beside the criteria: it has a calibration set of its own."""
METHODS = (BEST, *(name for name in CRITERIA if name != "reversed"))


@dataclass(frozen=True)
class Cell:
    """A model of an experiment: a row of its table, a point of its figure."""

    name: str
    """In `evaluation.json` and `experiment.json`; no two of an experiment are the same."""
    method: str
    """What the table calls it."""
    ratio: float = 0.0
    """Asked for; 0 of a model that is not pruned here."""
    criterion: str | None = None
    """By which it is pruned here, on the scores that all cells share."""
    preset: str | None = None
    """Instead of a criterion: what is pruned as a whole, with a calibration set of its own."""
    order: Order = "amp"
    only: Only | None = None
    checkpoint: str | None = None
    """NAME=PATH of a model that another tool made."""
    trained: bool = False
    epoch: int | None = None
    """After which epoch of its training; None: at its end."""

    @property
    def is_pruned(self) -> bool:
        """Tells models that are pruned here from the dense one and those of other tools."""
        return self.criterion is not None or self.preset is not None


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper."""

    name: str
    title: str
    about: str
    ratios: tuple[float, ...]
    cells: Callable[[Settings], list[Cell]]
    """Those beside the dense model."""
    methods: tuple[str, ...] = ("amp",)
    measure: tuple[Measurement, ...] = QUALITY
    together: bool = False
    """All models are loaded side by side and measured in turn, as timings have to be."""
    trains: bool = False
    """Whether it trains unless told otherwise."""
    epochs: float = 2.0
    checkpoints: bool = False
    """Whether models of other tools may be added."""


def percentage(ratio: float) -> str:
    """Returns a ratio as people write it: 20 %, 21.02 %."""
    return f"{100 * ratio:.6g} %"


def _pruned(name: str, ratio: float, trained: object = None, *, method: str = "amp", **choice: object) -> Cell:
    """Makes a cell; it is trained where `trained` is given, such as settings of a training."""
    criterion, preset = (None, BEST) if method == BEST else (method, None)
    more = {**choice, "trained": bool(trained)}
    return Cell(f"{name} {percentage(ratio)}", name, ratio, criterion, preset, **more)  # type: ignore[arg-type]


def _table1(asked: Settings) -> list[Cell]:
    pruned = [_pruned(name, ratio, asked.recovery, method=name) for ratio in asked.ratios for name in asked.methods]
    names = zip(names_of(list(asked.checkpoints)), asked.checkpoints, strict=True)
    return [*pruned, *(Cell(name, name, checkpoint=given) for name, given in names)]


def _table2(asked: Settings) -> list[Cell]:
    orders: tuple[Order, ...] = ("amp", "random", "reversed")
    return [_pruned(order, ratio, asked.recovery, order=order) for ratio in asked.ratios for order in orders]


def _table3(asked: Settings) -> list[Cell]:
    parts = {"heads and neurons": None, "neurons only": "neurons", "heads only": "heads"}
    return [_pruned(name, ratio, asked.recovery, only=only) for ratio in asked.ratios for name, only in parts.items()]


def _figure1(asked: Settings) -> list[Cell]:
    trainings = (None, asked.recovery) if asked.recovery else (None,)
    return [
        _pruned(f"{name}, trained" if training else name, ratio, training, method=name)
        for ratio in asked.ratios
        for name in asked.methods
        for training in trainings
    ]


def _speedup(asked: Settings) -> list[Cell]:
    return [_pruned(name, ratio, method=name) for name in asked.methods for ratio in asked.ratios]


def _epochs(asked: Settings) -> list[Cell]:
    cells = []
    for ratio in asked.ratios:
        cells.append(_pruned("not trained", ratio))
        for epoch in range(1, int(asked.recovery.epochs or 0) + 1 if asked.recovery else 1):
            cells.append(_pruned(f"{epoch} epoch{'s' if epoch > 1 else ''}", ratio, asked.recovery, epoch=epoch))
    return cells


def _cost(asked: Settings) -> list[Cell]:
    return [_pruned("amp", ratio, asked.recovery) for ratio in asked.ratios]


_PAPER_RATIOS = (0.0901, 0.2102, 0.3003)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "table1", "Methods side by side",
            "Table I: every method at the same ratio, with the same training or none.",
            (0.2,), _table1, methods=METHODS, checkpoints=True,
        ),
        Recipe(
            "table2", "Coherence of the scores",
            "Table II: what is left when the least important units are removed, a random draw, or the most important.",
            _PAPER_RATIOS, _table2,
        ),
        Recipe(
            "table3", "Heads, neurons, or both", "Table III: the same ratio taken from heads, from neurons, or both.",
            (0.3,), _table3,
        ),
        Recipe(
            "figure1", "Perplexity against ratio", "Figure 1: perplexity as the ratio grows, untrained and trained.",
            (*_PAPER_RATIOS, 0.4002, 0.5106), _figure1, methods=(BEST, "amp"), measure=("perplexity",), trains=True,
        ),
        Recipe(
            "speedup", "Speedup", "Section IV-C: time to generate, measured and ideal; whole blocks removed beside.",
            (0.1, 0.2102, 0.3003), _speedup, methods=("amp", "depth"), measure=("latency",), together=True,
        ),
        Recipe(
            "epochs", "Epochs of training", "Section IV-G: one training a ratio, measured after every epoch.",
            (0.2102, 0.3003), _epochs, trains=True, epochs=4.0,
        ),
        Recipe(
            "cost", "Energy and cost", "Section IV-F: what a workload takes in time, money, energy and carbon.",
            (0.2102,), _cost, measure=("latency", "energy"), together=True,
        ),
    )
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """Returns an experiment by its name; the error suggests the nearest and lists all."""
    if name in RECIPES:
        return RECIPES[name]
    raise EvaluationError(f"no experiment {name!r}; {guess(name, RECIPES)}The experiments are {', '.join(RECIPES)}")
