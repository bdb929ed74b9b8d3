"""Draws a report: everything once, in order. Files appear whole or not at all."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amprune.errors import ReportError
from amprune.evaluation.workload import check_workload
from amprune.model.recovered import data_sentence
from amprune.model.writer import RECORDS
from amprune.prove.card import CARD, Made, Results, logit_difference, renewed_card
from amprune.records import staging
from amprune.report.contents import make_contents
from amprune.report.drawing import to_png, to_svg
from amprune.report.inputs import Inputs, read_inputs
from amprune.report.page import (
    GENERATOR,
    MARKER,
    Contents,
    Section,
    page_html,
    page_markdown,
    sections_markdown,
)
from amprune.report.provenance import LIMITS, MADE, UNMEASURED, UNTRAINED, limits
from amprune.report.summary import model_index
from amprune.report.training import RECOVERY
from amprune.settings import ReportSettings, Workload, part, settle

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
    for name, mark in zip(_NAMES, (MARKER, GENERATOR), strict=True):
        _refuse_foreign(output / name, mark)
    files: dict[Path, bytes] = {}
    images = {}
    for picture in contents.pictures:
        images[picture.name] = to_svg(picture.figure)
        files[output / _FIGURES / f"{picture.name}.svg"] = images[picture.name]
        files[output / _FIGURES / f"{picture.name}.png"] = to_png(picture.figure)
    figures = tuple(files)
    files[output / _NAMES[0]] = page_markdown(contents, figures=f"{_FIGURES}/").encode()
    files[output / _NAMES[1]] = page_html(contents, images).encode()
    stale = _stale(output, figures)
    _write(output, {**files, **(beside or {})})
    for file in stale:
        file.unlink(missing_ok=True)
    return ReportFiles(output / _NAMES[0], output / _NAMES[1], figures)


def remove_report(output: Path) -> None:
    """Removes report.md, report.html and their figures from a folder, unless someone else wrote them."""
    for file in _stale(output, ()):
        file.unlink(missing_ok=True)
    for name, mark in zip(_NAMES, (MARKER, GENERATOR), strict=True):
        with contextlib.suppress(ReportError, FileNotFoundError):
            _refuse_foreign(output / name, mark)
            (output / name).unlink()
    with contextlib.suppress(OSError):
        (output / _FIGURES).rmdir()


def _refuse_foreign(file: Path, mark: str) -> None:
    try:
        foreign = file.exists() and (
            not file.is_file() or mark not in file.read_text(encoding="utf-8", errors="replace")
        )
    except OSError as error:
        raise ReportError(f"cannot replace {file}: {error.strerror or error}") from error
    if foreign:
        raise ReportError(f"{file} was not written by amprune report; move it, and draw the report again")


def _card(folder: Path, inputs: Inputs, contents: Contents, written: Sequence[str]) -> str | None:
    """Returns the model card with the results; None where there is none, or someone else's."""
    subject = inputs.subject(inputs.focus)
    if subject is None:
        return None
    made = Made(subject.plan, subject.recovery, subject.quantization, logit_difference(inputs.verification))
    said = {UNTRAINED} if made.recovery is None else {f"{subject.name}: {data_sentence(made.recovery)}"}
    front: dict[str, object] = {}
    for one in (inputs.subject(inputs.baseline), subject):  # what the model's own entry says counts more
        if one is not None and one.entry is not None:
            front |= {} if one.entry.license is None else {"license": one.entry.license}
            front |= {} if one.entry.base_model is None else {"base_model": [one.entry.base_model]}
    records = inputs.evaluation.records.values()
    # How the model was made, and what it is not for, the card says in its own words.
    shown = [_for_card(section) for section in contents.sections if section.title not in (MADE, LIMITS, UNMEASURED)]
    results = Results(
        text=f"## Results\n\n{sections_markdown(shown, level=3, figures=f'{RECORDS}/{_FIGURES}/')}",
        measured=any(r.model == subject.name and r.measurement in ("perplexity", "zero_shot") for r in records),
        limits=tuple(limit for limit in limits(inputs) if limit not in said),
        front=front,
        index=model_index(inputs.evaluation, subject.name),
    )
    return renewed_card(folder, made, results, dense=inputs.baseline or "the dense model", records=written)


def _for_card(section: Section) -> Section:
    """Leaves out how models were trained: of its own model the card says so elsewhere."""
    if section.title != RECOVERY:
        return section
    return replace(section, blocks=tuple(block for block in section.blocks if not isinstance(block, tuple)))


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
    figures = output / _FIGURES
    try:
        if any(file.parent == figures for file in files):
            figures.mkdir(exist_ok=True)
        with staging(output, "report") as folder:
            staged = {target: folder / str(index) for index, target in enumerate(files)}
            for target, partial in staged.items():
                partial.write_bytes(files[target])
            for target, partial in staged.items():
                partial.replace(target)
    except OSError as error:
        raise ReportError(
            f"cannot write the report into {output}: {error.strerror or error}; no file is half-written"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            figures.rmdir()  # where it is empty, since nothing was written
