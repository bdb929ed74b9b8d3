"""Text that a model writes itself: seeded, gone on with, without loops, as chats and as plain text, of every family."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ALL, Tiny, make_model
from tiny_recovery import TOKENIZER, save_tiny, training_data
from transformers import AutoTokenizer
from typer.testing import CliRunner

from amprune import CalibrationError, draw_calibration, prune, write_text
from amprune.cli import app
from amprune.model.reader import read_checkpoint
from amprune.text import own
from amprune.text.own import Author, Written, _drawn, _first_token, _openings, _Row, _sampled

QUICK = {"tokens": "600", "batch_size": 4, "max_length": 24, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_a_file_of_texts_half_plain_half_chats_is_written_with_its_record(model: Path, tmp_path: Path) -> None:
    found = write_text(model, tmp_path / "self.jsonl", **QUICK)
    texts = lines(tmp_path / "self.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"self.jsonl", "self.jsonl.json"}
    assert len(texts) == found.texts
    assert sum(text["tokens"] for text in texts) == found.tokens >= 600
    assert json.loads((tmp_path / "self.jsonl.json").read_text())["request"]["seed"] == 0
    assert {text["kind"] for text in texts} == {"plain", "chat"}
    before, _ = own._around_the_user(TOKENIZER)
    assert all(text["text"].startswith(before.removeprefix("<s>")) for text in texts if text["kind"] == "chat")
    assert max(text["tokens"] for text in texts) <= 24
    assert found.seconds > 0
    data = training_data(str(tmp_path / "self.jsonl"), TOKENIZER, max_length=64)  # it is a set like any other
    assert len(data.training) + len(data.validation) == len(texts)


def test_the_same_seed_writes_the_same_and_another_another(model: Path, tmp_path: Path) -> None:
    for name, changes in (("one", {}), ("two", {}), ("other", {"seed": 1}), ("longer", {"tokens": "2k"})):
        write_text(model, tmp_path / f"{name}.jsonl", **{**QUICK, **changes})
    one, two, other, longer = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("one", "two", "other", "longer"))
    assert one == two != other
    assert longer.startswith(one)


@pytest.mark.process
def test_a_killed_run_is_gone_on_with_byte_by_byte(model: Path, tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "amprune", "write-text", str(model), "--tokens", "30k", "--batch-size", "4",
             "--max-length", "24", "--device", "cpu", "-o"]  # fmt: skip
    write_text(model, tmp_path / "whole.jsonl", **{**QUICK, "tokens": "30k"})
    process = subprocess.Popen([*asked, str(tmp_path / "self.jsonl")], stderr=subprocess.PIPE)
    record = tmp_path / "self.jsonl.partial.json"
    while process.poll() is None and not (record.exists() and json.loads(record.read_text())["batches"] >= 10):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    with (tmp_path / "self.jsonl.partial").open("ab") as file:
        file.write(b'{"text": "half a te')  # a batch that was being written
    assert not (tmp_path / "self.jsonl").exists()
    found = subprocess.run([*asked, str(tmp_path / "self.jsonl")], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "self.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or "lock" in path.name]


def test_rows_that_have_ended_are_left_out_and_change_no_other(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is told which tokens to say: rows end at different places, and each goes on with its own context."""
    from amprune.model.loading import loaded_model

    with loaded_model(model, device="cpu") as loaded:
        openings = own._Openings([5], [], [], frozenset({9}), None)

        def drawn(chances: torch.Tensor, _: torch.Generator) -> torch.Tensor:
            seen.append(chances)
            best = chances.argmax(-1)
            best[0] = 9 if len(seen) % 3 == 0 else best[0]  # the first of those that are left ends
            return best

        seen: list[torch.Tensor] = []
        monkeypatch.setattr(own, "_drawn", drawn)
        rows = _sampled(loaded, [5], openings, 6, 30, torch.Generator(), chat=False)
        assert len({len(row) for row in rows}) == 6
        for row in rows:
            ids, end = torch.tensor([row]), len(row) - (row[-1] == 9)
            wanted = loaded(ids).logits[0].argmax(-1)
            assert row[1:end] == wanted[: end - 1].tolist()


def test_a_chat_goes_from_the_users_end_to_the_answer() -> None:
    row = _Row([1], [7, 8, 9])
    assert [row.take(token, frozenset({7, 3})) for token in (4, 5, 7, 0, 0, 6, 7, 5)] == [4, 5, 7, 8, 9, 6, 7, 5]
    assert row.ids == [1, 4, 5, 7, 8, 9, 6, 7]
    assert row.ended


def test_tokens_are_drawn_by_their_chances() -> None:
    chances = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, 4)
    found = torch.bincount(_drawn(chances, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    assert found.tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.012)


class Named:
    """What `_first_token` reads of a tokenizer."""

    def __init__(self, **tokens: str) -> None:
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            setattr(self, name, tokens.get(name))

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 3}[token]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, 3),  # SmolLM2's
        ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, 3),  # Qwen2.5's
        ({"eos_token": "<|im_end|>"}, 2),
        ({}, 0),
    ],
)
def test_a_text_begins_with_a_token_that_marks_no_chat(tokens: dict[str, str], expected: int) -> None:
    assert _first_token(Named(**tokens), "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n") == expected


