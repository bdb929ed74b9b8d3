"""Draws a report: everything once, in order. Files appear whole or not at all."""

import base64
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from amprune import __version__
from amprune.errors import ReportError
from amprune.evaluation.workload import check_workload
from amprune.model.writer import RECORDS
from amprune.prove.card import CARD, escaped
from amprune.report.blocks import Bullets, Contents, Section
from amprune.report.card import renewed_card
from amprune.report.contents import make_contents
from amprune.report.drawing import to_png, to_svg
from amprune.report.inputs import Inputs, read_inputs
from amprune.report.provenance import LIMITS, MADE, UNMEASURED
from amprune.report.training import RECOVERY
from amprune.settings import ReportSettings, Workload, part, settle

_MARKER = "<!-- drawn by amprune report -->"
_GENERATOR = '<meta name="generator" content="amprune'
_FIGURES = "figures"
_NAMES = ("report.md", "report.html")


@dataclass(frozen=True)
class ReportFiles:
    """What was written."""

    markdown: Path
    html: Path
    figures: tuple[Path, ...]
    card: Path | None = None
    """The renewed model card; None where there is none to renew."""
    card_kept: str | None = None
    """Why the model card was left as it is."""


def write_report(
    folder: str | os.PathLike[str],
    settings: ReportSettings | None = None,
    **options: Any,
) -> ReportFiles:
    """Draws the report of a pruned or recovered checkpoint, or of a folder with an `evaluation.json`.

    Of a checkpoint, `report.md`, `report.html` and `figures/` are written into its folder `amprune/`, and its README.md
    is renewed with the results unless someone else wrote it. Of another folder they lie beside the evaluation.

    Args:
        folder: a checkpoint that amprune pruned, or a folder with an `evaluation.json`.
        settings: what is compared with what, and the workload that costs are drawn for.
        options: of `ReportSettings`, such as `baseline="dense"`.

    Raises:
        ReportError: there is nothing to draw from, it is damaged, or the files cannot be written; none is then.
    """
    asked, place = settle(ReportSettings, settings, options), Path(folder).expanduser()
    inputs = read_inputs(place, baseline=asked.baseline, evaluation=asked.evaluation)
    contents = make_contents(inputs, workload=check_workload(part(Workload, asked)))
    card = _card(place, inputs, contents, [*_NAMES, *([_FIGURES] if contents.pictures else [])])
    beside = {} if card is None else {place / CARD: card.encode()}
    files = write_contents(inputs.output, contents, beside=beside)
    kept = None
    if card is None and inputs.focus is not None:
        kept = f"{place / CARD} was not written by amprune and was left as it is; {_NAMES[0]} holds the same figures"
    return replace(files, card=place / CARD if card is not None else None, card_kept=kept)


def write_contents(output: Path, contents: Contents, *, beside: Mapping[Path, bytes] | None = None) -> ReportFiles:
    """Writes report.md, report.html and figures/ into a folder, and other files with them.

    Figures that an earlier report had and this one has not are removed.
    """
    for name, mark in zip(_NAMES, (_MARKER, _GENERATOR), strict=True):
        _refuse_foreign(output / name, mark)
    files: dict[Path, bytes] = {}
    images = {}
    for picture in contents.pictures:
        images[picture.name] = to_svg(picture.figure)
        files[output / _FIGURES / f"{picture.name}.svg"] = images[picture.name]
        files[output / _FIGURES / f"{picture.name}.png"] = to_png(picture.figure)
    figures = tuple(files)
    files[output / _NAMES[0]] = _markdown(contents).encode()
    files[output / _NAMES[1]] = _html(contents, images).encode()
    stale = _stale(output, figures)
    _write(output, {**files, **(beside or {})})
    for file in stale:
        file.unlink(missing_ok=True)
    return ReportFiles(output / _NAMES[0], output / _NAMES[1], figures)


def remove_report(output: Path) -> None:
    """Removes report.md, report.html and their figures from a folder, unless someone else wrote them."""
    for file in _stale(output, ()):
        file.unlink(missing_ok=True)
    for name, mark in zip(_NAMES, (_MARKER, _GENERATOR), strict=True):
        with contextlib.suppress(ReportError, FileNotFoundError):
            _refuse_foreign(output / name, mark)
            (output / name).unlink()
    with contextlib.suppress(OSError):
        (output / _FIGURES).rmdir()


