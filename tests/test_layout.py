"""The shape of the package: import order, sizes, public names, links of the documents."""

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import amprune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "amprune"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# A module imports only from those above it.
ORDER = [*re.findall(r"^\| `(\w+)/?` \|", ARCHITECTURE, flags=re.MULTILINE), "__main__"]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("amprune."):
            names.add(node.module.split(".")[1])
    return names


def test_a_module_imports_only_from_those_above_it() -> None:
    below = {
        str(path.relative_to(PACKAGE)): sorted(imported(path) - set(ORDER[: ORDER.index(home(path)) + 1]))
        for path in MODULES
    }
    assert {path: names for path, names in below.items() if names} == {}


def test_functions_stay_short() -> None:
    long = []
    for path in MODULES:
        if home(path) in ("cli", "pipeline", "stages"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "evaluate":
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (node.end_lineno or 0) - body[0].lineno >= 50:
                    long.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert long == []


def test_the_list_of_rooms_is_whole() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert sorted(ORDER) == sorted(rooms - {"__init__"})


@pytest.mark.process
def test_importing_the_pipeline_loads_only_what_pruning_needs() -> None:
    heavy = (
        "matplotlib lm_eval codecarbon torchao bitsandbytes peft datasets scipy gguf pandas sklearn pyarrow "
        "torch._dynamo torch._inductor transformers.modeling_utils"
    )
    code = f"import sys, amprune.pipeline; print(*sorted(set({heavy.split()}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in amprune.__all__:
        assert getattr(amprune, name).__doc__
    assert len(amprune.__all__) == 52
    with pytest.raises(AttributeError, match="nonsense"):
        amprune.nonsense  # noqa: B018


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda p: p.name)
def test_links_of_the_documents_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_what_the_page_on_the_method_calls_by_name_is_in_the_code() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    names = set(re.findall(rf"`((?:{'|'.join(ORDER)})(?:\.\w+)+)`", page)) - {"plan.json"}
    assert len(names) > 15
    for name in sorted(names):  # of a field its class, which may give it no default
        pkgutil.resolve_name("amprune." + re.sub(r"(\.[A-Z]\w*)\.\w+$", r"\1", name))


def test_links_are_followed_by_one_function_alone() -> None:
    """`Path.resolve` raises what is no error of ours where links lead in a circle."""
    offenders = [path for path in MODULES if ".resolve()" in path.read_text(encoding="utf-8")]
    assert offenders == []
