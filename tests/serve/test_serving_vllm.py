"""vLLM gives the tokens of transformers: a pruned tiny model of every family, dense and pruned SmolLM2-135M."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from serving_models import (
    PROMPTS,
    run_amprune,
    save_dense,
    save_pruned,
    servable,
    smollm2_folder,
    transformers_answers,
)
from serving_page import PRUNE_TO_SPLIT, row_of
from serving_vllm import BY_TRANSFORMERS, REFUSED_BY_VLLM, Question, vllm_answers, vllm_python
from tiny_models import NEURONS_ONLY, PRUNABLE_HEADS, Tiny
from transformers import AutoTokenizer

import amprune
from amprune.records import read_object

pytestmark = pytest.mark.serving

# Apertus' activation has constants that vLLM keeps in bfloat16.
TOLERANCES = {"apertus": 3e-2}
TOLERANCE = 1e-4
SPLIT = {"tensor_parallel_size": 2}


@dataclass(frozen=True)
class Case:
    """A tiny model, the share of its heads to prune or None for neurons alone, and options of vLLM."""

    tiny: Tiny
    heads_ratio: float | None
    options: Mapping[str, Any] = field(default_factory=dict)
    written_as: str | None = None

    @property
    def pruned(self) -> str:
        return "neurons" if self.heads_ratio is None else "heads and neurons"

    def __str__(self) -> str:
        words = (self.tiny.id, self.pruned.replace(" ", "-"), *self.options.values(), self.written_as)
        return "-".join(str(word) for word in words if word)


def _cases() -> list[Case]:
    with_heads = dict.fromkeys(tiny.model_type for tiny in PRUNABLE_HEADS)
    without = dict.fromkeys(tiny.model_type for tiny in NEURONS_ONLY if tiny.model_type not in with_heads)
    return [
        *(Case(servable(model_type), 0.34) for model_type in with_heads),
        *(Case(servable(model_type), None) for model_type in (*with_heads, *without)),
    ]


def _by_transformers(case: Case) -> bool:
    """Says whether vLLM runs the code of transformers, as asked or as the page says of the model type."""
    return case.options == BY_TRANSFORMERS or row_of(case.tiny.model_type).computed_by == "transformers in vLLM"


def _refused(case: Case) -> bool:
    return (case.tiny.model_type, case.pruned) in REFUSED_BY_VLLM


ODD_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6}
SERVED = [
    *(case for case in _cases() if not _refused(case)),
    Case(servable("llama", "mha", **ODD_HEADS), 0.17, written_as="mistral"),
    Case(servable("llama", "biases", **ODD_HEADS), 0.17, written_as="granite"),
    Case(servable("qwen2"), 0.34, BY_TRANSFORMERS),
    Case(servable("ernie4_5", "biases"), 0.34, BY_TRANSFORMERS),
    Case(servable("stablelm", "biases"), None, BY_TRANSFORMERS),
]
REFUSED = [case for case in _cases() if _refused(case)]


@dataclass(frozen=True)
class Served:
    """A checkpoint and what vLLM answers with it."""

    folder: Path
    found: dict[str, Any]


def _wanted(request: pytest.FixtureRequest) -> dict[str, Case]:
    """Lists the cases that are going to be tested: all of them, or those that were selected."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return {str(found["case"]): found["case"] for found in parameters if isinstance(found.get("case"), Case)}


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """The checkpoint of every case, and what vLLM answers with it."""
    vllm_python()
    place, questions = tmp_path_factory.mktemp("families"), {}
    for name, case in _wanted(request).items():
        dense = save_dense(case.tiny, place / f"{name}-dense")
        folder = save_pruned(dense, place / name, heads_ratio=case.heads_ratio)
        questions[name] = Question(folder, PROMPTS, case.options)
    found = vllm_answers(list(questions.values()), place)
    return {name: Served(questions[name].folder, answer) for name, answer in zip(questions, found, strict=True)}


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_a_pruned_model_gives_the_tokens_of_transformers(case: Case, served: dict[str, Served]) -> None:
    folder, found = served[str(case)].folder, served[str(case)].found
    assert found.get("error") is None
    assert_same(found, folder, PROMPTS, tolerance=TOLERANCES.get(case.tiny.model_type, TOLERANCE))
    assert len({token for answer in found["tokens"] for token in answer}) >= 6
    assert found["implementation"].startswith("Transformers") == _by_transformers(case)
    assert case.written_as in (None, read_object(folder / "config.json")["model_type"])


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_vllm_cannot_compute_it_does_not_load(case: Case, served: dict[str, Served]) -> None:
    assert re.search(REFUSED_BY_VLLM[case.tiny.model_type, case.pruned], served[str(case)].found["error"])


def assert_same(found: dict[str, Any], folder: Path, prompts: list[list[int]], *, tolerance: float) -> None:
    """Compares what vLLM answers to every prompt with what transformers answers."""
    expected = transformers_answers(folder, prompts)
    assert found["tokens"] == expected.tokens
    for logprobs, others in zip(found["logprobs"], expected.logprobs, strict=True):
        assert logprobs == pytest.approx(others, abs=tolerance)


TEXTS = ("The capital of France is", "Water boils at", "def fibonacci(n):\n", "Once upon a time, in a small village,")
QUICK: dict[str, Any] = {"preset": "paper", "calibration": "builtin", "samples": 8}
SMOLLM2 = ["dense", "heads and neurons", "neurons"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """SmolLM2-135M, dense and pruned, and what vLLM answers with each, in one process and split over two."""
    vllm_python()
    place, dense = tmp_path_factory.mktemp("smollm2"), smollm2_folder()
    folders = {
        "dense": dense,
        "heads and neurons": run_amprune(
            PRUNE_TO_SPLIT, place, *(f"--{name}={value}" for name, value in QUICK.items())
        ),
        "neurons": amprune.prune(dense, place / "neurons", ratio=0.2, only="neurons", **QUICK).folder,
    }
    questions = {name: Question(folder, smollm2_prompts()) for name, folder in folders.items()}
    questions |= {f"{name}, split": replace(question, options=SPLIT) for name, question in questions.items()}
    found = vllm_answers(list(questions.values()), place)
    return {name: Served(questions[name].folder, answer) for name, answer in zip(questions, found, strict=True)}


def smollm2_prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2_gives_the_tokens_of_transformers(name: str, smollm2: dict[str, Served]) -> None:
    assert smollm2[name].found.get("error") is None
    assert_same(smollm2[name].found, smollm2[name].folder, smollm2_prompts(), tolerance=1e-3)


def test_the_pruned_models_answer_otherwise_than_the_dense_one(smollm2: dict[str, Served]) -> None:
    dense, *pruned = (smollm2[name].found["tokens"] for name in SMOLLM2)
    assert all(answers != dense for answers in pruned)


def test_a_model_is_split_over_two_processes_where_its_heads_can_be(smollm2: dict[str, Served]) -> None:
    """Nine query heads and three key-value heads cannot be shared by two."""
    config = read_object(smollm2["heads and neurons"].folder / "config.json")
    assert [config[n] for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size")] == [6, 2, 1216]
    whole, split = smollm2["heads and neurons"], smollm2["heads and neurons, split"]
    assert split.found.get("error") is None
    assert split.found["tokens"] == whole.found["tokens"]
    for name in ("dense", "neurons"):
        assert re.search(
            r"attention heads \(9\) must be divisible by tensor parallel size \(2\)",
            smollm2[f"{name}, split"].found["error"],
        )
