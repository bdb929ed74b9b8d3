"""Where text comes from: several sources with weights, streams of the hub, what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_recovery import TOKENIZER, training_data
from typer.testing import CliRunner

from amprune import CalibrationError, RecoveryError, load_calibration
from amprune.cli import app
from amprune.settings import RecoverySettings, ScoreSettings, read_recipe, with_preset, write_recipe
from amprune.text.sources import TextSource, files_of, gather, parse_sources
from amprune.text.training import IGNORED, load_training_data


def texts(folder: Path, name: str, count: int, word: str) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{word} {number} {word}"}) + "\n" for number in range(count)))
    return str(file)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mixed", [("mixed", 1.0)]),
        (("self:0.5", "mixed"), [("self", 0.5), ("mixed", 1.0)]),
        (
            ("hub:own/set:train:2", "hub:own/set/part:test"),
            [("hub:own/set:train", 2.0), ("hub:own/set/part:test", 1.0)],
        ),
        ("hub:own/set:0.25", [("hub:own/set", 0.25)]),
        ("a/b.txt:3e-1", [("a/b.txt", 0.3)]),
        (["a text", "another"], []),
    ],
)
def test_names_and_weights_are_read(given: Any, expected: list[tuple[str, float]]) -> None:
    assert [(one.name, one.weight) for one in parse_sources(given, "--data")] == expected


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Path) -> None:
    file = tmp_path / "notes:2"
    file.write_text("")
    assert parse_sources(str(file), "--data") == (TextSource(str(file)),)
    assert files_of((str(file), "mixed", "self:2", "hub:a/b")) == (file,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--data names no set"),
        (("mixed", "mixed:2"), "--data names mixed twice; give it once, with the sum of the weights"),
        ("mixed:0", "--data gives mixed the weight 0, expected a positive number"),
        ("mixed:-1", "the weight -1, expected a positive number"),
        ("mixed:nan", "the weight nan, expected a positive number"),
        ("mixed:inf", "the weight inf, expected a positive number"),
        (("mixed", ""), "names a set without a name"),
        ("hub:nobody", "--data is 'hub:nobody', expected hub:OWNER/SET"),
    ],
)
def test_what_makes_no_sense_is_refused(given: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse_sources(given, "--data")


@pytest.mark.parametrize(
    ("wanted", "there", "weights", "expected"),
    [
        (100, (1000, 1000), (1, 1), (50, 50)),
        (100, (1000, 1000), (3, 1), (75, 25)),
        (100, (20, 1000), (1, 1), (20, 80)),  # what one lacks, those after it give
        (100, (1000, 20), (1, 1), (50, 20)),
        (100, (10, 10, 1000), (1, 1, 2), (10, 10, 80)),
        (None, (7, 9), (1, 5), (7, 9)),
    ],
)
def test_each_source_gives_its_share(
    wanted: int | None, there: tuple[int, ...], weights: tuple[float, ...], expected: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    counts = dict(zip("abc", there, strict=False))
    sources = [TextSource(name, weight) for name, weight in zip(counts, weights, strict=True)]
    read = dict.fromkeys(counts, 0)

    def draw(one: TextSource, share: float) -> Iterator[int]:
        for number in range(counts[one.name]):
            read[one.name] += 1
            yield number

    found = gather(sources, wanted, draw, lambda item: 1, "samples")
    assert tuple(map(len, found)) == tuple(read.values()) == expected
    if wanted is not None and sum(expected) < wanted:
        assert "100 samples were asked for, 70 came: 50 of a, 20 of b" in caplog.text
    else:
        assert caplog.text == ""


def test_calibration_mixes_its_sources_and_holds_out_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = (texts(tmp_path, "a", 40, "fox"), texts(tmp_path, "b", 40, "dog") + ":3")
    found = load_calibration(both, TOKENIZER, samples=40)
    words = [TOKENIZER.decode(sample) for sample in found.samples]
    assert [sum(word in text for text in words) for word in ("fox", "dog")] == [10, 30]
    assert found.name == "a.jsonl, b.jsonl"
    assert words != sorted(words)
    assert (
        load_calibration(both, TOKENIZER, samples=40) == found != load_calibration(both, TOKENIZER, samples=40, seed=1)
    )
    by_tokens = load_calibration(both, TOKENIZER, tokens=200)
    assert 200 <= by_tokens.tokens < 230
    assert len(load_calibration(both, TOKENIZER, samples=100).samples) == 65
    assert "100 samples were asked for, 65 came: 25 of" in caplog.text


def test_a_set_that_ends_before_the_tokens_says_how_many_came(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load_calibration(texts(tmp_path, "a", 3, "fox"), TOKENIZER, tokens=10_000)
    assert f"a.jsonl holds {found.tokens} of the 10,000 tokens that were asked for" in caplog.text


def test_training_holds_out_of_every_source_and_tells_of_each(tmp_path: Path) -> None:
    both = (texts(tmp_path, "a", 100, "fox"), texts(tmp_path, "b", 100, "dog") + ":2")
    settings = with_preset(RecoverySettings(data=both, tokens=900, packing=False, validation_share=0.1))
    found = load_training_data(settings, TOKENIZER, max_length=64)
    told = found.to_dict()["sources"]
    assert [(one["name"], one["weight"]) for one in told] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]
    assert told[0]["tokens"] == pytest.approx(300, abs=20)
    assert told[1]["tokens"] == pytest.approx(600, abs=20)
    for word, one in zip(("fox", "dog"), told, strict=True):
        held = [text for text in found.validation if word in TOKENIZER.decode(text["input_ids"])]
        assert len(held) == round(one["samples"] / 10)
    assert all(sample["labels"] == [IGNORED, *sample["input_ids"][1:]] for sample in found.training)


def test_every_token_of_a_packed_row_is_learnt_and_long_texts_fill_several(tmp_path: Path) -> None:
    settings = with_preset(RecoverySettings(data=[f"{'fox ' * 100}{number}" for number in range(8)], max_length=32))
    found = load_training_data(settings, TOKENIZER)
    assert found.truncated == 0
    assert len(found.validation) > 1
    rows = (*found.training, *found.validation)
    assert {len(row["input_ids"]) for row in rows[:-1]} <= {32, *(len(row["input_ids"]) for row in found.training[-1:])}
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in rows)
    paper = training_data([f"{'fox ' * 100}{number}" for number in range(8)], TOKENIZER, max_length=32)
    assert paper.truncated == 8


def test_self_without_a_teacher_is_refused() -> None:
    asked = with_preset(RecoverySettings(data="self", tokens=100))
    with pytest.raises(
        CalibrationError, match=r"--data self is text that the dense model writes.*give it by --teacher"
    ):
        load_training_data(asked, TOKENIZER)
    with pytest.raises(RecoveryError, match="self has no end; say by --tokens or --samples how much of it is wanted"):
        load_training_data(with_preset(RecoverySettings(data="self")), TOKENIZER)


# The hub, by the library's own streaming of files that lie here.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets `hub:own/...` be a folder of data files, and keeps what was asked for."""
    calls: list[Any] = []
    real = datasets.load_dataset
    (tmp_path / "own" / "set").mkdir(parents=True)
    texts(tmp_path / "own" / "set", "train", 5000, "fox")
    texts(tmp_path / "own" / "set", "test", 10, "dog")
    (tmp_path / "own" / "odd").mkdir()
    (tmp_path / "own" / "odd" / "train.jsonl").write_text('{"inhalt": "x", "titel": "y"}\n')

    def load(name: str, config: str | None, **options: Any) -> Any:
        calls.append((name, config, options))
        return real(str(tmp_path / name), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_set_of_the_hub_is_streamed_and_read_no_further_than_needed(hub: list[Any]) -> None:
    found = load_calibration("hub:own/set", TOKENIZER, samples=20)
    assert hub == [("own/set", None, {"split": "train", "streaming": True})]
    assert len(found.samples) == 20
    assert load_calibration("hub:own/set", TOKENIZER, samples=20) == found
    assert load_calibration("hub:own/set", TOKENIZER, samples=20, seed=1).samples != found.samples
    assert all(
        "dog" in TOKENIZER.decode(one) for one in load_calibration("hub:own/set:test", TOKENIZER, samples=5).samples
    )
    mixed = load_calibration(("hub:own/set:test", "hub:own/set:train:2"), TOKENIZER, tokens=300)
    assert 300 <= mixed.tokens < 330


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:own/odd", r"hub:own/odd, row 1: has the fields \['inhalt', 'titel'\], expected messages"),
        ("hub:own/none", "--calibration hub:own/none cannot be read from the hub .*hub:OWNER/SET/CONFIG:SPLIT"),
        ("hub:own/set:nosplit", "hub:own/set:nosplit cannot be read from the hub .*nosplit"),
    ],
)
def test_what_the_hub_lacks_is_told(name: str, message: str, hub: list[Any]) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(name, TOKENIZER, samples=1)


# The command line and recipes.


def test_a_repeated_option_is_several_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("amprune.recover", lambda model, out, settings, **more: found.append(settings))
    for given, expected in ((["mixed"], "mixed"), (["self:0.5", "mixed"], ("self:0.5", "mixed")), ([], None)):
        flags = [part for one in given for part in ("--data", one)]
        result = CliRunner().invoke(app, ["recover", "MODEL", "OUT", *flags])
        assert result.exit_code == 0, result.output
        assert found.pop().data == expected


def test_a_recipe_holds_several_sources_as_a_list_and_texts_as_a_note(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for calibration in ("mixed", ("self:0.5", "mixed")):
        write_recipe(file, "score", ScoreSettings(calibration=calibration))
        assert read_recipe(ScoreSettings, file).calibration == calibration
    write_recipe(file, "score", ScoreSettings(calibration=["a text"]))
    assert "# calibration was given in Python, as list" in file.read_text()
    assert read_recipe(ScoreSettings, file).calibration is None
