"""What a report consists of, before it is Markdown or HTML."""

from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What to type."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text; the first `left` columns are words, the others numbers. A caption may be empty."""

    kind: ClassVar[str] = "table"
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells that stand out."""


@dataclass(frozen=True)
class Picture:
    """A figure with the words that stand for it where it cannot be seen."""

    kind: ClassVar[str] = "picture"
    name: str
    """Of its files, without the suffix."""
    figure: Figure
    alt: str
    caption: str


Block = Text | Bullets | Command | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """Returns the fragment that leads here."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Tile:
    """One figure of the summary."""

    label: str
    value: str
    """With its standard error behind ±."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TileGroup:
    """The summary of one model."""

    title: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Contents:
    """A whole report."""

    title: str
    lead: str
    groups: tuple[TileGroup, ...]
    sections: tuple[Section, ...]
    colours: dict[str, str]
    """Of each model."""
    drawn_from: str = "evaluation.json and the records of the models"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Returns every figure, in order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Picture))


def drop_empty_columns(table: Table, missing: str) -> Table:
    """Leaves out the columns of numbers in which no row has anything."""
    kept = [
        index
        for index in range(len(table.header))
        if index < table.left or any(row[index] != missing for row in table.rows)
    ]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    bold = frozenset((row, kept.index(column)) for row, column in table.bold if column in kept)
    return Table(table.caption, tuple(table.header[index] for index in kept), rows, table.left, bold)
