"""Which models each experiment makes, and what is measured on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from amprune.errors import EvaluationError, ScoresError, guess
from amprune.evaluation.identity import names_of
from amprune.scoring.catalogue import CRITERIA
from amprune.settings import Measurement, Only, Order

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
    """In the place of a criterion: what is pruned as a whole, with a calibration set of its own."""
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
class Choices:
    """What decides which cells there are."""

    ratios: tuple[float, ...]
    methods: tuple[str, ...]
    checkpoints: tuple[str, ...]
    trained: bool
    epochs: int


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper."""

    name: str
    title: str
    about: str
    ratios: tuple[float, ...]
    cells: Callable[[Choices], list[Cell]]
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


def _dense() -> Cell:
    return Cell(DENSE, DENSE)


def _pruned(name: str, ratio: float, *, method: str = "amp", trained: bool = False, **choice: object) -> Cell:
    criterion, preset = (None, BEST) if method == BEST else (method, None)
    return Cell(f"{name} {percentage(ratio)}", name, ratio, criterion, preset, trained=trained, **choice)  # type: ignore[arg-type]


def _table1(choices: Choices) -> list[Cell]:
    pruned = [
        _pruned(method, ratio, method=method, trained=choices.trained)
        for ratio in choices.ratios
        for method in choices.methods
    ]
    others = [Cell(name, name, checkpoint=given) for name, given in _named(choices.checkpoints)]
    return [_dense(), *pruned, *others]


def _named(checkpoints: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(names_of(list(checkpoints)), checkpoints, strict=True))


_ORDERS: Mapping[str, Order] = {"amp": "amp", "random": "random", "reversed": "reversed"}


def _table2(choices: Choices) -> list[Cell]:
    return [
        _dense(),
        *(
            _pruned(name, ratio, order=order, trained=choices.trained)
            for ratio in choices.ratios
            for name, order in _ORDERS.items()
        ),
    ]


PARTS: Mapping[str, Only | None] = {"heads and neurons": None, "neurons only": "neurons", "heads only": "heads"}


def _table3(choices: Choices) -> list[Cell]:
    return [
        _dense(),
        *(
            _pruned(name, ratio, only=only, trained=choices.trained)
            for ratio in choices.ratios
            for name, only in PARTS.items()
        ),
    ]


def _figure1(choices: Choices) -> list[Cell]:
    cells = [_dense()]
    for ratio in choices.ratios:
        for method in choices.methods:
            cells.append(_pruned(method, ratio, method=method))
            if choices.trained:
                cells.append(_pruned(f"{method}, trained", ratio, method=method, trained=True))
    return cells


def _speedup(choices: Choices) -> list[Cell]:
    return [
        _dense(),
        *(_pruned(method, ratio, method=method) for method in choices.methods for ratio in choices.ratios),
    ]


def _epochs(choices: Choices) -> list[Cell]:
    cells = [_dense()]
    for ratio in choices.ratios:
        cells.append(_pruned("not trained", ratio))
        for epoch in range(1, choices.epochs + 1):
            words = f"{epoch} epoch" + ("s" if epoch > 1 else "")
            cells.append(_pruned(words, ratio, trained=True, epoch=epoch))
    return cells


def _cost(choices: Choices) -> list[Cell]:
    return [_dense(), *(_pruned("amp", ratio, trained=choices.trained) for ratio in choices.ratios)]


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
    """Returns an experiment by its name.

    Raises:
        EvaluationError: there is none; the message suggests the nearest and lists all.
    """
    if name in RECIPES:
        return RECIPES[name]
    raise EvaluationError(f"no experiment {name!r}; {guess(name, RECIPES)}The experiments are {', '.join(RECIPES)}")


def check_method(name: str) -> None:
    """Makes sure that there is a method of a name.

    Raises:
        ScoresError: there is none; the message suggests the nearest and lists all.
    """
    known = (BEST, *CRITERIA)
    if name not in known:
        raise ScoresError(f"unknown method {name!r}; {guess(name, known)}The methods are {', '.join(known)}")
