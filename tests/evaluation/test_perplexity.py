"""Perplexity, held to a plain loop over `model(...).loss`."""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_evaluation import text_file, tiny_model
from tiny_tokenizer import make_tokenizer
from transformers import PreTrainedModel

from amprune.errors import EvaluationError
from amprune.evaluation.data import Text, load_text
from amprune.evaluation.measurement import Loaded, nan_refused
from amprune.evaluation.perplexity import measure_perplexity
from amprune.evaluation.records import Record
from amprune.running import Progress, no_progress
from amprune.settings import EvaluationSettings


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return load_text(text_file(tmp_path_factory.mktemp("text") / "my.txt"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def measured(
    model: PreTrainedModel, text: Text, length: int = 48, limit: int | None = None, progress: Progress = no_progress
) -> Record:
    given, asked = Loaded(model, make_tokenizer(), progress=progress), EvaluationSettings
    (found,) = measure_perplexity(given, text=text, asked=asked(sequence_length=length, windows=limit))
    return found


def counted(record: Record) -> tuple[int, int]:
    """Returns the tokens of the text, and how many of them were predicted."""
    assert record.data is not None
    return record.data["tokens"], record.data["predicted"]


def plain_losses(model: PreTrainedModel, text: Text, length: int) -> list[float]:
    ids = make_tokenizer()(text.content, return_tensors="pt")["input_ids"]
    losses = []
    for start in range(0, ids.shape[1] - length + 1, length):
        window = ids[:, start : start + length]
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    return losses


@contextmanager
def memory_for(model: PreTrainedModel, sequences: int) -> Iterator[list[int]]:
    """Lets a model run out of memory with more sequences at a time; yields the batches that it was given."""
    batches: list[int] = []

    def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        batches.append(len(options["input_ids"] if "input_ids" in options else inputs[0]))
        if batches[-1] > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


@pytest.mark.parametrize("length", [48, 700], ids=["short", "longer than a chunk"])
def test_it_is_exp_of_the_mean_loss_of_whole_windows(length: int, model: PreTrainedModel, text: Text) -> None:
    found, expected = measured(model, text, length), plain_losses(model, text, length)
    assert found.items == pytest.approx(expected, rel=1e-5)
    assert found.value == pytest.approx(math.exp(statistics.fmean(expected)), rel=1e-5)
    tokens, predicted = counted(found)
    assert tokens == len(make_tokenizer()(text.content)["input_ids"])
    assert tokens % length  # the last window is a part of one
    assert len(found.items) == found.n == tokens // length
    assert predicted == len(found.items) * (length - 1)


def test_the_standard_error_is_by_the_delta_method(model: PreTrainedModel, text: Text) -> None:
    found = measured(model, text)
    expected = found.value * statistics.stdev(found.items) / math.sqrt(len(found.items))
    assert found.standard_error == pytest.approx(expected)
    assert measured(model, text, limit=1).standard_error is None


def test_a_limit_takes_the_first_windows(model: PreTrainedModel, text: Text) -> None:
    found, whole = measured(model, text, limit=3), measured(model, text)
    assert found.items == whole.items[:3]
    assert counted(found)[0] == counted(whole)[0]
    assert found.items_hash != whole.items_hash
    assert measured(model, text, limit=10_000).items == whole.items


def test_the_loss_of_bfloat16_logits_is_taken_in_float32(text: Text) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    window = make_tokenizer()(text.content, return_tensors="pt")["input_ids"][:, :48]
    with torch.no_grad():
        logits = model(window).logits[0, :-1]
    losses = {
        dtype: float(torch.nn.functional.cross_entropy(logits.to(dtype), window[0, 1:]))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert logits.dtype == torch.bfloat16
    assert measured(model, text).items[0] == pytest.approx(losses[torch.float32], rel=1e-6)
    assert losses[torch.bfloat16] != pytest.approx(losses[torch.float32], rel=1e-4)


def test_special_tokens_stand_once_before_the_text(model: PreTrainedModel, text: Text) -> None:
    seen: list[list[int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, inputs, options: seen.extend(options["input_ids"].tolist()), with_kwargs=True
    )
    measured(model, text, limit=4)
    handle.remove()
    assert [window.count(model.config.bos_token_id) for window in seen] == [1, 0, 0, 0]
    assert seen[0][0] == model.config.bos_token_id


def test_a_text_shorter_than_a_window(model: PreTrainedModel) -> None:
    short = Text("short.txt", "The quick brown fox.", "")
    with pytest.raises(EvaluationError, match=r"short\.txt has \d+ tokens, fewer than one window of 48"):
        measured(model, short)


def test_a_window_longer_than_the_positions(model: PreTrainedModel, text: Text) -> None:
    with pytest.raises(EvaluationError, match="1,025 tokens do not fit the model's 1,024 positions"):
        measured(model, text, 1025)


@pytest.mark.parametrize(("options", "message"), [({"length": 1}, "length is 1"), ({"limit": 0}, "windows is 0")])
def test_lengths_that_are_none(options: dict[str, int], message: str, model: PreTrainedModel, text: Text) -> None:
    with pytest.raises(EvaluationError, match=message):
        measured(model, text, **options)


def test_a_tokenizer_of_another_model(model: PreTrainedModel, text: Text) -> None:
    given, other = Loaded(model, make_tokenizer(200)), Text("my.txt", "Red, green and blue. " * 20, "")
    with pytest.raises(EvaluationError, match=r"gives the token id 1[6-9].*, the model embeds 160 ids"):
        measure_perplexity(given, text=other, asked=EvaluationSettings(sequence_length=32))


def test_memory_too_small_for_one_window(model: PreTrainedModel, text: Text) -> None:
    with memory_for(model, 0), pytest.raises(EvaluationError, match=r"my\.txt: memory runs out at a batch of one"):
        measured(model, text)


def test_any_other_error_passes_through(model: PreTrainedModel, text: Text) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        measured(model, text)
    handle.remove()


def damaged(value: float, rows: Sequence[int]) -> PreTrainedModel:
    model: Any = tiny_model("phi-mha")  # whose language-model head has a bias
    with torch.no_grad():
        model.lm_head.bias[list(rows)] = value
    return model  # type: ignore[no-any-return]


def test_logits_that_are_nan_are_refused(text: Text) -> None:
    model = damaged(math.nan, [5])
    with nan_refused(model, "broken"), pytest.raises(EvaluationError, match=r"broken gives logits that are NaN in"):
        measured(model, text)
    with pytest.raises(EvaluationError, match="mean loss is nan"):
        measured(model, text)  # outside, nobody watches the logits


def test_ids_that_a_model_masks_are_no_damage(text: Text) -> None:
    model = damaged(-math.inf, [0])
    assert 0 not in make_tokenizer()(text.content)["input_ids"]
    with nan_refused(model, "masking"):
        assert math.isfinite(measured(model, text).value)


@pytest.mark.parametrize("bias", [-math.inf, -1e6])
def test_a_loss_that_has_no_perplexity_is_refused(bias: float, text: Text) -> None:
    ids = set(make_tokenizer()(text.content)["input_ids"])
    with pytest.raises(EvaluationError, match=r"my\.txt: the mean loss is (inf|[0-9.e+]+) nats a token"):
        measured(damaged(bias, sorted(ids)[:-1]), text)


def test_progress_counts_windows(model: PreTrainedModel, text: Text) -> None:
    told: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Any]:
        told.append((description, total, []))
        yield told[-1][2].append

    found = measured(model, text, progress=progress)
    (description, total, steps) = told[0]
    assert description == "my.txt"
    assert total == len(found.items) == sum(steps)


def test_the_name_of_the_file_is_the_name_of_the_text(tmp_path: Path) -> None:
    assert load_text(text_file(tmp_path / "a b.txt")).name == "a b.txt"