def test_the_start_token_stands_once(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    openings = _openings(tokenizer, make_model(next(tiny for tiny in ALL if tiny.id == "llama-gqa")))
    write_text(model, tmp_path / "self.jsonl", **QUICK)
    for text in lines(tmp_path / "self.jsonl"):
        ids = tokenizer(text["text"])["input_ids"]
        assert ids[0] == openings.start != ids[1] or text["tokens"] < 2


# What is left out.


PROSE = (
    "The committee met on Thursday to discuss the new bridge. Its members could not agree whether the old one, which "
    "had stood since 1911, should be torn down or kept for those who walk; the mayor, as ever, asked for more time."
)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        (PROSE, False),
        ("a dark and dark, " * 20, True),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20", False),
        ("yes " * 60, True),
        (PROSE + " " + "no no " * 300, True),
        ("def f(x):\n    return x + 1\n\n\ndef g(x):\n    return f(x) * 2\n", False),
        ("世界の終わりとハードボイルド・ワンダーランドは長い小説である。" * 2, False),
    ],
)
def test_loops_are_told_from_prose(text: str, loop: bool) -> None:
    assert own._is_loop({"text": text}) == loop


def test_empty_texts_and_loops_are_counted_and_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [{"text": "yes " * 60, "tokens": 60}, {"text": "no", "tokens": 1}, {"text": PROSE, "tokens": 50}]
    monkeypatch.setattr(own, "_writer", fixed(batch))
    found = write_text(model, tmp_path / "self.jsonl", tokens="100", device="cpu")
    assert (found.texts, found.loops, found.empty, found.tokens) == (2, 2, 2, 100)
    assert found.dropped == pytest.approx(2 / 3)
    assert [text["text"] for text in lines(tmp_path / "self.jsonl")] == [PROSE, PROSE]


def fixed(batch: list[dict[str, Any]]) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def writer(author: Author) -> Any:
        yield lambda number: batch

    return writer


def test_a_model_that_writes_loops_alone_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [*9 * [{"text": "yes " * 60, "tokens": 60}], {"text": PROSE, "tokens": 50}]
    monkeypatch.setattr(own, "_writer", fixed(batch))
    with pytest.raises(CalibrationError, match="writes no text: of 40 texts 36 are loops and 0 empty; give a file or"):
        write_text(model, tmp_path / "self.jsonl", tokens="1M", device="cpu")
    assert not (tmp_path / "self.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "0"}, "--tokens is '0', expected a number such as 200000, 200k or 1M"),
        ({"tokens": "many"}, "--tokens is 'many', expected"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        write_text(model, tmp_path / "self.jsonl", **{**QUICK, **changes})
    with pytest.raises(CalibrationError, match=r"is not named \.jsonl"):
        write_text(model, tmp_path / "self.txt", **QUICK)
    (tmp_path / "self.jsonl").write_text("mine")
    with pytest.raises(CalibrationError, match=r"self\.jsonl exists; choose another file, or give --overwrite"):
        write_text(model, tmp_path / "self.jsonl", **QUICK)
    assert (tmp_path / "self.jsonl").read_text() == "mine"


def test_a_batch_that_does_not_fit_is_written_in_parts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = own._sampled

    def small(model: Any, opening: Any, openings: Any, rows: int, *arguments: Any, **more: Any) -> Any:
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(model, opening, openings, rows, *arguments, **more)

    monkeypatch.setattr(own, "_sampled", small)
    with caplog.at_level(logging.INFO):
        found = write_text(model, tmp_path / "self.jsonl", **QUICK)
    assert "4 texts at a time do not fit the memory; going on with 2" in caplog.text
    assert found.tokens >= 600


# Of every family, and as a source.


@pytest.mark.parametrize("tiny", {tiny.model_type: tiny for tiny in ALL}.values(), ids=lambda tiny: tiny.model_type)
def test_every_family_writes(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tiny)
    author = Author(read_checkpoint(folder), seed=3, batch_size=6, max_length=20)
    with own._writer(author) as write_batch:
        texts = [text for number in (0, 1) for text in write_batch(number)]
    assert [text["kind"] for text in texts] == ["plain"] * 6 + ["chat"] * 6
    assert max(text["tokens"] for text in texts) >= 12
    with own._writer(author) as write_batch:
        assert write_batch(1) == texts[6:]


def test_as_a_source_it_is_kept_and_written_on(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_length": 24, "device": "cpu", "preset": "paper"}
    with caplog.at_level(logging.INFO):
        first = draw_calibration(model, "self", tokens=300, **options)
    assert "tokens of own text are written, and kept in" in caplog.text
    (file,) = (cache / "own-text").glob("*.jsonl")
    size = file.stat().st_size
    caplog.clear()
    assert draw_calibration(model, "self", tokens=300, **options) == first
    assert (file.stat().st_size, caplog.text) == (size, "")
    more = draw_calibration(model, "self", tokens=100_000, **options)
    assert file.stat().st_size > size
    assert more.tokens >= 100_000
    assert {path.suffix for path in (cache / "own-text").iterdir()} == {".jsonl", ".json"}


def test_a_model_is_pruned_on_its_own_text_and_a_set(model: Path, tmp_path: Path) -> None:
    found = prune(model, tmp_path / "out", ratio=0.2, calibration=("self:0.5", "builtin:0.5"), tokens=400, device="cpu")
    assert found.verification.passed
    assert found.plan.provenance["calibration"]["name"] == "self, builtin"


def test_the_command_line_says_how_much_was_written_and_how_fast(model: Path, tmp_path: Path) -> None:
    asked = ["write-text", str(model), "-o", str(tmp_path / "self.jsonl"), "--tokens", "0.6k", "--batch-size", "4",
             "--max-length", "24", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "tokens a second; left out: " in result.stdout
    result = CliRunner().invoke(app, [*asked, "--overwrite", "--json"])
    found = json.loads(result.stdout)
    assert found["tokens"] >= 600
    assert found["output"] == str(tmp_path / "self.jsonl")
    assert Written(**{name: value for name, value in found.items() if name != "output"}).texts == found["texts"]
