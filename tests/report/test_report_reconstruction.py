"""The report's section on a refit: what its numbers say, and what is drawn."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import check_in_browser
from test_report import files_in, write_example
from tiny_models import find
from tiny_reconstruction import write

from amprune.cut.refit.record import ReconstructionRecord, read_record
from amprune.errors import ReportError
from amprune.report.inputs import read_inputs
from amprune.report.reconstruction import reconstruction_figure
from amprune.report.write import write_report


def fit(before: float, after: float, strength: float | None = 0.1, tokens: int = 57344) -> dict[str, Any]:
    return {"before": before, "after": after, "held_out_before": before, "held_out_after": after,
            "strength": strength, "tokens": tokens}  # fmt: skip


def record(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"format": 1, "calibration": {"name": "mixed"}, "rows": 128, "row_tokens": 512, "held_out_rows": 16,
            "layers": layers, "sha256": {}}  # fmt: skip


def made(count: int = 30, *, spread: float = 1.0) -> dict[str, Any]:
    """Errors that grow with depth, by a factor of `spread`; the first attention misses nothing."""
    layers = []
    for index in range(count):
        error = 0.4 * spread ** (index / (count - 1) - 1)
        layers.append({"attention": fit(error / 2, error / 4, 0.01), "mlp": fit(error, error / 2, 1.0),
                       "drift": error / 3})  # fmt: skip
    layers[0]["attention"] = fit(0.0, 0.0, None)
    return record(layers)


def put(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "amprune" / "reconstruction.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, content: dict[str, Any]) -> ReconstructionRecord:
    (folder / "amprune").mkdir(exist_ok=True)
    found = read_record(put(folder, content))
    assert found is not None
    return found


def section(text: str) -> str:
    return text.split("## Reconstruction")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was refitted for real."""
    return write(find("llama-gqa"), tmp_path_factory.mktemp("refitted"))[0]


@pytest.mark.usefixtures("without_png")
def test_a_refitted_checkpoint_has_a_section_and_a_figure(refitted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(refitted, tmp_path / "out"))
    files = write_report(out)
    assert {path.stem for path in files.figures} == {"parameters", "reconstruction"}
    text, stored = section(files.markdown.read_text()), read_record(out)
    assert stored is not None
    assert "2 of 20 rows of 128 tokens were held out" in text
    assert f"fitted on {stored.layers[0].mlp.tokens:,} tokens of random" in text
    means = [100 * np.mean([getattr(layer.mlp, which) for layer in stored.layers])
             for which in ("held_out_before", "held_out_after")]  # fmt: skip
    row = next(line for line in text.splitlines() if line.startswith("| out |")).split("|")
    assert [cell.strip() for cell in row[4:6]] == [f"{mean:.1f} %" for mean in means]
    assert "](figures/reconstruction.png)" in text
    before = files_in(out)
    write_report(out)
    assert files_in(out) == before


@pytest.mark.usefixtures("without_png")
def test_each_model_of_a_comparison_is_drawn(tmp_path: Path) -> None:
    write_example(tmp_path)
    put(tmp_path / "model 0", made())
    put(tmp_path / "model 1", made(spread=100))
    files = write_report(tmp_path)
    text = section(files.markdown.read_text())
    assert {"reconstruction", "reconstruction-2"} <= {path.stem for path in files.figures}
    assert (
        "fitted on 57,344 tokens of mixed (16 of 128 rows of 512 tokens were held out), with ridges of 0.01 to 1 "
        in text
    )
    assert "| pruned-20 | 19.3 % | 9.7 % | 40.0 % | 20.0 % | 13.3 % |" in text
    assert "1 of 60 projections had nothing to make up for." in text
    assert "stayed as they were" not in text
    assert not re.search(r"\b(None|nan|inf)\b", text)
    put(tmp_path / "model 0", record([{"attention": fit(0.2, 0.2, None), "mlp": fit(0.3, 0.1), "drift": 1e-4}]))
    (tmp_path / "model 1" / "amprune" / "reconstruction.json").unlink()
    files = write_report(tmp_path)
    text = section(files.markdown.read_text())
    assert "with a ridge of 0.1 times" in text
    assert "1 of 2 stayed as they were, since no ridge lowered their error." in text
    assert "| 0.01 % |" in text
    assert "reconstruction-2" not in {path.stem for path in files.figures}


@pytest.mark.usefixtures("undrawn")
def test_where_nothing_was_refitted_there_is_no_section(tmp_path: Path) -> None:
    write_example(tmp_path)
    put(tmp_path / "model 0", record([]))
    assert "Reconstruction" not in write_report(tmp_path).markdown.read_text()
    put(tmp_path / "model 0", record([{"attention": fit(0, 0, None), "mlp": fit(0, 0, None), "drift": 0}]))
    text = section(write_report(tmp_path).markdown.read_text())
    assert "2 of 2 projections had nothing to make up for" in text
    assert "ridges of" not in text


def test_a_damaged_record_stops_the_report_of_its_own_model(refitted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(refitted, tmp_path / "out"))
    (out / "amprune" / "reconstruction.json").write_text("{}")
    before = files_in(out)
    with pytest.raises(ReportError, match=r"records are damaged: .*reconstruction\.json: format is null"):
        write_report(out)
    assert files_in(out) == before
    write_example(tmp_path / "two")
    put(tmp_path / "two" / "model 0", {})
    assert all(subject.reconstruction is None for subject in read_inputs(tmp_path / "two").subjects)
    assert "Reconstruction" not in write_report(tmp_path / "two").markdown.read_text()


def test_the_figure_shows_both_errors_and_is_logarithmic_over_decades(tmp_path: Path) -> None:
    flat, steep = (read(tmp_path, made(spread=spread)) for spread in (2, 1000))
    for found, scale in ((flat, "linear"), (steep, "log")):
        panels = reconstruction_figure(found, colour="#0072b2").axes
        assert [axes.get_yscale() for axes in panels] == [scale] * 3
        assert [len(axes.lines) for axes in panels] == [2, 2, 1]
        values = np.array(panels[1].lines[0].get_ydata(), dtype=float)
        assert np.allclose(values, [100 * layer.mlp.held_out_before for layer in found.layers])
        first = float(np.array(panels[0].lines[0].get_ydata(), dtype=float)[0])
        assert first == 0 if scale == "linear" else np.isnan(first)


@pytest.mark.process
@pytest.mark.parametrize("count", [2, 30, 126])
@pytest.mark.usefixtures("without_png")
def test_a_browser_shows_it_whole(count: int, tmp_path: Path) -> None:
    if count == 30:
        write_example(tmp_path)
        put(tmp_path / "model 0", made())
        put(tmp_path / "model 1", made(spread=1e4))
        check_in_browser(write_report(tmp_path).html)
    figure = reconstruction_figure(read(tmp_path, made(count, spread=30)), colour="#0072b2")
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert not any(figure.legends[0].get_window_extent().overlaps(box) for box in boxes)
