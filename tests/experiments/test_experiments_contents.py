"""What experiments show: the paper's columns, the best in bold, differences, what is said of them, how it looks."""

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from browser import check_in_browser

from amprune.cli.display import show_experiment
from amprune.evaluation.records import Evaluation, ModelEntry, Record
from amprune.experiments.contents import experiment_contents
from amprune.experiments.figures import Level, Point, lines_figure
from amprune.experiments.recipes import RECIPES, Cell
from amprune.experiments.results import FILE, CellResult, ModelResults, Results
from amprune.experiments.run import ExperimentFiles
from amprune.experiments.settings import Settings, make_cells, make_settings
from amprune.report.write import ReportFiles, write_contents

TASKS = ("winogrande", "piqa", "arc_easy", "arc_challenge", "hellaswag")


def records(name: str, perplexity: float, accuracy: float) -> Iterator[Record]:
    """Every figure of quality of a model; `accuracy` is the share of right answers of every task."""
    common: dict[str, Any] = {"model": name, "device": "cpu"}
    draw = random.Random(name)
    losses = tuple(math.log(perplexity) + draw.gauss(0, 0.01) for _ in range(40))
    yield Record(
        measurement="perplexity", task="wikitext2 test", metric="perplexity", value=perplexity, unit="perplexity",
        standard_error=perplexity / 100, items=losses, items_hash="w", settings={"windows": 8}, n=40, **common,
    )  # fmt: skip
    items = tuple(float(number < accuracy * 100) for number in range(100))
    for task in TASKS:
        for metric in ("acc",) if task == "winogrande" else ("acc", "acc_norm"):
            yield Record(
                measurement="zero_shot", task=task, metric=metric, value=accuracy, unit="accuracy", n=100,
                standard_error=0.05, items=items, items_hash=task, settings={"limit": 100, "num_fewshot": 0}, **common,
            )  # fmt: skip
    yield Record(
        measurement="zero_shot", task="average", metric="accuracy", value=accuracy, unit="accuracy", n=500,
        standard_error=0.02, settings={"limit": 100, "num_fewshot": 0, "tasks": list(TASKS)}, **common,
    )  # fmt: skip


Figures = Mapping[str, tuple[float, float] | tuple[str, str]]
"""Of each cell: perplexity and accuracy, or state and reason."""


def drawn(folder: Path, name: str, figures: Figures, **given: Any) -> ReportFiles:
    """Draws an experiment of which the figures are given."""
    recipe = RECIPES[name]
    settings: Settings = make_settings(recipe, given, configured={}, quick=True)
    cells: tuple[Cell, ...] = make_cells(recipe, settings)
    evaluation, found = Evaluation(), ModelResults("smollm2-135m", "smollm2-135m")
    for cell in cells:
        first, second = figures[cell.name]
        if isinstance(first, str):
            found.cells[cell.name] = CellResult(first, str(second))  # type: ignore[arg-type]
            continue
        found.cells[cell.name] = CellResult("done", ratio=cell.ratio + (0.01 if "depth" in cell.name else 0))
        evaluation.add_model(ModelEntry(cell.name, "gone", cell.name, "llama", "bfloat16", 1000, 2000))
        evaluation.add(records(cell.name, first, float(second)))
    evaluation.save(folder / "smollm2-135m" / "evaluation.json")
    results = Results(name, {}, {"amprune": "0.1.0"}, [found])
    return write_contents(folder, experiment_contents(recipe, settings, cells, results, folder))


TABLE1: Figures = {
    "dense": (17.7, 0.60),
    "amp 20 %": (70.0, 0.48),
    "flap 20 %": (65.0, 0.47),
    "taylor 20 %": ("failed", "gradients need 9 GB"),
    "depth 20 %": (900.0, 0.40),
}
METHODS = ["amp", "flap", "taylor", "depth"]


def rows(text: str, name: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
            and line.split("|")[1].strip() == name]  # fmt: skip


