"""Tables of quality: a row a cell, the best of each column in bold, and paired differences from one of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from amprune.evaluation.comparison import Difference
from amprune.evaluation.records import Evaluation, Record
from amprune.experiments.recipes import Cell, Recipe
from amprune.experiments.results import ModelResults
from amprune.experiments.settings import Settings
from amprune.report.blocks import Table, drop_empty_columns
from amprune.report.measures import Measure, average_change, averages, change, find_measures, headlines
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
_QUALITY = ("perplexity", "zero_shot")


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
    def ratios(self) -> tuple[float, ...]:
        """Returns the ratios asked for, in the order of the cells."""
        return tuple(dict.fromkeys(cell.ratio for cell in self.cells if cell.is_pruned))

    def at(self, ratio: float) -> tuple[Cell, ...]:
        """Returns the cells that are pruned here at a ratio."""
        return tuple(cell for cell in self.cells if cell.is_pruned and cell.ratio == ratio)

    @property
    def beside(self) -> tuple[Cell, ...]:
        """Returns the models of other tools."""
        return tuple(cell for cell in self.cells if cell.checkpoint is not None)

    def state(self, cell: Cell) -> str:
        """Returns what became of a cell; a dash where it was never tried."""
        result = self.found.cells.get(cell.name)
        return MISSING if result is None else result.state

    def calibration(self, cell: Cell) -> Mapping[str, Any] | None:
        """Returns what is known of the set that the preset of a cell drew."""
        result = self.found.cells.get(cell.name)
        return None if result is None else result.calibration

    def removed(self, cell: Cell) -> float | None:
        """Returns the share of the parameters that a measured model lacks."""
        result = self.found.cells.get(cell.name)
        return None if result is None else result.ratio


@dataclass(frozen=True)
class Column:
    """A figure of every model."""

    title: str
    measure: Measure
    tasks: tuple[Measure, ...] = ()
    """Of an average: what it is over."""

    @property
    def scale(self) -> float:
        """Returns by what figures are multiplied to be shown."""
        return 100.0 if self.measure.first.unit == "accuracy" else 1.0

    @property
    def low_is_better(self) -> bool:
        """Tells perplexities from accuracies."""
        return self.measure.measurement == "perplexity"

    def value(self, cell: Cell) -> float | None:
        """Returns the figure of a cell, as it was measured."""
        record = self.measure.records.get(cell.name)
        return None if record is None else record.value

    def text(self, cell: Cell) -> str:
        """Returns the figure of a cell with its standard error."""
        record = self.measure.records.get(cell.name)
        return MISSING if record is None else _text(record, self.scale)

    def against(self, cell: Cell, baseline: Cell) -> Difference | None:
        """Returns by how much a cell differs from another: window by window, question by question."""
        if self.tasks:
            found = average_change(self.measure, self.tasks, cell.name, baseline.name)
        else:
            found = change(self.measure, cell.name, baseline.name)
        return None if found is None else found.difference

    def against_text(self, cell: Cell, baseline: Cell) -> str:
        """Returns the same as text, marked where the items are not the same."""
        if self.tasks:
            return difference(average_change(self.measure, self.tasks, cell.name, baseline.name), scale=self.scale)
        return difference(change(self.measure, cell.name, baseline.name), scale=self.scale)


def _text(record: Record, scale: float) -> str:
    error = record.standard_error
    return number(scale * record.value, None if error is None else scale * error)


def columns_of(evaluation: Evaluation) -> tuple[Column, ...]:
    """Returns perplexity, the tasks in the paper's order, other tasks, and the average."""
    evaluation = _on_one_device(evaluation)
    found = [Column(f"perplexity, {m.label}", m) for m in find_measures(evaluation, "perplexity")]
    tasks = sorted(headlines(evaluation), key=lambda m: _place(m.task))
    found += [Column(_TITLES.get(m.task, m.label) + _metric(m), m) for m in tasks]
    return (*found, *(Column("Avg", m, tuple(tasks)) for m in averages(evaluation)))


def figures_of(evaluation: Evaluation, cell: Cell) -> dict[str, dict[str, float | None]]:
    """Returns what `experiment.json` keeps of a cell: value and standard error by the titles of the columns."""
    found = {column.title: column.measure.records.get(cell.name) for column in columns_of(evaluation)}
    return {
        title: {"value": record.value, "standard_error": record.standard_error}
        for title, record in found.items()
        if record is not None
    }


def _metric(measure: Measure) -> str:
    usual = "acc" if measure.task == "winogrande" else "acc_norm"
    return "" if measure.task in _TITLES and measure.metric == usual else f", {measure.metric}"


def _place(task: str) -> int:
    return list(_TITLES).index(task) if task in _TITLES else len(_TITLES)


def _on_one_device(evaluation: Evaluation) -> Evaluation:
    """Sets aside on what each figure was measured, which a run that goes on elsewhere changes; it is told apart."""
    records = (
        replace(record, device="") if record.measurement in _QUALITY else record
        for record in evaluation.records.values()
    )
    return Evaluation(evaluation.models, {record.key: record for record in records})


def quality_table(
    shown: Shown,
    cells: Sequence[Cell],
    caption: str,
    *,
    heading: str = "method",
    label: Callable[[Cell], str] = lambda cell: cell.method,
) -> Table:
    """Returns a row a cell: how much it lacks, its figures, the best of each column among the pruned in bold."""
    columns = columns_of(shown.evaluation)
    rows, bold = [], set()
    for cell in cells:
        share = shown.removed(cell)
        state = shown.state(cell)
        figures = [column.text(cell) if state == "done" else state for column in columns]
        rows.append((label(cell), MISSING if share is None else percent(share, 2), *figures))
    pruned = [index for index, cell in enumerate(cells) if cell.ratio or cell.checkpoint is not None]
    for place, column in enumerate(columns, start=2):
        values = {row: value for row in pruned if (value := _value(shown, column, cells[row])) is not None}
        best = _best(column, values.values())
        bold |= {(row, place) for row, value in values.items() if value == best and len(set(values.values())) > 1}
    header = (heading, "removed", *(column.title for column in columns))
    return drop_empty_columns(Table(caption, header, tuple(rows), bold=frozenset(bold)), MISSING)


def _value(shown: Shown, column: Column, cell: Cell) -> float | None:
    return column.value(cell) if shown.state(cell) == "done" else None


def _best(column: Column, values: Iterable[float]) -> float | None:
    return (min if column.low_is_better else max)(values, default=None)


def difference_table(shown: Shown, cells: Sequence[Cell], baseline: Cell) -> Table | None:
    """Returns by how much each cell differs from one of them; None where there is nothing to compare."""
    columns = columns_of(shown.evaluation)
    others = [cell for cell in cells if cell != baseline and shown.state(cell) == "done"]
    if shown.state(baseline) != "done" or not others:
        return None
    rows = tuple((cell.method, *(column.against_text(cell, baseline) for column in columns)) for cell in others)
    caption = f"Difference from {baseline.name}, \u00b1 standard error"
    return drop_empty_columns(Table(caption, ("method", *(c.title for c in columns)), rows), MISSING)
