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
from amprune.evaluation.records import Evaluation, Record
from amprune.running import Progress, no_progress
from amprune.settings import EvaluationSettings

BOS_ID = 1


class Slow:
    """A tokenizer that does not know where in the text its tokens lie."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self._tokenizer(*arguments, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return load_text(text_file(tmp_path_factory.mktemp("text") / "my.txt"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def measured(
    model: PreTrainedModel,
    text: Text,
    length: int = 48,
    limit: int | None = None,
    start: Any = "each",
    progress: Progress = no_progress,
) -> Record:
    given, asked = Loaded(model, make_tokenizer(), progress=progress), EvaluationSettings
    settings = asked(sequence_length=length, windows=limit, start_token=start)
    return measure_perplexity(given, text=text, asked=settings)[0]


def counted(record: Record) -> tuple[int, int]:
    """Returns the tokens of the text, and how many of them were predicted."""
    assert record.data is not None
    return record.data["tokens"], record.data["predicted"]


def plain_windows(text: Text, length: int, start: str) -> list[list[int]]:
    ids = make_tokenizer()(text.content, add_special_tokens=start == "first")["input_ids"]
    step, before = (length - 1, [BOS_ID]) if start == "each" else (length, [])
    return [before + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]


def plain_losses(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[float]:
    with torch.no_grad():
        return [float(model(one, labels=one).loss) for one in map(torch.tensor, ([window] for window in windows))]


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


@pytest.mark.parametrize("start", ["each", "first", "none"])
@pytest.mark.parametrize("length", [48, 700], ids=["short", "longer than a chunk"])
def test_it_is_exp_of_the_mean_loss_of_whole_windows(
    length: int, start: str, model: PreTrainedModel, text: Text
) -> None:
    found = measured(model, text, length, start=start)
    expected = plain_losses(model, windows := plain_windows(text, length, start))
    assert found.items == pytest.approx(expected, rel=1e-5)
    assert found.value == pytest.approx(math.exp(statistics.fmean(expected)), rel=1e-5)
    assert found.settings["start_token"] == start
    tokens, predicted = counted(found)
    assert tokens == len(make_tokenizer()(text.content, add_special_tokens=start == "first")["input_ids"])
    assert tokens % (length - (start == "each"))  # the last window is a part of one
    assert len(found.items) == found.n == len(windows)
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


@pytest.mark.parametrize(("start", "counts"), [("each", [1, 1, 1, 1]), ("first", [1, 0, 0, 0]), ("none", [0, 0, 0, 0])])
def test_windows_begin_with_the_start_token(start: str, counts: list[int], model: PreTrainedModel, text: Text) -> None:
    seen: list[list[int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, inputs, options: seen.extend(options["input_ids"].tolist()), with_kwargs=True
    )
    measured(model, text, limit=4, start=start)
    handle.remove()
    assert [window.count(BOS_ID) for window in seen] == counts
    assert [window[0] == BOS_ID for window in seen] == [count == 1 for count in counts]
    assert {len(window) for window in seen} == {48}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("start", ["each", "first", "none"])
def test_bits_per_byte(start: Any, fast: bool, model: PreTrainedModel, text: Text) -> None:
    tokenizer: Any = make_tokenizer()
    given = Loaded(model, tokenizer if fast else Slow(tokenizer))
    settings = EvaluationSettings(sequence_length=48, start_token=start)
    perplexity, found = measure_perplexity(given, text=text, asked=settings)
    rows = plain_windows(text, 48, start)
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)  # all but the first token are predicted
    bits = math.log2(perplexity.value) * len(rows) * 47
    assert (found.measurement, found.unit, found.n) == ("bits_per_byte", "bits/byte", len(rows))
    assert found.value == pytest.approx(bits / size, rel=0.02)  # a space before a window's first token is its own
    if fast and start == "each":  # what is predicted is the text itself
        offsets = tokenizer(text.content, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        whole = len(text.content[: offsets[len(rows) * 47 - 1][1]].encode())
        assert found.value == pytest.approx(bits / whole, rel=1e-9)
        assert found.data is not None
        assert found.data["bytes"] == whole
    assert found.standard_error is not None
    assert 0 < found.standard_error < found.value


def test_figures_from_before_there_was_a_choice_have_one_start_token(tmp_path: Path) -> None:
    earlier = Evaluation.load(Path(__file__).parents[1] / "data" / "evaluation-format-1.json")
    assert {one.settings["start_token"] for one in earlier.records.values() if one.measurement == "perplexity"} == {
        "first"
    }


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
