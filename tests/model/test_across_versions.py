"""What one supported transformers prunes, another loads: the oldest and the newest, both ways (`make test-oldest`)."""

import os
import subprocess
from pathlib import Path

import across_versions
import pytest
import transformers
from across_versions import NAMES, OLD_STYLE, recorded

from amprune.records import read_object

OTHER = os.environ.get("AMPRUNE_OTHER_PYTHON", "")
pytestmark = [
    pytest.mark.cross_version,
    pytest.mark.skipif(not OTHER, reason="AMPRUNE_OTHER_PYTHON names no interpreter with another transformers"),
]


def other(command: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([OTHER, across_versions.__file__, command, str(folder)], check=True, env=environment)


@pytest.fixture(scope="module")
def written_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    across_versions.prune(folder)
    other("read", folder)
    return folder


@pytest.fixture(scope="module")
def written_there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("there")
    other("prune", folder)
    across_versions.read(folder)
    return folder


@pytest.fixture(params=["written_here", "written_there"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_another_transformers_computes_the_same(name: str, folder: Path) -> None:
    written, writer = recorded(folder / name, "writer")
    found, reader = recorded(folder / name, "reader")
    assert transformers.__version__ in {writer["transformers"], reader["transformers"]}
    assert writer["transformers"] != reader["transformers"]
    assert (written - found).abs().max() < 1e-5 * written.std()
    assert reader["verified"]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("llama")])
def test_a_llama_stays_one_or_is_written_as_an_equivalent(name: str, folder: Path) -> None:
    assert read_object(folder / name / "pruned" / "config.json")["model_type"] == name.split("-as-")[-1]


@pytest.mark.parametrize("by", ["writer", "reader"])
def test_the_angles_of_a_config_of_transformers_4_are_read(by: str, folder: Path) -> None:
    assert recorded(folder / OLD_STYLE, by)[0].equal(recorded(folder / "llama-as-mistral", by)[0])
