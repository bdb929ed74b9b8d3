"""Several sources of text under one option: how they are named, how much comes of each, and sets of the hub."""

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_datasets import served
from tiny_recovery import save_tiny, training_data
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from amprune import CalibrationError, load_calibration
from amprune.cli import options
from amprune.errors import RecipeError
from amprune.settings import PruneSettings, RecoverySettings, read_recipe, with_preset, write_recipe
from amprune.text import drawing
from amprune.text.drawing import check_sources, draw_text
from amprune.text.files import Record
from amprune.text.records import file_of
from amprune.text.sources import Amount, TextSource, parse_hub, parse_sources
from amprune.text.training import IGNORED, load_training_data

TOKENIZER = make_tokenizer()


def write(folder: Path, name: str, count: int, words: int = 1) -> str:
    """Writes a set whose texts begin with its name."""
    file = folder / f"{name}.jsonl"
    lines = (json.dumps({"text": f"{name} {number}" + " fox" * words}) for number in range(count))
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(file)


# Names and weights.


def test_sources_are_named_with_weights(tmp_path: Path) -> None:
    given = ("mixed", "self:0.5", "hub:ann/set/two:held:3", "hub:ann/set:2", "data/a.jsonl:1.5", Path("b:2"))
    assert parse_sources(given, "--data") == (
        TextSource("mixed"), TextSource("self", 0.5), TextSource("hub:ann/set/two:held", 3),
        TextSource("hub:ann/set", 2), TextSource("data/a.jsonl", 1.5), TextSource("b:2"),
    )  # fmt: skip
    assert parse_sources("builtin", "--data") == (TextSource("builtin"),)
    assert parse_sources(["builtin", "mixed"], "--data") == ()  # texts
    named = tmp_path / "set:2"
    named.write_text("x")
    assert parse_sources(str(named), "--data") == (TextSource(str(named)),)
    assert parse_hub("hub:ann/set", "--data") == ("ann/set", None, "train")
    assert parse_hub("hub:ann/set/two:held", "--data") == ("ann/set", "two", "held")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("self:0", r"--data self:0: the weight is 0, expected a number above 0"),
        ("self:-1", r"the weight is -1"),
        ("mixed:nan", r"the weight is nan"),
        ("a.jsonl:inf", r"the weight is inf"),
        ("mixed:half", r"the weight of mixed is 'half', expected a number such as 0\.5"),
        (("mixed", "self", "mixed:2"), r"--data names mixed twice; give it once, with the sum of the weights"),
        ("", r"--data '' names no source of text; give alpaca, mixed"),
        (":0.5", r"--data ':0\.5' names no source of text"),
        ((), r"--data names no source of text"),
        (("mixed", 3), r"--data names a int as a source of text"),
        ("hub:ann", r"--data hub:ann: expected hub:OWNER/SET, with /CONFIG or :SPLIT"),
    ],
)  # fmt: skip
def test_bad_names_and_weights_are_refused(given: Any, problem: str) -> None:
    with pytest.raises(CalibrationError, match=problem):
        parse_sources(given, "--data")


def test_the_files_of_all_sources_are_known() -> None:
    assert file_of(("mixed", "a.jsonl:2", "hub:ann/set", "self", "~/b.txt")) == (
        Path("a.jsonl"),
        Path("~/b.txt").expanduser(),
    )
    assert file_of("a.jsonl") == (Path("a.jsonl"),)
    assert file_of(["a text"]) == file_of(None) == file_of(object()) == ()


def test_the_command_line_gives_one_source_as_text_and_several_as_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PruneSettings] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr("amprune.prune", lambda model, out, settings, **_: seen.append(settings), raising=False)
    for arguments in ([], ["--calibration", "builtin"], ["--calibration", "builtin", "--calibration", "a,b.txt:2"]):
        CliRunner().invoke(options.app, ["prune", "model", "out", "--ratio", "0.2", *arguments])
    assert [settings.calibration for settings in seen] == [None, "builtin", ("builtin", "a,b.txt:2")]


