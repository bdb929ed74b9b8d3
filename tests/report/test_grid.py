"""A grid of figures in a terminal, as Markdown and as HTML: nothing is cut, nothing is taken for markup."""

import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from test_report import entry, measured

from amprune.evaluation.records import Evaluation
from amprune.report.grid import Grid, filled, grid_of, to_html, to_markdown, to_terminal
from amprune.report.numbers import MISSING
from amprune.report.summary import evaluation_grid

MODELS = Grid(
    "Evaluation in out/evaluation.json",
    ("model", "parameters", "perplexity, wikitext2 test", "average accuracy, %", "decoding speedup", "peak memory"),
    (
        ("smollm2-135m", "134.5 M", "17.67 ± 0.29", "52 ± 3", MISSING, "410.0 MB"),
        ("smollm2-135m-pruned-20-per-cent", "107.6 M", "59.0 ± 1.0 (+41 ± 3)", "49 ± 3", "1.18x\n(1.16 to 1.20)", ""),
    ),
    bold=frozenset({(1, 2)}),
)


def shown(grid: Grid, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, soft_wrap=True)
    console.print(to_terminal(grid, width))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_a_grid_is_turned_in_a_narrow_terminal_and_never_cut(width: int) -> None:
    text = shown(MODELS, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    words = re.sub(r"[\s│]+", " ", text)
    for row in MODELS.rows:
        assert all(" ".join(cell.split()) in words for cell in row)
    assert all(head in words for head in MODELS.heads)
    assert ("│" in text) == (width == 160)


@pytest.mark.parametrize(("width", "models", "table"), [(40, 2, False), (80, 2, True), (80, 4, False), (120, 3, True)])
def test_an_evaluation_is_whole_in_every_terminal(width: int, models: int, table: bool) -> None:
    evaluation, names = Evaluation(), ["dense", "pruned", "recovered", "quantised"][:models]
    for index, name in enumerate(names):
        evaluation.add_model(entry(name, 1000 - index))
        evaluation.add(measured(name, 1000 - index, perplexity=20.0 + index, questions=40))
    grid = evaluation_grid(evaluation, names, Path("evaluation.json"))
    text = shown(grid, width)
    assert ("│" in text) == table
    assert max(map(cell_len, text.splitlines())) <= width
    words = " ".join(text.replace("│", " ").split())
    assert all(cell in words for row in grid.rows for cell in row[1:])
    assert "batch 16, prompt 512," in words


def test_a_block_is_a_name_and_a_line_for_each_figure() -> None:
    grid = Grid("Title", ("", "dense", "pruned"), (("parameters", "87,792", "61,392"), ("key-value heads", "4", "")))
    assert shown(grid, 20) == ("Title\nparameters\n  dense:  87,792\n  pruned: 61,392\nkey-value heads\n  dense:  4\n")
    assert "│ parameters " in shown(grid, 80)


def test_words_of_a_table_are_wrapped_where_its_figures_fit() -> None:
    rows = (
        ("batch 1, prompt 12, new 128, compile: peak memory", "410.0 MB"),
        ("a-name-that-is-long/as-paths-are", "1"),
    )
    assert shown(Grid("", ("", "dense"), rows), 47).splitlines()[3:7] == [
        "│ batch 1, prompt 12, new 128,     │ 410.0 MB │",
        "│ compile: peak memory             │          │",
        "│ a-name-that-is-long/as-paths-are │        1 │",
        "└──────────────────────────────────┴──────────┘",
    ]


CELLS = st.text(
    st.characters(exclude_categories=["C", "Z", "M"], exclude_characters="│…🏻🏼🏽🏾🏿"), min_size=1, max_size=30
)
"""Without signs of no width of their own, which alone are nowhere."""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4), st.integers(10, 140))
def test_every_cell_is_whole_at_every_width(rows: list[tuple[str, str, str]], width: int) -> None:
    text = shown(Grid("", ("", "one", "[two]"), tuple(rows)), width)
    assert all(cell in text for row in rows for cell in row)


def test_columns_without_figures_are_left_out() -> None:
    grid = Grid("", ("model", "one", "two"), (("a", MISSING, "2"), ("b", MISSING, MISSING)), bold=frozenset({(0, 2)}))
    assert filled(grid) == Grid("", ("model", "two"), (("a", "2"), ("b", MISSING)), bold=frozenset({(0, 1)}))
    assert grid_of("", ["a", "b"], [("one", {}), ("two", {"a": "2", "c": "3"})]).rows == (("a", "2"), ("b", MISSING))


def test_markdown_and_html_take_no_cell_for_markup() -> None:
    grid = Grid("a|b", ("", "<i>"), (("x*", "1 | 2"), ("y_z_", "3")), bold=frozenset({(0, 1)}))
    assert to_markdown(grid) == "**a\\|b**\n\n|  | &lt;i> |\n|---|--:|\n| x\\* | **1 \\| 2** |\n| y_z\\_ | 3 |"
    html = to_html(grid, colours={"x*": "#123456"}, label="Section")
    assert "<h3>a|b</h3>" in html
    assert '<th scope="col">&lt;i&gt;</th>' in html
    assert "<td><strong>1 | 2</strong></td>" in html
    assert '<th scope="row" class="short marked"><span class="swatch" style="background:#123456"></span>x*</th>' in html
    assert 'aria-label="a|b"' in html
    assert 'aria-label="Section"' in to_html(Grid("", ("a",), ()), colours={}, label="Section")