def test_table1_has_the_columns_of_the_paper_and_the_best_in_bold(tmp_path: Path) -> None:
    files = drawn(tmp_path, "table1", TABLE1, methods=METHODS)
    text = files.markdown.read_text()
    assert rows(text, "method")[0] == [
        "method", "removed", "perplexity, wikitext2 test", "WinoGrande", "HellaSwag", "ARC-e", "ARC-c", "PIQA", "Avg"
    ]  # fmt: skip
    assert rows(text, "dense")[0][2:] == ["17.70 \u00b1 0.18", *["60 \u00b1 5"] * 5, "60.0 \u00b1 2.0"]
    assert rows(text, "amp")[0] == [
        "amp", "20.00 %", "70.0 \u00b1 0.7", *["**48 \u00b1 5**"] * 5, "**48.0 \u00b1 2.0**"
    ]  # fmt: skip
    assert rows(text, "flap")[0][2:4] == ["**65.0 \u00b1 0.7**", "47 \u00b1 5"]
    assert rows(text, "taylor")[0][2:] == ["failed"] * 7
    assert "**" not in "".join(rows(text, "dense")[0] + rows(text, "depth")[0])
    assert "Not of the same size, which their figures have to be read with: depth." in text
    assert "taylor 20 %: failed; gradients need 9 GB" in text
    html = files.html.read_text()
    assert html.count("<strong>") == 7
    assert "<strong>65.0 \u00b1 0.7</strong>" in html
    assert "Drawn by amprune" in html
    assert "from experiment.json and evaluation.json alone" in html


def test_differences_from_amp_are_paired(tmp_path: Path) -> None:
    text = drawn(tmp_path, "table1", TABLE1, methods=METHODS).markdown.read_text()
    difference = rows(text, "flap")[1]
    assert difference[2:] == ["\u22121.0 \u00b1 1.0"] * 5 + ["\u22121.0 \u00b1 0.4"]
    assert difference[1].startswith("\u22125.00 \u00b1 ")
    assert "not paired" not in text
    assert not rows(text, "taylor")[1:]


def test_table1_says_where_amp_loses(tmp_path: Path) -> None:
    text = drawn(tmp_path, "table1", TABLE1, methods=METHODS).markdown.read_text()
    assert "Perplexity, wikitext2 test: amp 20 % has 70.0 \u00b1 0.7, place 2 of 3; first is flap 20 %" in text
    assert "Average accuracy: amp 20 % has 48.0 \u00b1 2.0, place 1 of 3; next is flap 20 %" in text


def test_best_stands_beside_amp(tmp_path: Path) -> None:
    figures = {"dense": (17.7, 0.6), "best 20 %": (30.0, 0.55), "amp 20 %": (70.0, 0.48)}
    text = drawn(tmp_path, "table1", figures, methods=["best", "amp"]).markdown.read_text()
    assert "amp 20 % has 70.0 \u00b1 0.7, place 2 of 2; first is best 20 %, 30.00 \u00b1 0.30 (\u221240.00" in text
    assert rows(text, "best")[1][2:] == ["+8.0 \u00b1 2.7"] * 5 + ["+8.0 \u00b1 1.2"]
    assert "best: preset of amprune, calibrated on its own mixed set." in text


def test_each_ratio_has_its_own_best(tmp_path: Path) -> None:
    figures = {**TABLE1, "amp 30 %": (120.0, 0.4), "flap 30 %": (110.0, 0.41)}
    text = drawn(tmp_path, "table1", figures, methods=["amp", "flap"], ratios=[0.2, 0.3]).markdown.read_text()
    assert [row[2] for row in rows(text, "flap") if len(row) == 9] == ["**65.0 \u00b1 0.7**", "**110.0 \u00b1 1.1**"]
    assert "Difference from amp 30 %" in text


def test_equal_figures_have_no_best(tmp_path: Path) -> None:
    figures = {"dense": (17.7, 0.6), "amp 20 %": (70.0, 0.5), "flap 20 %": (70.0, 0.5)}
    text = drawn(tmp_path, "table1", figures, methods=["amp", "flap"]).markdown.read_text()
    assert not any("**" in cell for name in ("amp", "flap") for cell in rows(text, name)[0])


@pytest.mark.parametrize(
    ("reversed_order", "words"),
    [(5e6, "amp < random < reversed, as it should be"), (50.0, "NOT amp < random < reversed")],
)
def test_table2_says_whether_the_scores_are_coherent(reversed_order: float, words: str, tmp_path: Path) -> None:
    figures = {
        "dense": (17.7, 0.6), "amp 9.01 %": (30.0, 0.5), "random 9.01 %": (90.0, 0.4),
        "reversed 9.01 %": (reversed_order, 0.3),
    }  # fmt: skip
    text = drawn(tmp_path, "table2", figures, ratios=[0.0901]).markdown.read_text()
    assert "At 9.01 %, perplexity, wikitext2 test: amp 30.00, random 90.00, reversed" in text
    assert words in text