def _refuse_foreign(file: Path, mark: str) -> None:
    try:
        foreign = file.exists() and mark not in file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"cannot replace {file}: {error.strerror or error}") from error
    if foreign:
        raise ReportError(f"{file} was not written by amprune report; move it, and draw the report again")


def _card(folder: Path, inputs: Inputs, contents: Contents, written: Sequence[str]) -> str | None:
    if inputs.focus is None:
        return None
    own = (MADE, LIMITS, UNMEASURED)  # The card has words of its own for these.
    shown = [_for_card(section) for section in contents.sections if section.title not in own]
    results = _sections(shown, level=3, figures=f"{RECORDS}/{_FIGURES}/")
    there = [path.name for path in inputs.output.iterdir() if not path.name.startswith(".")]
    records = dict.fromkeys([*there, *written])
    return renewed_card(folder, inputs, records=list(records), results=f"## Results\n\n{results}")


def _for_card(section: Section) -> Section:
    """Leaves out how models were trained: of its own model the card says so elsewhere."""
    if section.title != RECOVERY:
        return section
    return replace(section, blocks=tuple(block for block in section.blocks if not isinstance(block, Bullets)))


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("amprune.report"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = escaped
    environment.filters["nb"] = _unbroken
    return environment


def _markdown(contents: Contents) -> str:
    body = _sections(contents.sections, level=2, figures=f"{_FIGURES}/")
    return f"{_MARKER}\n\n# {escaped(contents.title)}\n\n{escaped(contents.lead)}\n\n{body}"


def _sections(sections: Sequence[Section], *, level: int, figures: str) -> str:
    template = _environment(autoescape=False).get_template("report.md.j2")
    text = template.render(sections=sections, level=level, figures=figures)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _html(contents: Contents, images: Mapping[str, bytes]) -> str:
    def swatch(name: str) -> Markup:
        colour = contents.colours.get(name)
        return (
            Markup() if colour is None else Markup('<span class="swatch" style="background:{}"></span>').format(colour)
        )

    data = {name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in images.items()}
    template = _environment(autoescape=True).get_template("report.html.j2")
    return template.render(
        contents=contents, images=data, version=escape(__version__), swatch=swatch, partition=_partition
    )


def _unbroken(text: str) -> str:
    """Keeps a figure and its sign on one line."""
    return text.replace(" %", "\u00a0%").replace(" \u00b1 ", "\u00a0\u00b1\u00a0")


def _partition(value: str) -> tuple[str, str, str]:
    figure, sign, error = value.partition(" ± ")
    return figure, sign, error


def _stale(output: Path, figures: Sequence[Path]) -> list[Path]:
    """Finds figures of an earlier report, by its own links, that this one has no longer."""
    earlier = output / "report.md"
    if not earlier.is_file():
        return []
    names = re.findall(rf"\]\({_FIGURES}/([\w-]+)\.png\)", earlier.read_text(encoding="utf-8", errors="replace"))
    found = [output / _FIGURES / f"{name}{suffix}" for name in names for suffix in (".png", ".svg")]
    return [file for file in found if file not in figures]


def _write(output: Path, files: Mapping[Path, bytes]) -> None:
    """Writes everything under other names first, then renames; nothing is left when that fails."""
    with _write_errors(output), _made_folder(output / _FIGURES, any(f.parent.name == _FIGURES for f in files)):
        staging = Path(tempfile.mkdtemp(prefix=".report.", suffix=".partial", dir=output))
        try:
            staged = {target: staging / str(index) for index, target in enumerate(files)}
            for target, partial in staged.items():
                partial.write_bytes(files[target])
            for target, partial in staged.items():
                partial.replace(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _made_folder(folder: Path, wanted: bool) -> Iterator[None]:
    """Makes a folder, and removes it again if it stays empty because of an error."""
    if wanted:
        folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


@contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(
            f"cannot write the report into {output}: {error.strerror or error}; no file is half-written"
        ) from error
