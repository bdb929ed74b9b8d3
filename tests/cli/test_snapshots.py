"""What users see, held as text: every `--help`, the public names with their signatures, a report and its model card.

The texts lie in tests/snapshots. Where a change of them is meant, `pytest -m quick tests/cli/test_snapshots.py
--renew-snapshots` writes them anew, and the difference is reviewed as any other change of the commit.
"""

import difflib
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import amprune
from amprune.cli.options import app
from amprune.evaluation.identity import content_hash
from amprune.evaluation.records import Evaluation
from amprune.report.write import write_report

SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
EVALUATED = Path(__file__).parents[1] / "data" / "evaluated"
"""Records of a tiny pruned model and of its dense one, with made-up figures; the weights are a stand-in."""
COMMANDS = ["", *sorted(typer.main.get_group(app).commands)]
Held = Callable[[str, str], None]


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Held:
    """Compares a text with the snapshot of a name, or writes the snapshot where that is asked for."""

    def compare(name: str, found: str) -> None:
        file = SNAPSHOTS / name
        if request.config.getoption("renew_snapshots"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(found, encoding="utf-8")
        expected = file.read_text(encoding="utf-8") if file.is_file() else ""
        if found != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), found.splitlines(), f"tests/snapshots/{name}", "now", lineterm="", n=1
            )
            pytest.fail("\n".join([*lines, "if this is meant: pytest --renew-snapshots"]), pytrace=False)

    return compare


@pytest.mark.parametrize("command", COMMANDS, ids=lambda name: name or "amprune")
def test_help(command: str, held: Held) -> None:
    plain = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [*command.split(), "--help"], env=plain, terminal_width=100, prog_name="amprune")
    assert result.exit_code == 0, result.output
    held(f"help-{command or 'amprune'}.txt", result.stdout)


def test_there_is_no_help_of_a_command_that_is_gone() -> None:
    assert {path.name for path in SNAPSHOTS.glob("help-*")} == {f"help-{name or 'amprune'}.txt" for name in COMMANDS}


def test_public_names(held: Held) -> None:
    lines = [f"{name}{_signature(getattr(amprune, name))}" for name in sorted(amprune.__all__)]
    held("public-names.txt", "\n".join([*lines, ""]))


def _signature(found: object) -> str:
    """Returns one parameter a line, so that a change of one is a change of one line."""
    if not callable(found) or (isinstance(found, type) and issubclass(found, Exception)):
        return ""
    signature = inspect.signature(found)
    lines = "".join(f"\n    {parameter}," for parameter in signature.parameters.values())
    text = f"({lines}\n){str(signature.replace(parameters=[]))[2:]}"
    # Where a class lives and what its reader demands is no part of what users see; a function's default has an address.
    text = re.sub(r"Annotated\[([^\n]+?), Rule\(expected=[^\n]*?\)\]", r"\1", text)
    text = re.sub(
        r"\b(?:amprune|pathlib|collections\.abc|contextlib|typing|torch|transformers)(?:\.[a-z_]\w*)*\.", "", text
    )
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)


@pytest.mark.usefixtures("undrawn")
def test_report_and_model_card(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(EVALUATED, "mine"))
    evaluation = Evaluation.load(folder / "amprune" / "evaluation.json")
    assert evaluation.models["mine"].sha256 == content_hash(folder)
    files = write_report(folder)
    assert files.card is not None
    held("report.md", files.markdown.read_text(encoding="utf-8"))
    held("README.md", files.card.read_text(encoding="utf-8"))