RATIOS = [0.0901, 0.2102, 0.5106]
FIGURE1: Figures = {"dense": (17.7, 0.6)} | {
    f"{kind} {100 * ratio:g} %": (17.7 * math.exp(slope * ratio), 0.5)
    for kind, slope in (("best", 9.0), ("best, trained", 4.0), ("amp", 14.0), ("amp, trained", 5.0))
    for ratio in RATIOS
}
EPOCHS: Figures = {"dense": (17.7, 0.6)} | {
    f"{when} {ratio} %": (80 - 9 * index, 0.4 + 0.01 * index)
    for ratio in (20, 30)
    for index, when in enumerate(["not trained", "1 epoch", "2 epochs", "3 epochs", "4 epochs"])
}
SHOWN: dict[str, tuple[Figures, dict[str, Any]]] = {
    "table1": (TABLE1, {"methods": METHODS}),
    "figure1": (FIGURE1, {"ratios": RATIOS}),
    "epochs": (EPOCHS, {"ratios": [0.2, 0.3]}),
}


def test_figure1_begins_at_the_dense_model(tmp_path: Path) -> None:
    files = drawn(tmp_path, "figure1", FIGURE1, ratios=RATIOS)
    assert {path.name for path in files.figures} == {"perplexity-1.png", "perplexity-1.svg"}
    text = files.markdown.read_text()
    assert "amp: 17.70 at 0, 62.49 at 9.01" in text
    assert "best: 17.70 at 0, 39.82 at 9.01" in text
    assert "amp, trained: 27.77 at 9.01" in text
    assert rows(text, "amp, trained 51.06 %")[0][1] == "51.06 %"
    assert "best: preset of amprune, calibrated on its own mixed set." in text
    order = [line.split("|")[1].strip() for line in text.splitlines() if "51.06 % |" in line]
    assert order == [f"{kind} 51.06 %" for kind in ("best", "amp", "best, trained", "amp, trained")]
    assert "**17" not in text


def test_figure1_has_no_line_of_what_failed(tmp_path: Path) -> None:
    figures = {name: ("failed", "no memory") if "best" in name else value for name, value in FIGURE1.items()}
    text = drawn(tmp_path, "figure1", figures, ratios=RATIOS).markdown.read_text()
    assert "best: 17.70" not in text
    assert "amp: 17.70" in text
    assert set(rows(text, "best 9.01 %")[0][2:]) == {"failed"}


@pytest.mark.parametrize(("high", "scale"), [(900.0, "log"), (90.0, "linear")])
def test_a_wide_range_is_drawn_on_a_logarithmic_axis(high: float, scale: str) -> None:
    lines = {"one": [Point(0, 18), Point(20, 30, 1, 1)], "two": [Point(20, high)]}
    figure = lines_figure(lines, level=Level("dense", 17.7), x_label="x", y_label="y", dashed={"one": [Point(20, 25)]})
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    across = [line for line in axes.lines if line.get_linestyle() == "--" and set(line.get_ydata()) == {17.7}]
    assert len(across) == 1
    assert {text.get_text() for text in axes.texts} == {"one", "two", "dense"}


@pytest.mark.parametrize("name", SHOWN)
def test_a_browser_shows_it_whole_on_a_desk_and_on_a_phone(name: str, tmp_path: Path) -> None:
    figures, given = SHOWN[name]
    page_file = drawn(tmp_path, name, figures, **given).html
    check_in_browser(page_file)


def test_the_terminal_shows_perplexity_and_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "perplexity, wikitext2 test": {"value": 70.04, "standard_error": 0.7}, "ARC-c": {"value": 0.3},
        "Avg": {"value": 0.48, "standard_error": 0.02},
    }  # fmt: skip
    cells = {
        "amp 20 %": CellResult("done", ratio=0.2, figures=figures),
        "taylor 20 %": CellResult("failed", "gradients need 9 GB"),
    }
    results = Results("table1", {}, {}, [ModelResults("a-model", "a-model", cells=cells)])
    files = ExperimentFiles(tmp_path / FILE, ReportFiles(tmp_path / "report.md", tmp_path / "report.html", ()), results)
    show_experiment(files)
    shown = capsys.readouterr().out
    cut = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert cut == [["amp 20 %", "done", "20.00%", "70.0 ± 0.7", "48.0 ± 2.0"], ["taylor 20 %", "failed", "", "", ""]]
    assert "Experiment table1, a-model" in shown
