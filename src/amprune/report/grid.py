"""A grid of figures, and how it is shown: in a terminal, as Markdown, as HTML."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from amprune.prove.card import escaped
from amprune.report.numbers import MISSING

_SHORT = 20
"""Letters up to which a name stays on one line."""


@dataclass(frozen=True)
class Grid:
    """Cells of text under heads, a row for each model (or figure, or check)."""

    title: str
    """May be empty, as a head may be."""
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    """So many columns, from the left, hold words; the others hold numbers."""
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells that stand out."""


def grid_of(title: str, names: Sequence[str], columns: Sequence[tuple[str, Mapping[str, str]]]) -> Grid:
    """Returns a row for each model and a column for each figure, given by the models' names, without empty columns."""
    rows = tuple((name, *(cells.get(name, MISSING) for _, cells in columns)) for name in names)
    return filled(Grid(title, ("model", *(head for head, _ in columns)), rows))


def filled(grid: Grid) -> Grid:
    """Leaves out the columns of numbers in which no row has anything."""
    places = range(len(grid.heads))
    kept = [place for place in places if place < grid.words or any(row[place] != MISSING for row in grid.rows)]
    return replace(
        grid,
        heads=tuple(grid.heads[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in grid.rows),
        bold=frozenset((row, kept.index(place)) for row, place in grid.bold if place in kept),
    )


def to_terminal(grid: Grid, width: int) -> Group:
    """Returns the grid for rich to print: a table where that fits, else turned, a block of lines for each row.

    Nothing is cut: figures stay on one line in a table, words go on in the next line, between words.
    """
    rows = [[" ".join(cell.split()) for cell in row] for row in (grid.heads, *grid.rows)]
    title = [Text(_wrapped(grid.title, width), "bold")] if grid.title else []
    least = sum(_least(column, words=place < grid.words) for place, column in enumerate(zip(*rows, strict=True)))
    if least + 3 * len(grid.heads) + 1 > width:
        return Group(*title, *_blocks(rows, width))
    table = Table()
    for place, head in enumerate(rows[0]):
        words = place < grid.words
        table.add_column(Text(head), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for number, row in enumerate(rows[1:]):
        table.add_row(*(Text(cell, "bold" if (number, place) in grid.bold else "") for place, cell in enumerate(row)))
    return Group(*title, table)


def _least(column: Sequence[str], *, words: bool) -> int:
    """Returns how narrow a column can be: as its longest figure, or as its longest word, if it has to."""
    longest = max(map(cell_len, column))
    word = max((cell_len(word) for cell in column for word in cell.split()), default=0)
    return max(word, min(longest, _SHORT)) if words else longest


def _blocks(rows: Sequence[Sequence[str]], width: int) -> list[Text]:
    (first, *heads), *models = rows
    room = min(max(map(cell_len, heads), default=0) + 1, width // 2)
    lines = []
    for name, *cells in models:
        lines.append(Text(_wrapped(f"{first}: {name}" if first else name, width), "bold"))
        for head, cell in zip(heads, cells, strict=True):
            label = f"  {f'{head}:':<{room}} " if head else "  "
            if cell:
                lines.append(Text(_wrapped(cell, width, label)))
    return lines


def _wrapped(text: str, width: int, label: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=label, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def to_markdown(grid: Grid) -> str:
    """Returns the grid as a table of GitHub's Markdown, its title before it in bold."""
    lines = [] if not grid.title else [f"**{escaped(grid.title)}**", ""]
    lines.append(f"| {' | '.join(map(escaped, grid.heads))} |")
    lines.append("".join("|---" if place < grid.words else "|--:" for place in range(len(grid.heads))) + "|")
    for number, row in enumerate(grid.rows):
        marks = ["**" if (number, place) in grid.bold else "" for place in range(len(row))]
        lines.append("|" + "".join(f" {m}{escaped(cell)}{m} |" for m, cell in zip(marks, row, strict=True)))
    return "\n".join(lines)


_TABLE = Markup(
    """{title}<div class="scroll" role="region" aria-label="{label}" tabindex="0">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""
)


def to_html(grid: Grid, *, colours: Mapping[str, str], label: str) -> Markup:
    """Returns the grid as a table that can be scrolled sideways; `label` names it where it has no title.

    A row that is named after a model has the model's colour before it.
    """
    words = [Markup(' class="words"') if place < grid.words else "" for place in range(len(grid.heads))]
    heads = [Markup('<th scope="col"{}>{}</th>').format(*pair) for pair in zip(words, grid.heads, strict=True)]
    rows = []
    for number, (name, *row) in enumerate(grid.rows):
        kind = ("short" if len(name) <= _SHORT else "long") + (" marked" if name in colours else "")
        cells = [Markup('<th scope="row" class="{}">{}{}</th>').format(kind, swatch(colours.get(name)), name)]
        for place, cell in enumerate(row, start=1):
            shown = Markup("<strong>{}</strong>").format(cell) if (number, place) in grid.bold else cell
            cells.append(Markup("<td{}>{}</td>").format(words[place], shown))
        rows.append(Markup("<tr>{}</tr>").format(Markup().join(cells)))
    title = Markup("<h3>{}</h3>\n").format(grid.title) if grid.title else ""
    return _TABLE.format(
        title=title, label=grid.title or label, heads=Markup().join(heads), rows=Markup("\n").join(rows)
    )


def swatch(colour: str | None) -> Markup:
    """Returns a square of a model's colour; nothing where it has none."""
    return Markup() if colour is None else Markup('<span class="swatch" style="background:{}"></span>').format(colour)
