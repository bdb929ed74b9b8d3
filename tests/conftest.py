import gc
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side: threads of several processes that wait for each other cost far more than they gain.
os.environ["OMP_NUM_THREADS"] = "1"
# The user's cache is neither read nor filled; processes that tests start inherit this folder.
os.environ["AMPRUNE_CACHE"] = tempfile.mkdtemp(prefix="amprune-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["AMPRUNE_CACHE"], "datasets")
# llama.cpp's tools, where `make test` puts them.
os.environ.setdefault("AMPRUNE_LLAMA_CPP", str(Path(sys.prefix) / "llama.cpp"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that run the real model first: they take longest, and would run alone at the end."""
    long = {item.path for item in items if item.get_closest_marker("real_model")}
    items.sort(key=lambda item: item.path not in long)


def pytest_runtest_setup() -> None:
    """Leaves to garbage collection what a test makes alone: amprune collects often, and imports are many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a report's figures in tests of its words and files, where others draw the same ones."""
    for name in ("to_svg", "to_png"):
        monkeypatch.setattr(f"amprune.report.write.{name}", lambda _: b"not drawn")


def pytest_sessionfinish(session: pytest.Session) -> None:
    import shutil

    shutil.rmtree(os.environ["AMPRUNE_CACHE"], ignore_errors=True)
