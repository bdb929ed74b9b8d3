"""What a page consists of, and the same as Markdown and as HTML."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jinja2
from matplotlib.figure import Figure

from amprune import __version__
from amprune.prove.card import escaped
from amprune.report.grid import Grid, swatch, to_html, to_markdown

MARKER = "<!-- drawn by amprune report -->"
GENERATOR = '<meta name="generator" content="amprune'
"""What tells a page of amprune's from one that someone else wrote."""


@dataclass(frozen=True)
class Command:
    """What to type."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A figure with the words that stand for it where it cannot be seen."""

    name: str
    """Of its files, without the suffix."""
    figure: Figure
    alt: str
    caption: str


Block: TypeAlias = str | tuple[str, ...] | Command | Grid | Picture
"""A paragraph, a list of sentences, or what its name says."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tile:
    """One figure of the summary."""

    label: str
    value: str
    """With its standard error behind ±."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """A whole report."""

    title: str
    lead: str
    summaries: dict[str, tuple[Tile, ...]]
    """Of the models that have one."""
    sections: tuple[Section, ...]
    colours: dict[str, str]
    """Of each model."""
    drawn_from: str = "evaluation.json and the records of the models"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Returns every figure, in order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Picture))


def page_markdown(contents: Contents, *, figures: str) -> str:
    """Returns a whole report as Markdown; `figures` is where its pictures lie."""
    head = f"{MARKER}\n\n# {escaped(contents.title)}\n\n{escaped(contents.lead)}"
    return f"{head}\n\n{sections_markdown(contents.sections, level=2, figures=figures)}"


def sections_markdown(sections: Sequence[Section], *, level: int, figures: str) -> str:
    """Returns sections as Markdown, with headings of a level."""
    parts = []
    for section in sections:
        parts += [f"{'#' * level} {escaped(section.title)}", *(_markdown(block, figures) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, figures: str) -> str:
    if isinstance(block, Grid):
        return to_markdown(block)
    if isinstance(block, tuple):
        return "\n".join(f"- {escaped(sentence)}" for sentence in block)
    if isinstance(block, Command):
        return f"```sh\n{block.text}\n```"
    if isinstance(block, Picture):
        return f"![{escaped(block.alt)}]({figures}{block.name}.png)\n\n{escaped(block.caption)}"
    return escaped(block)


def page_html(contents: Contents, images: Mapping[str, bytes]) -> str:
    """Returns a whole report as one HTML file; `images` are its pictures as SVG, by their names."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("amprune.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["anchor"] = lambda title: "-".join(re.findall(r"[^\W_]+", title.lower()))
    # A figure and its sign stay on one line.
    environment.filters["nb"] = lambda text: text.replace(" %", "\u00a0%").replace(" \u00b1 ", "\u00a0\u00b1\u00a0")
    return environment.get_template("report.html.j2").render(
        contents=contents,
        kind=lambda block: type(block).__name__,
        images={name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in images.items()},
        swatch=swatch,
        grid=lambda block, section: to_html(block, colours=contents.colours, label=section.title),
        version=__version__,
    )