def test_a_weight_that_is_none_is_told_on_the_terminal_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    arguments = ["prune", str(save_tiny(tmp_path / "model")), str(tmp_path / "out"), "--ratio", "0.2"]
    found = CliRunner().invoke(options.app, [*arguments, "--calibration", "self:x"])
    assert found.exit_code == 1
    assert "amprune: --calibration self:x: the weight of self is 'x'" in found.output


def test_recipes_hold_several_sources_as_a_list(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for data in ("builtin", ("mixed:2", "self")):
        settings = RecoverySettings(data=data)
        write_recipe(file, "recover", settings)
        assert read_recipe(RecoverySettings, file) == settings
    assert "- mixed:2\n- self\n" in file.read_text()
    write_recipe(file, "recover", RecoverySettings(data=["a text", "another"]))
    assert "# data was given in Python, as list" in file.read_text()
    assert read_recipe(RecoverySettings, file).data is None
    file.write_text("data: [mixed, 3]")
    with pytest.raises(RecipeError, match="expected text or a list of texts"):
        read_recipe(RecoverySettings, file)


# How much of each.


def pick(name: str, records: Any, count: int | None) -> Any:
    return records[:count]


def encode(record: Record, name: str) -> tuple[str, int]:
    return name, 10


def drawn(sources: tuple[str, ...], amount: Amount, **options: Any) -> list[int]:
    """Returns how many samples of ten tokens come of each source."""
    own = options.pop("own", lambda asked: [("", {})] * ((asked.tokens or 0) // 10))
    found = draw_text(sources, amount, encode, pick, own, seed=0, option="--data", **options)
    return [len(one.samples) for one in found]


def test_each_source_gives_its_weight_and_those_after_it_what_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = (write(tmp_path, name, 20) for name in "abc")
    assert drawn((a, b), Amount(tokens=200)) == [10, 10]
    assert drawn((f"{a}:3", b), Amount(tokens=200)) == [15, 5]
    assert drawn((f"{a}:0.5", f"{b}:0.3", f"{c}:0.2"), Amount(samples=20)) == [10, 6, 4]
    assert drawn((f"{a}:8", b, c), Amount(tokens=400)) == [20, 10, 10]  # a has 20 of 32
    assert drawn((a, b), Amount(samples=3)) == [2, 1]
    assert drawn((a, b), Amount(samples=5, tokens=400)) == [3, 2]
    assert drawn((a, "self:3"), Amount(tokens=1000)) == [20, 80]
    assert caplog.text == ""
    assert drawn((a, b), Amount()) == [20, 20]
    assert drawn((a, "self"), Amount(), endless=70) == [20, 7]
    assert caplog.text == ""
    assert drawn((a, f"{b}:2"), Amount()) == [20, 20]
    assert "weights of sources count only where samples or tokens are asked for" in caplog.text


def test_a_shortage_is_told_by_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = (write(tmp_path, name, 20) for name in "ab")
    assert drawn((a, b), Amount(tokens=1000)) == [20, 20]
    assert "400 of 1,000 tokens came, 200 of a.jsonl, 200 of b.jsonl" in caplog.text
    drawn((a, b), Amount(samples=100))
    assert "40 of 100 samples came, 20 of a.jsonl, 20 of b.jsonl" in caplog.text
    caplog.clear()
    load_calibration(a, TOKENIZER, tokens=10**6)
    assert "of 1,000,000 tokens came" in caplog.text


def test_calibration_mixes_its_sources_by_the_seed(tmp_path: Path) -> None:
    sources = tuple(write(tmp_path, name, 40) for name in ("Red", "Blue"))
    found = load_calibration(sources, TOKENIZER, samples=40)
    assert found.name == "Red.jsonl, Blue.jsonl"
    red = [TOKENIZER.decode(sample, skip_special_tokens=True).startswith("Red") for sample in found.samples]
    assert sum(red) == 20
    assert sum(one != other for one, other in pairwise(red)) > 10
    assert found == load_calibration(sources, TOKENIZER, samples=40)
    assert found.sha256 != load_calibration(sources, TOKENIZER, samples=40, seed=1).sha256
    held = found.split()[1]
    assert (
        0
        < sum(TOKENIZER.decode(s, skip_special_tokens=True).startswith("Red") for s in held.samples)
        < len(held.samples)
    )


def test_one_source_with_a_weight_or_in_a_tuple_is_that_source(tmp_path: Path) -> None:
    a = write(tmp_path, "a", 40)
    alone = load_calibration(a, TOKENIZER, samples=10)
    assert load_calibration((a,), TOKENIZER, samples=10) == load_calibration(f"{a}:2", TOKENIZER, samples=10) == alone


# Training data.


def test_training_data_of_several_sources_hold_out_of_each(tmp_path: Path) -> None:
    a, b = write(tmp_path, "Red", 40), write(tmp_path, "Blue", 20)
    data = training_data((a, f"{b}:2"), TOKENIZER, validation_share=0.1)
    assert data.name == "Red.jsonl, Blue.jsonl"
    assert (len(data.training), len(data.validation)) == (54, 6)
    texts = [TOKENIZER.decode(sample["input_ids"], skip_special_tokens=True) for sample in data.validation]
    assert sum(text.startswith("Red") for text in texts) == 4
    used = data.to_dict()["sources"]
    assert [(one["name"], one["weight"], one["samples"]) for one in used] == [
        ("Red.jsonl", 1.0, 40),
        ("Blue.jsonl", 2.0, 20),
    ]
    every = (*data.training, *data.validation)
    assert sum(one["tokens"] for one in used) == sum(len(sample["input_ids"]) for sample in every)
    assert training_data((a, f"{b}:2"), TOKENIZER, samples=30).to_dict()["sources"][1]["samples"] == 20


def test_every_token_is_learnt_where_not_the_responses_alone_are(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"instruction": "Say it.", "output": ""}) + "\n")
    (sample,) = training_data(file, TOKENIZER, validation_share=0, responses_only=False).training
    assert sample["labels"] == [IGNORED, *sample["input_ids"][1:]]
    (cut,) = training_data(file, TOKENIZER, validation_share=0, responses_only=False, max_length=9).training
    assert len(cut["labels"]) == 9


def test_held_out_rows_are_full_and_no_more_than_there_is_use_for(tmp_path: Path) -> None:
    a, b = write(tmp_path, "Red", 1500, words=8), write(tmp_path, "Blue", 1500, words=8)

    def load(**given: Any) -> Any:
        settings = RecoverySettings(data=(a, b), max_length=32, device="cpu", **given)
        return load_training_data(with_preset(settings), TOKENIZER)

    data = load(validation_share=0.5)
    assert len(data.validation) == 64
    assert {len(row["input_ids"]) for row in data.validation} == {32}
    assert all(len(row["input_ids"]) == 32 for row in data.training[:-1])
    few = load(validation_share=0.01)
    assert 5 < len(few.validation) < 64
    tokens = load(validation_share=0.01, tokens=2000).to_dict()["sources"]
    assert sum(one["tokens"] for one in tokens) >= 2000
    assert all(950 < one["tokens"] < 1050 for one in tokens)


def test_a_last_row_of_few_tokens_is_dropped() -> None:
    text = "fox " * 40
    length = len(TOKENIZER(text)["input_ids"]) + 1
    rows = [
        [len(row["input_ids"]) for row in training_data(
            [text] * 2, TOKENIZER, validation_share=0, max_length=2 * length - extra, packing=True, responses_only=False
        ).training]
        for extra in (4, 12)
    ]  # fmt: skip
    assert [len(found) for found in rows] == [1, 2]
    assert training_data(["fox"], TOKENIZER, validation_share=0, packing=True, responses_only=False).training


# Sets of the hub.


def test_sources_are_looked_at_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def rows(name: str, **_: Any) -> Any:
        asked.append(name)
        yield "row 1", {"text": "fox"}
        raise AssertionError("no more than the first row is needed")

    monkeypatch.setattr(drawing, "hub_records", rows)
    check_sources(("mixed", "self", "hub:ann/set:2", write(tmp_path, "a", 2)), "--data")
    assert asked == ["hub:ann/set"]
    check_sources(["a text"], "--data")
    with pytest.raises(CalibrationError, match=r"no data set 'nowhere\.jsonl'"):
        check_sources(("mixed", "nowhere.jsonl"), "--data")


README = """---
configs:
- config_name: one
  data_files: one.jsonl
- config_name: two
  data_files:
  - split: train
    path: two.jsonl
  - split: held
    path: held.jsonl
---
"""
STREAMED = """
import sys
from amprune import CalibrationError, load_calibration
sys.path.insert(0, sys.argv[1])
from tiny_tokenizer import make_tokenizer
for name in sys.argv[2:]:
    try:
        found = load_calibration(tuple(name.split("+")), make_tokenizer(), samples=6, seed=3)
        print(found.name, len(found.samples), found.sha256)
    except CalibrationError as error:
        print("refused:", error)
"""


def lines(count: int, field: str = "text") -> bytes:
    return "".join(json.dumps({field: f"Row {number} of the set."}) + "\n" for number in range(count)).encode()


def streamed(address: str, folder: Path, *names: str) -> list[str]:
    """Draws from sets of a hub in a process of its own, since libraries read the address when they are imported."""
    known = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder), "HF_DATASETS_CACHE": str(folder)}
    tests = str(Path(__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", STREAMED, tests, *names], env={**os.environ, **known}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


@pytest.mark.process
def test_sets_of_the_hub_are_streamed_no_further_than_needed(tmp_path: Path) -> None:
    shards = {f"data-{number}.jsonl": lines(150) for number in range(30)}
    sets = {
        "ann/plain": shards,
        "ann/several": {
            "README.md": README.encode(), "one.jsonl": lines(20), "two.jsonl": lines(30), "held.jsonl": lines(5),
        },
        "ann/other": {"data.jsonl": lines(9, "question")},
    }  # fmt: skip
    with served(sets) as (address, asked):
        found = streamed(
            address, tmp_path, "hub:ann/plain", "hub:ann/plain", "hub:ann/several/two:held",
            "hub:ann/several/one:3+builtin", "hub:ann/several", "hub:ann/several/three", "hub:ann/plain:held",
            "hub:ann/none", "hub:ann/other",
        )  # fmt: skip
    assert found[0] == found[1]
    assert found[0].startswith("hub:ann/plain 6 ")
    read = {line.rpartition("/")[2] for line in asked if line.startswith("GET") and "/resolve/" in line}
    assert 0 < len(read & shards.keys()) < 25  # those that a thousand rows are in, and some that are opened with them
    assert found[2].startswith("hub:ann/several/two:held 5 ")
    assert found[3].startswith("hub:ann/several/one, builtin 6 ")
    problems = (
        r"Config name is missing. Please pick one among the available configs: ['one', 'two']", "'three' not found",
        "Bad split: held. Available splits: ['train']", "the hub has no data set ann/none, or it is private",
        "hub:ann/other, row 1: has the fields ['question'], expected messages",
    )  # fmt: skip
    for line, problem in zip(found[4:], problems, strict=True):
        assert line.startswith("refused: ")
        assert problem in line


def test_a_hub_that_cannot_be_reached_is_told_of() -> None:
    with pytest.raises(CalibrationError, match=r"the data set ann/set of the hub cannot be read .*check the network"):
        load_calibration("hub:ann/set", TOKENIZER)


def test_shortages_of_the_hub_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "amprune")
    monkeypatch.setattr(drawing, "hub_records", lambda *_, **__: iter([("row 1", {"text": "A fox."})] * 3))
    assert len(load_calibration(("hub:ann/set", "builtin"), TOKENIZER, samples=20).samples) == 20
    assert caplog.text == ""
    assert len(load_calibration(("builtin", "hub:ann/set"), TOKENIZER, samples=20).samples) == 13
    assert "13 of 20 samples came, 10 of builtin, 3 of hub:ann/set" in caplog.text
