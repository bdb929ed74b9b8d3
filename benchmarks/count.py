"""What the source of amprune is made of: lines, files, options written again, functions called once.

`python benchmarks/count.py [FOLDER]` counts src/amprune, or that of another version, such as the one before the rooms:
`mkdir before && git archive f4ce3b7 src | tar -x -C before && python benchmarks/count.py before/src/amprune`.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

OPTIONS = re.findall(
    r"\w+",
    "ratio target preset criterion allocate reconstruct order only heads_mode heads_ratio neurons_ratio "
    "neuron_multiple head_multiple tensor_parallel protect_first protect_last bias_compensation calibration "
    "samples tokens max_length prompts_only seed device dtype device_map batch_tokens max_shard_size overwrite "
    "revision trust_remote_code",
)
"""Those of `amprune prune`, its two paths aside."""

SOURCE = Path(sys.argv[1] if len(sys.argv) > 1 else "src/amprune")
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
NODES = {path: list(ast.walk(ast.parse(text))) for path, text in TEXTS.items()}
FUNCTIONS = [(path, one) for path, nodes in NODES.items() for one in nodes if isinstance(one, ast.FunctionDef)]
LENGTHS = [len(text.splitlines()) for text in TEXTS.values()]


def parameters(function: ast.FunctionDef) -> list[str]:
    """Returns the names in its signature."""
    named = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [one.arg for one in named if one.arg not in ("self", "cls")]


def public_names() -> set[str]:
    """Returns what `__init__.pyi` imports, or the strings of `__init__.py`, `__all__` among them."""
    stub = SOURCE / "__init__.pyi"
    if stub.is_file():
        imports = [one for one in ast.walk(ast.parse(stub.read_text())) if isinstance(one, ast.ImportFrom)]
        return {alias.name for one in imports for alias in one.names}
    return {str(one.value) for one in NODES[SOURCE / "__init__.py"] if isinstance(one, ast.Constant)}


def raises_lines() -> tuple[int, int]:
    """Returns the lines of all `Raises:` sections (with the empty one before), and those on internals."""
    public, every, internal = public_names(), 0, 0
    for nodes in NODES.values():
        held = {id(part): one.name for one in nodes if isinstance(one, ast.ClassDef) for part in one.body}
        for one in nodes:
            if isinstance(one, ast.FunctionDef | ast.ClassDef) and "Raises:" in (ast.get_docstring(one) or ""):
                section = (ast.get_docstring(one) or "").split("Raises:")[1].split("\n\n")[0]
                lines = 2 + sum(bool(line.strip()) for line in section.splitlines())
                every += lines
                internal += 0 if {one.name, held.get(id(one))} & public else lines
    return every, internal


def called_once() -> int:
    """Returns how many private functions of a module are named once in it."""
    named = {path: Counter(one.id for one in nodes if isinstance(one, ast.Name)) for path, nodes in NODES.items()}
    inner = {
        id(part) for nodes in NODES.values() for one in nodes if isinstance(one, ast.ClassDef) for part in one.body
    }
    return sum(
        one.name.startswith("_") and id(one) not in inner and named[path][one.name] == 1 for path, one in FUNCTIONS
    )


def files_with(pattern: str) -> int:
    """Returns how many files hold it."""
    return sum(re.search(pattern, text) is not None for text in TEXTS.values())


slots = Counter(name for _, function in FUNCTIONS for name in parameters(function))
passes = Counter(one.arg for nodes in NODES.values() for one in nodes if isinstance(one, ast.keyword) and one.arg)
widest = sorted(((len(parameters(one)), one.name, str(path.relative_to(SOURCE))) for path, one in FUNCTIONS))[::-1]
every, internal = raises_lines()
print(f"lines                                  {sum(LENGTHS):,}")
print(f"files                                  {len(LENGTHS)}")
print(f"files under 100 lines                  {sum(length < 100 for length in LENGTHS)}")
print(f"entries at the top level               {len([one for one in SOURCE.iterdir() if one.name != '__pycache__'])}")
print(f"signature slots of {len(OPTIONS)} options          {sum(slots[name] for name in OPTIONS)}")
print(f"keyword passes of them                 {sum(passes[name] for name in OPTIONS)}")
print(f"signatures of more than 8 parameters   {sum(width > 8 for width, *_ in widest)}")
print(f"widest signature                       {widest[0][0]}  ({widest[0][1]}, {widest[0][2]})")
print(f"private functions used once            {called_once()}")
print(f"files that read JSON                   {files_with(r'json[.]loads?[(]')}")
print(f"files that rename what they wrote      {files_with(r'(partial|out[.]name)[)]?[.](replace|rename)[(]')}")
print(f"lines of Raises sections               {every}, {internal} of them on internals")
