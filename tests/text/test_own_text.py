"""Text that a model writes itself: how it begins and ends, what is dropped, and how its file is gone on with."""

import itertools
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tiny_models import ALL, Tiny, make_model
from tiny_recovery import TOKENIZER, save_tiny
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from amprune import CalibrationError, CheckpointError, RecoveryError, draw_calibration, load_calibration, write_text
from amprune.cli import app
from amprune.errors import AmpruneError
from amprune.model.reader import read_checkpoint
from amprune.model.source import cache_folder
from amprune.settings import Compute, RecoverySettings, with_preset
from amprune.text import own
from amprune.text.files import read_file
from amprune.text.own import is_loop, own_records
from amprune.text.records import read_records
from amprune.text.sampling import Openings, Row, find_openings, sample_batch, text_of
from amprune.text.sources import Amount
from amprune.text.training import load_training_data

BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
BATCH = {"batch_size": 4, "max_length": 60, "device": "cpu"}
PROSE = (
    "The river rises in the hills above the town and runs south for eighty miles before it meets the sea. In spring "
    "its meadows are under water, and the farmers move their cattle to the slopes; by June the grass is high again. "
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "cache"))
    return cache_folder() / "own-text"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# How texts are written.


class Watched:
    """A model that keeps the logits of every step."""

    def __init__(self, model: Any) -> None:
        self.model, self.logits = model, list[torch.Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **given: Any) -> Any:
        found = self.model(**given)
        self.logits.append(found.logits[:, -1].float())
        return found


@pytest.mark.parametrize("tiny", ALL, ids=lambda tiny: tiny.id)
def test_every_family_writes_from_what_it_would_say_without_a_cache(tiny: Tiny) -> None:
    watched = Watched(make_model(tiny))
    openings = Openings(BOS, (BOS, 5, 6, 7), (EOS, 8, 9), frozenset())
    rows = sample_batch(watched, openings, 3, 20, 1, lambda _: None)
    ids = torch.tensor([row.ids for row in rows])
    assert ids.shape == (3, 20)
    with torch.no_grad():
        whole = watched.model(input_ids=ids, use_cache=False).logits[:, :-1]
    assert (torch.stack(watched.logits, 1) - whole).abs().max() < 1e-4 * whole.std()
    ending = replace(openings, ends=frozenset(range(60, 100)))  # rows end, and are taken out of the cache
    assert len({len(row.ids) for row in sample_batch(watched.model, ending, 12, 20, 2, lambda _: None)}) > 3


class Rigged:
    """A model that says what it is told to, one list of tokens a row, over and over."""

    def __init__(self, *said: list[int], like: Any) -> None:
        self.said, self.like, self.step = [itertools.cycle(tokens) for tokens in said], like, 0
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((len(input_ids), 1, 160), -1e9)
        self.sizes.append(len(input_ids))
        for row, tokens in enumerate(self.said[: len(input_ids)]):
            logits[row, 0, next(tokens)] = 0.0
        return type("Out", (), {"logits": logits})()


def test_a_chat_goes_through_the_template_on_both_sides_of_the_user(model: Path) -> None:
    openings = find_openings(read_checkpoint(model), TOKENIZER, 60)
    asked = TOKENIZER("Red?", add_special_tokens=False)["input_ids"]
    answer = TOKENIZER("Blue.", add_special_tokens=False)["input_ids"]
    rest = len(openings.chat) - 1, len(openings.after) - 1
    said = [[9] * rest[0] + [*asked, EOS] + [9] * rest[1] + [*answer, EOS]]
    plain = [[9] * 200]
    rows = sample_batch(Rigged(*plain, *said, like=make_model(ALL[0])), openings, 2, 60, 0, lambda _: None)
    assert [row.kind for row in rows] == ["plain", "chat"]
    assert rows[1].ended
    text = text_of(rows[1], TOKENIZER, openings)["text"]
    shown = TOKENIZER.decode(TOKENIZER("<|user|>\n", add_special_tokens=False)["input_ids"])
    assert text.startswith(shown)
    assert "Red?" in text
    assert text.endswith("Blue.")
    assert text.index("Red?") < text.index("</s>") < text.index("assistant") < text.index("Blue.")
    assert rows[1].written == [*asked, *answer]


