"""What the plain installation can do, and what it says of the rest: run with nothing else within reach."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer

from amprune.errors import EXTRAS, MissingDependencyError, required

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "amprune"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Which extras the modules of a room may import from; the other rooms do with what is always there.
ROOMS = {
    "evaluation": {"evaluate"},
    "experiments": {"report"},
    "model": {"gguf"},
    "recovery": {"recover"},
    "report": {"report"},
    "serve": {"gguf", "quantize"},
}
# Which import them with the module and not on use: these draw, and the last is a program of its own.
WHOLE = ("experiments/", "report/", "serve/gguf/quantise.py")
# What no module imports: tokenizers, chat templates and the reader of parquet need them.
UNSEEN = {"protobuf", "sentencepiece"}
# xllamacpp comes with llama.cpp's tools, and markupsafe with jinja2.
ELSEWHERE = {"markupsafe": "jinja2", "xllamacpp": None}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(line).name.lower().replace("_", "-") for line in requirements}


DISTRIBUTIONS = packages_distributions()
BASE = names(PROJECT["dependencies"])
BROUGHT = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields what a file imports from other packages, and whether with itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            for name in (one.partition(".")[0] for one in found):
                if name not in sys.stdlib_module_names and name != "amprune":
                    yield name, id(node) in at_once


def distribution_of(module: str) -> str | None:
    if module in ELSEWHERE:
        return ELSEWHERE[module]
    return DISTRIBUTIONS[module][0].lower().replace("_", "-")


def test_the_extras_are_declared_as_the_errors_know_them() -> None:
    for extra, modules in EXTRAS.items():
        assert {distribution_of(module) for module in modules} == BROUGHT[extra]
    assert PROJECT["optional-dependencies"]["all"] == [f"amprune[{','.join(sorted(EXTRAS))}]"]
    assert set(BROUGHT) == {*EXTRAS, "all", "dev"}


def test_what_every_room_imports_is_declared() -> None:
    wrong, used = [], set()
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        room = where.partition("/")[0].removesuffix(".py")
        allowed = set().union(*(BROUGHT[extra] for extra in ROOMS.get(room, ())))
        for module, at_once in imports(path):
            if (name := distribution_of(module)) is None:
                continue
            used.add(name)
            if name not in BASE and (name not in allowed or (at_once and not where.startswith(WHOLE))):
                wrong.append((where, module))
    assert not wrong
    assert used == BASE.union(*(BROUGHT[extra] for extra in EXTRAS)) - UNSEEN


def test_all_that_is_missing_is_named_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "matplotlib", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError) as error:
        required("run", "peft", "matplotlib", "torch", "nonsense")
    assert str(error.value) == (
        "run needs peft and matplotlib, which are not installed here: `pip install 'amprune[recover,report]'`"
    )
    required("pruning", "torch", "nonsense")


def closure(requirements: list[str]) -> set[str]:
    """Returns the distributions that pip would install for requirements."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        one = waiting.pop()
        key = f"{one.name.lower()}[{','.join(sorted(one.extras))}]"
        if key in found or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(key)
        try:
            lines = distribution(one.name).requires or []
        except PackageNotFoundError:
            continue  # for another platform
        for line in map(Requirement, lines):
            wanted = [{"extra": extra} for extra in (*one.extras, "")]
            if line.marker is None or any(line.marker.evaluate(environment) for environment in wanted):
                line.marker = None
                waiting.append(line)
    return {key.partition("[")[0] for key in found}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds what `pip install amprune` brings, and nothing else."""
    folder = tmp_path_factory.mktemp("plain")
    for name in closure(PROJECT["dependencies"]):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    assert (folder / "torch").exists()
    assert not any((folder / module).exists() for modules in EXTRAS.values() for module in modules)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT / "src")))}


RUN = """
import json, sys
from typer.testing import CliRunner
from amprune.cli.options import app
import amprune.cli
results = [CliRunner().invoke(app, command) for command in json.loads(sys.argv[1])]
print(json.dumps([(one.exit_code, one.output) for one in results]))
"""


def run(environment: dict[str, str], *commands: str, folder: Path) -> list[tuple[int, str]]:
    arguments = json.dumps([command.split() for command in commands])
    # -S leaves the folder of this environment's packages out.
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN, arguments], env=environment, cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return [(code, " ".join(output.split())) for code, output in found]


@pytest.mark.process
def test_the_plain_installation_prunes(plain: dict[str, str], tmp_path: Path) -> None:
    make_model(find("llama-gqa")).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    quick = "--calibration builtin --samples 8"
    commands = (
        "inspect dense",
        f"score dense -o scores.safetensors --preset paper {quick}",
        "plan scores.safetensors --ratio 0.2 -o plan.json --preset paper",
        "apply dense plan.json applied",
        f"prune dense pruned --ratio 0.2 {quick}",
        "verify pruned --dense dense",
        f"prune dense other --ratio 0.1 --criterion taylor {quick}",
        "push pruned owner/name --dry-run",
        "recover --help",
    )
    for command, (code, output) in zip(commands, run(plain, *commands, folder=tmp_path), strict=True):
        assert code == 0, (command, output)


MISSING = {
    "recover nobody/model out": ("LoRA needs peft", "recover"),
    "recover nobody/model out --full --evaluate-each-epoch": (
        "--evaluate-each-epoch needs lm-eval and scipy", "evaluate",
    ),
    "run nobody/model out": ("run needs matplotlib", "report"),
    "run nobody/model out --recover --evaluate --measure energy": (
        "run needs codecarbon and peft and matplotlib", "evaluate,recover,report",
    ),
    "evaluate nobody/model -o out": ("measuring needs codecarbon and lm-eval and scipy", "evaluate"),
    "evaluate nobody/model -o out --measure zero_shot": ("measuring needs lm-eval and scipy", "evaluate"),
    "report nowhere": ("amprune.write_report needs matplotlib", "report"),
    "experiment table1 --model nobody/model -o out": ("amprune.experiment needs matplotlib", "report"),
    "quantize nobody/model out": ("type int8 needs torchao", "quantize"),
    "quantize nobody/model out --type int4": ("type int4 needs bitsandbytes", "quantize"),
    "export nobody/model out.gguf": ("export needs gguf", "gguf"),
    "prune model.gguf out": ("model.gguf, a GGUF file, needs gguf", "gguf"),
    "evaluate model.gguf -o out --measure latency": ("model.gguf, a GGUF file, needs gguf", "gguf"),
}  # fmt: skip


# These need none of it, and go as far as the model that is not there.
FREE = (
    "recover nobody/model out --full",
    "evaluate nobody/model -o out --measure perplexity,latency --text text",
)


@pytest.mark.process
def test_a_command_that_lacks_its_extra_says_what_to_type_before_anything_is_done(
    plain: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, and nothing of it is read")
    (tmp_path / "text").write_text("A text.")
    results = run(plain, *MISSING, *FREE, folder=tmp_path)
    for (command, (words, extras)), (code, output) in zip(MISSING.items(), results, strict=False):
        verb = "are" if " and " in words else "is"
        expected = f"amprune: {words}, which {verb} not installed here: `pip install 'amprune[{extras}]'`"
        assert output == expected, command
        assert code == 1
    for code, output in results[len(MISSING) :]:
        assert code == 1
        assert "nobody/model" in output
        assert "pip install" not in output
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "text"}
