"""Tables of quality: a row a cell, the best of each column in bold, and paired differences from one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from amprune.evaluation.comparison import Difference
from amprune.evaluation.records import Evaluation, Record
from amprune.experiments.figures import Point
from amprune.experiments.recipes import DENSE, QUALITY, Cell, Recipe, percentage
from amprune.experiments.results import CellResult, ModelResults, Results
from amprune.experiments.settings import Settings
from amprune.report.grid import Grid, filled
from amprune.report.measures import Change, Measure, average_change, averages, change, find_measures, headlines
from amprune.report.numbers import MISSING, number, percent
from amprune.report.quality import difference

_TITLES: Mapping[str, str] = {
    "winogrande": "WinoGrande",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "piqa": "PIQA",
}
"""In the order of the paper's tables."""


@dataclass(frozen=True)
class Shown:
    """One model's part of an experiment."""

    recipe: Recipe
    settings: Settings
    cells: tuple[Cell, ...]
    found: ModelResults
    evaluation: Evaluation
    prefix: str = ""
    """Of the names of its figures, where several models have some."""

    @property
    def dense(self) -> Cell:
        """Returns the cell of the dense model."""
        return next(cell for cell in self.cells if cell.name == DENSE)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Returns the ratios asked for, in the order of the cells."""
        return tuple(dict.fromkeys(cell.ratio for cell in self.cells if cell.is_pruned))

    def at(self, ratio: float) -> tuple[Cell, ...]:
        """Returns the cells that are pruned here at a ratio."""
        return tuple(cell for cell in self.cells if cell.is_pruned and cell.ratio == ratio)

    def result(self, cell: Cell) -> CellResult | None:
        """Returns what became of a cell; None where it was never tried."""
        return self.found.cells.get(cell.name)

    def state(self, cell: Cell) -> str:
        """Returns what became of a cell, in a word; a dash where it was never tried."""
        result = self.result(cell)
        return MISSING if result is None else result.state

    def done(self, cells: Sequence[Cell]) -> list[Cell]:
        """Returns the cells that have figures."""
        return [cell for cell in cells if self.state(cell) == "done"]

    def removed(self, cell: Cell) -> float | None:
        """Returns the share of the parameters that a measured model lacks."""
        result = self.result(cell)
        return None if result is None else result.ratio


@dataclass(frozen=True)
class Column:
    """A figure of every model."""

    title: str
    measure: Measure
    tasks: tuple[Measure, ...] = ()
    """Of an average: what it is over."""

    @property
    def low_is_better(self) -> bool:
        """Tells perplexities from accuracies."""
        return self.measure.measurement == "perplexity"

    @property
    def kind(self) -> str:
        """Names what sums a model up: its perplexity, or its average over tasks."""
        return "perplexity" if self.low_is_better else "average accuracy"

    def record(self, cell: Cell) -> Record | None:
        """Returns what was measured of a cell."""
        return self.measure.records.get(cell.name)

    def value(self, cell: Cell) -> float | None:
        """Returns the figure of a cell, as it was measured."""
        record = self.record(cell)
        return None if record is None else record.value

    def text(self, cell: Cell) -> str:
        """Returns the figure of a cell with its standard error."""
        record = self.record(cell)
        return MISSING if record is None else number(record.value, record.standard_error, scale=self.measure.scale)

    def point(self, cell: Cell, x: float = 0.0) -> Point | None:
        """Returns the figure of a cell as it is drawn."""
        if (record := self.record(cell)) is None:
            return None
        error = self.measure.scale * (record.standard_error or 0.0)
        return Point(x, self.measure.scale * record.value, error, error)

    def change(self, cell: Cell, baseline: Cell) -> Change | None:
        """Returns how a cell differs from another: window by window, question by question."""
        if self.tasks:
            return average_change(self.measure, self.tasks, cell.name, baseline.name)
        return change(self.measure, cell.name, baseline.name)

    def against(self, cell: Cell, baseline: Cell) -> Difference | None:
        """Returns by how much a cell differs from another."""
        found = self.change(cell, baseline)
        return None if found is None else found.difference


def columns_of(evaluation: Evaluation) -> tuple[Column, ...]:
    """Returns perplexity, the tasks in the paper's order, other tasks, and the average.

    On what each figure was measured is set aside, which a run that goes on elsewhere changes; it is told apart.
    """
    records = (
        replace(record, device="") if record.measurement in QUALITY else record
        for record in evaluation.records.values()
    )
    evaluation = Evaluation(evaluation.models, {record.key: record for record in records})
    order = list(_TITLES)
    tasks = sorted(headlines(evaluation), key=lambda m: order.index(m.task) if m.task in order else len(order))
    found = [Column(f"perplexity, {m.label}", m) for m in find_measures(evaluation, "perplexity")]
    for measure in tasks:
        usual = measure.metric == ("acc" if measure.task == "winogrande" else "acc_norm")
        metric = "" if measure.task in _TITLES and usual else f", {measure.metric}"
        found.append(Column(_TITLES.get(measure.task, measure.label) + metric, measure))
    return (*found, *(Column("Avg", m, tuple(tasks)) for m in averages(evaluation)))


def summary_columns(shown: Shown) -> list[Column]:
    """Returns perplexity and the average over tasks."""
    return [column for column in columns_of(shown.evaluation) if column.low_is_better or column.tasks]


def figures_of(evaluation: Evaluation, cell: Cell) -> dict[str, dict[str, float | None]]:
    """Returns what `experiment.json` keeps of a cell: value and standard error by the titles of the columns."""
    return {
        column.title: {"value": record.value, "standard_error": record.standard_error}
        for column in columns_of(evaluation)
        if (record := column.record(cell)) is not None
    }


def quality_table(
    shown: Shown, cells: Sequence[Cell], ratio: float | None, *, heading: str = "method",
    label: Callable[[Cell], str] = lambda cell: cell.method,
) -> Grid:  # fmt: skip
    """Returns a row a cell: how much it lacks, its figures.

    Where all are of one ratio, which the caption then names, the best of each column among the pruned is in bold.
    """
    columns = columns_of(shown.evaluation)
    rows, bold = [], set()
    for cell in cells:
        share, state = shown.removed(cell), shown.state(cell)
        figures = [column.text(cell) if state == "done" else state for column in columns]
        rows.append((label(cell), percent(share, 2), *figures))
    pruned = [] if ratio is None else shown.done([c for c in cells if c.ratio or c.checkpoint is not None])
    for place, column in enumerate(columns, start=2):
        values = {cells.index(cell): value for cell in pruned if (value := column.value(cell)) is not None}
        best = (min if column.low_is_better else max)(values.values(), default=None)
        bold |= {(row, place) for row, value in values.items() if value == best and len(set(values.values())) > 1}
    header = (heading, "removed", *(column.title for column in columns))
    caption = "" if ratio is None else f"{percentage(ratio)} of the parameters \u00b1 standard error"
    return filled(Grid(caption, header, tuple(rows), bold=frozenset(bold)))


def difference_table(shown: Shown, cells: Sequence[Cell], baseline: Cell) -> Grid | None:
    """Returns by how much each cell differs from one of them; None where there is nothing to compare."""
    columns = columns_of(shown.evaluation)
    others = [cell for cell in shown.done(cells) if cell != baseline]
    if not shown.done([baseline]) or not others:
        return None
    rows = [
        (cell.method, *(difference(column.change(cell, baseline), scale=column.measure.scale) for column in columns))
        for cell in others
    ]
    caption = f"Difference from {baseline.name}, \u00b1 standard error"
    return filled(Grid(caption, ("method", *(c.title for c in columns)), tuple(rows)))


def results_grid(results: Results) -> Grid:
    """Returns a row a cell for the terminal: what became of it, perplexity and average with standard errors."""
    cells = [(found.model, *entry) for found in results.models for entry in found.cells.items()]
    known = dict.fromkeys(title for *_, cell in cells for title in cell.figures)
    titles = [title for title in known if title == "Avg" or title.startswith("perplexity")]
    several = len(results.models) > 1
    rows = []
    for model, name, cell in cells:
        figures = (cell.figures.get(title, {}) for title in titles)
        shown = (
            "" if (value := figure.get("value")) is None
            else number(value, figure.get("standard_error"), scale=100 if title == "Avg" else 1)
            for title, figure in zip(titles, figures, strict=True)
        )  # fmt: skip
        removed = "" if cell.ratio is None else f"{cell.ratio:.2%}"
        rows.append((*([model] if several else []), name, cell.state, removed, *shown))
    heads = (title.replace("Avg", "average, %").partition(", wiki")[0] for title in titles)
    return Grid(
        f"Experiment {results.experiment}" + ("" if several or not cells else f", {cells[0][0]}"),
        (*(["model"] if several else []), "cell", "state", "removed", *heads), tuple(rows), words=3 if several else 2,
    )  # fmt: skip