def test_reading_doubles_no_start_token_and_loses_none_of_the_others(model: Path) -> None:
    openings = find_openings(read_checkpoint(model), TOKENIZER, 60)
    row = Row("plain", [BOS, *TOKENIZER("A fox.", add_special_tokens=False)["input_ids"], EOS], [], False, ended=True)
    found = text_of(row, TOKENIZER, openings)
    (sample,) = load_calibration([found["text"]], TOKENIZER, samples=1).samples
    assert list(sample) == row.ids[:-1]
    assert found["tokens"] == len(sample)


def test_where_texts_begin_and_end(model: Path, tmp_path: Path) -> None:
    dense = read_checkpoint(model)
    assert find_openings(dense, TOKENIZER, 60).plain == BOS
    assert find_openings(dense, TOKENIZER, 60).ends == {BOS, EOS}
    assert find_openings(dense, make_tokenizer(chat_template=False), 60).chat == ()
    assert find_openings(dense, TOKENIZER, 20).chat == ()  # no room for one
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('no') }}"
    assert find_openings(dense, refusing, 60).chat == ()
    startless = make_tokenizer()
    startless._tokenizer.post_processor = None
    assert find_openings(dense, startless, 60).plain == BOS
    startless.bos_token = None
    assert find_openings(dense, startless, 60).plain == EOS
    startless.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert find_openings(dense, startless, 60).plain == startless.convert_tokens_to_ids("<|endoftext|>")
    startless = make_tokenizer()
    startless._tokenizer.post_processor = None
    startless.bos_token = startless.eos_token = None
    with pytest.raises(CalibrationError, match="neither a start nor an end token"):
        find_openings(dense, startless, 60)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert find_openings(dense, TOKENIZER, 60).ends == {BOS, EOS, 7}


def test_logits_that_are_not_finite_are_refused() -> None:
    broken = make_model(ALL[0])
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(CalibrationError, match="not finite"):
        sample_batch(broken, Openings(BOS, (), (), frozenset()), 2, 8, 0, lambda _: None)


# What is dropped.


def test_loops_are_told_from_prose() -> None:
    assert is_loop("a dark and dark, " * 40)
    assert is_loop(PROSE * 8)
    assert not is_loop(PROSE)
    for _, record in read_records("mixed")[1]:
        text = record.get("text") or record.get("output", "")
        assert not is_loop(text), text[:80]


def rigged(monkeypatch: pytest.MonkeyPatch, *said: list[int]) -> None:
    """Lets every model say this in the place of what it would say."""

    def sampled(model: Any, openings: Openings, count: int, length: int, seed: int, advance: Any) -> list[Row]:
        repeated = list(itertools.islice(itertools.cycle(said), count))
        return sample_batch(Rigged(*repeated, like=model), openings, count, length, seed, advance)

    monkeypatch.setattr(own, "sample_batch", sampled)


def test_a_model_that_says_the_same_again_and_again_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rigged(monkeypatch, TOKENIZER("a dark and dark, ", add_special_tokens=False)["input_ids"])
    out = tmp_path / "self.jsonl"
    longer = {**BATCH, "max_length": 120}
    with pytest.raises(CalibrationError, match=r"of 16 texts .* 16 say the same again and again .* such as mixed"):
        write_text(model, out, tokens=1000, **longer)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_ends_at_once_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rigged(monkeypatch, [EOS])
    with pytest.raises(CalibrationError, match="and 16 are empty, 100% in all"):
        write_text(model, tmp_path / "self.jsonl", tokens=1000, **BATCH)


# The file.


