"""What evaluate measures on SmolLM2-135M and on the real data."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tiny_evaluation import DATA_DIR, needs_data
from transformers import PreTrainedModel

from amprune.evaluation.data import load_text, load_wikitext
from amprune.evaluation.measurement import Loaded
from amprune.evaluation.perplexity import measure_perplexity
from amprune.evaluation.size import measure_size
from amprune.evaluation.zero_shot import measure_zero_shot, open_tasks
from amprune.model.loading import computing_dtype, load_tokenizer, loaded_model
from amprune.model.reader import read_checkpoint
from amprune.model.source import open_source
from amprune.settings import Compute, EvaluationSettings

pytestmark = [pytest.mark.real_model, needs_data]


@pytest.fixture(scope="module")
def folder() -> Path:
    return open_source("smollm2-135m").folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[PreTrainedModel]:
    with loaded_model(folder) as found:
        yield found


@pytest.fixture(scope="module")
def computing(folder: Path) -> Iterator[PreTrainedModel]:
    """The same weights in a dtype that this processor need not emulate."""
    dtype = computing_dtype(read_checkpoint(folder), Compute(device="cpu"))
    with loaded_model(folder, dtype=str(dtype).removeprefix("torch.")) as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def test_wikitext_has_the_tokens_of_the_hubs(tokenizer: Any) -> None:
    """The raw file has fewer: it is not what perplexities are reported on."""
    texts = load_wikitext("test", data_dir=DATA_DIR), load_text(DATA_DIR / "wikitext2" / "wiki.test.raw")
    counts = [len(tokenizer(text.content, verbose=False)["input_ids"]) for text in texts]
    assert counts == [304_986, 303_415]


def test_perplexity_of_the_first_windows(computing: PreTrainedModel, tokenizer: Any) -> None:
    text, length = load_text(DATA_DIR / "wikitext2" / "wiki.test.raw"), 1024
    text_ids = tokenizer(text.content[:40_000], return_tensors="pt", verbose=False)["input_ids"][0]
    windows = text_ids[: 3 * length].reshape(3, length)
    losses = []
    for window in windows:
        with torch.no_grad():
            losses.append(float(computing(window[None], labels=window[None]).loss))
    asked = EvaluationSettings(sequence_length=length, windows=3)
    found, per_byte = measure_perplexity(Loaded(computing, tokenizer), text=text, asked=asked)
    assert found.items == pytest.approx(losses, rel=1e-4)
    assert found.value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)
    assert 15 < found.value < 35
    words = tokenizer.decode(windows[:, 1:].flatten())  # of English some four letters a token
    size = found.data["bytes"]
    assert size == pytest.approx(len(words.encode()), rel=0.01)
    assert per_byte.value == pytest.approx(sum(losses) * (length - 1) / math.log(2) / size, rel=1e-4)


def test_accuracies_are_those_of_the_harness(computing: PreTrainedModel, tokenizer: Any) -> None:
    (task,) = open_tasks(["piqa"], data_dir=DATA_DIR)
    asked = EvaluationSettings(limit=8, batch_size=4)
    found = measure_zero_shot(Loaded(computing, tokenizer), task=task, asked=asked)
    language_model: Any = HFLM(pretrained=computing, tokenizer=tokenizer, batch_size=4, softmax_dtype=torch.float32)
    expected = simple_evaluate(language_model, tasks=["piqa"], task_manager=task.manager, limit=8)
    assert expected is not None
    for accuracy in found:
        samples = expected["samples"]["piqa"]
        assert list(accuracy.items) == [sample[accuracy.metric] for sample in samples]
        assert accuracy.value == expected["results"]["piqa"][f"{accuracy.metric},none"]
    assert max(accuracy.value for accuracy in found) > 0.5


def test_sizes_of_smollm2(model: PreTrainedModel) -> None:
    found = measure_size(model)
    assert model.dtype == torch.bfloat16
    assert found.parameters == 134_515_008
    assert found.weight_bytes == 2 * found.parameters
    assert found.weight_bytes_per_token == found.weight_bytes  # the language-model head shares the only table
    assert found.kv_cache_bytes_per_token == 2 * 30 * 3 * 64 * 2
    projections = 576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536
    attention = 2 * 9 * 64 * 64  # against 64 keys and values
    assert found.macs_per_token == 30 * (projections + attention) + 576 * 49_152