def test_a_file_of_written_text_is_an_ordinary_set_with_a_record(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "self.jsonl"
    written = write_text(model, out, tokens=300, **BATCH)
    found = lines(out)
    assert {frozenset(text) for text in found} == {frozenset({"text", "kind", "tokens", "batch"})}
    assert [text["kind"] for text in found[:2]] == ["plain", "chat"]
    assert sum(text["tokens"] for text in found) == written.tokens >= 300
    record = json.loads((tmp_path / "self.jsonl.json").read_text())
    assert record == json.loads(json.dumps(written.to_dict()))
    assert record["request"]["fingerprint"] == read_checkpoint(model).fingerprint
    assert record["tokens_per_second"] > 0
    assert record["bytes"] == out.stat().st_size
    assert record["dropped"].keys() == {"empty", "loops"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["self.jsonl", "self.jsonl.json"]
    drawn = load_calibration(out, TOKENIZER, samples=len(found), max_length=60)
    assert drawn.tokens == written.tokens
    assert all(sample[0] == BOS and sample[1] != BOS for sample in drawn.samples)
    with pytest.raises(CheckpointError, match=r"self\.jsonl exists; .*--overwrite"):
        write_text(model, out, tokens=300, **BATCH)
    assert write_text(model, out, tokens=300, overwrite=True, **BATCH).bytes == written.bytes


def test_the_seed_decides_the_texts_and_a_longer_set_begins_with_the_shorter(model: Path, tmp_path: Path) -> None:
    short, long, other = (tmp_path / f"{name}.jsonl" for name in ("short", "long", "other"))
    write_text(model, short, tokens=100, **BATCH)
    write_text(model, long, tokens=500, **BATCH)
    write_text(model, other, tokens=100, seed=1, **BATCH)
    assert long.read_bytes().startswith(short.read_bytes())
    assert long.stat().st_size > short.stat().st_size
    assert other.read_bytes() != short.read_bytes()


def test_a_killed_write_is_gone_on_with_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amprune")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_text(model, whole, tokens=600, **BATCH)
    write, count = own.write, itertools.count()

    def killed(path: Path, value: Any) -> None:
        if next(count) == 2:  # the texts of the second batch are in the file, its record is not
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(own, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            write_text(model, out, tokens=600, **BATCH)
    partial = tmp_path / "out.jsonl.partial"
    assert partial.stat().st_size > json.loads((tmp_path / "out.jsonl.partial.json").read_text())["bytes"] > 0
    with pytest.raises(CheckpointError, match=r"asked for with another seed; .*--overwrite to start anew"):
        write_text(model, out, tokens=600, seed=5, **BATCH)
    write_text(model, out, tokens=600, **BATCH)
    assert "going on with" in caplog.text
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_the_command_says_how_much_was_written_how_fast_and_what_was_dropped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    arguments = ["--tokens", "0.2k", "--batch-size", "4", "--max-length", "60", "--device", "cpu"]
    found = CliRunner().invoke(app, ["write-text", str(model), "-o", str(tmp_path / "self.jsonl"), *arguments])
    assert found.exit_code == 0, found.output
    assert re.search(r"Wrote \d+ tokens in \d texts, \d of them chats, [\d,]+ tokens/s\nDropped: ", found.stdout)
    found = CliRunner().invoke(app, ["write-text", str(model), "-o", str(tmp_path / "two.jsonl"), "--json", *arguments])
    assert json.loads(found.stdout)["tokens"] == sum(text["tokens"] for text in lines(tmp_path / "self.jsonl"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tokens": "many"}, "tokens is 'many', expected a number such as 200000, 200k or 1M"),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"max_length": 1}, "max_length is 1, expected at least 2"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], problem: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(AmpruneError, match=problem):
        write_text(model, tmp_path / "self.jsonl", **{**BATCH, **options})
    with pytest.raises(CalibrationError, match=r"ends in \.jsonl"):
        write_text(model, tmp_path / "self.txt")
    (tmp_path / "mine.jsonl.partial").write_text("mine")
    with pytest.raises(CheckpointError, match="is in the way and was not made by amprune"):
        write_text(model, tmp_path / "mine.jsonl", **BATCH)


def test_numbers_of_tokens_are_read_with_their_units() -> None:
    assert [own._count(text) for text in ("200k", "1M", "1.5m", "2_000", 7)] == [200_000, 10**6, 1_500_000, 2000, 7]


def test_a_batch_that_does_not_fit_is_halved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []

    def full(model: Any, openings: Openings, count: int, *rest: Any) -> list[Row]:
        sizes.append(count)
        if count > 2:
            raise RuntimeError("CUDA out of memory")
        return sample_batch(model, openings, count, *rest)

    monkeypatch.setattr(own, "sample_batch", full)
    write_text(model, tmp_path / "self.jsonl", tokens=150, **{**BATCH, "batch_size": 8})
    assert sizes[:4] == [8, 4, 2, 2]
    assert "going on with 2 texts at a time" in caplog.text


# As a source.


def test_own_text_is_kept_extended_and_read_from_its_beginning(model: Path, cache: Path) -> None:
    dense, where = read_checkpoint(model), Compute(device="cpu")

    def written(tokens: int) -> list[Any]:
        return [
            text for _, text in own_records(dense, TOKENIZER, Amount(tokens=tokens), seed=0, where=where, max_length=60)
        ]

    first = written(100)
    (file,) = cache.glob("*.jsonl")
    content = file.read_bytes()
    assert sum(text["tokens"] for text in first) >= 100
    assert sum(text["tokens"] for text in first[:-1]) < 100
    most = sum(text["tokens"] for text in lines(file))
    more = written(most + 1)
    assert more[: len(first)] == first
    assert file.read_bytes().startswith(content)
    assert file.stat().st_size > len(content)
    state = file.stat().st_mtime_ns
    assert written(100) == first
    assert file.stat().st_mtime_ns == state
    assert len(own_records(dense, TOKENIZER, Amount(samples=3), seed=0, where=where, max_length=60)) == 3
    with FileLock(file.with_name(f"{file.name}.lock")), pytest.raises(CheckpointError, match="by another run"):
        written(10_000)
    file.write_bytes(content[:10])
    with pytest.raises(CheckpointError, match=r"is missing or shorter than .* says; remove it"):
        written(100)


def test_a_model_is_calibrated_on_its_own_text(model: Path, cache: Path) -> None:
    drawn = draw_calibration(model, "self", tokens=200, device="cpu")
    assert drawn.name == "self"
    assert 200 <= drawn.tokens < 200 + 128
    assert draw_calibration(model, "self", tokens=200, device="cpu").sha256 == drawn.sha256
    both = draw_calibration(model, ("builtin:3", "self"), tokens=2000, device="cpu", max_length=60)
    assert both.name == "builtin, self"
    with pytest.raises(CalibrationError, match="use draw_calibration"):
        load_calibration("self", TOKENIZER, tokens=200)


def test_a_model_is_trained_on_the_teacher_s_text(model: Path, cache: Path) -> None:
    settings = with_preset(RecoverySettings(data="self", tokens=300, device="cpu", max_length=60))
    with pytest.raises(RecoveryError, match="self is text that the dense model writes; give it by --teacher"):
        load_training_data(settings, TOKENIZER)
    data = load_training_data(settings, TOKENIZER, author=read_checkpoint(model))
    (used,) = data.to_dict()["sources"]
    assert (used["name"], used["weight"]) == ("self", 1.0)
    assert used["tokens"] >= 300
    rows = [sample["input_ids"] for sample in data.training]
    assert {len(row) for row in rows[:-1]} == {60}
    assert all(row[0] == BOS for row in rows)
    assert read_file(next(cache.glob("*.jsonl")), "--data")
