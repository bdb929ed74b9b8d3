"""Kinds of faults that every command shares: what cannot be read to its end, sources, two runs at once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_evaluation import checkpoint, text_file
from tiny_recovery import save_chats
from typer.testing import CliRunner

from amprune.cli.options import app
from amprune.errors import AmpruneError, RecipeError
from amprune.model.files import read_front_matter
from amprune.model.loading import load_tokenizer
from amprune.records import alone, parse_yaml, read_object, read_text
from amprune.settings import PruneSettings, read_recipe

PAPER = ("--preset", "paper", "--calibration", "chats.jsonl", "--samples", 4)
MEASURED = ("--measure", "perplexity", "--text", "text.txt", "--sequence-length", 32, "--device", "cpu")
TRAINED = ("--preset", "paper", "--data", "chats.jsonl", "--device", "cpu", "--max-steps", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    checkpoint(place / "dense")
    save_chats(place)
    text_file(place / "text.txt")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for one in made.iterdir():
        (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: object) -> str:
    """Runs a command that has to fail, and returns the paragraph that it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.stdout
    return " ".join(result.stderr.split())


def a_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def a_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("make", [a_pipe, a_device, a_folder])
def test_what_has_no_end_is_not_read(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path, error = make(tmp_path / "x.json"), RecipeError
    for read in (
        lambda: read_object(path, error=error), lambda: read_text(path, error=error),
        lambda: read_recipe(PruneSettings, path),
    ):  # fmt: skip
        with pytest.raises(
            AmpruneError, match=r"x\.json cannot be read: it is a (folder|device or a pipe), expected a"
        ):
            read()
    assert read_front_matter(path) == {}


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_checkpoint_with_a_pipe_is_refused_at_once(name: str, made: Path, tmp_path: Path) -> None:
    for one in (made / "dense").iterdir():
        if one.name != name:
            (tmp_path / one.name).symlink_to(one)
    a_pipe(tmp_path / name)
    assert f"{name} is a device or a pipe, expected a file" in refused("inspect", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000, "a: 2020-99-99", "a: &a [1]\nb: [" + ", ".join(["*a"] * 30) + "]",
        "!!python/object/apply:os.system ['true']", "a: [", "\0",
    ],
    ids=["nested", "no date", "references", "code", "cut off", "no text"],
)  # fmt: skip
def test_yaml_that_is_damaged_or_a_bomb_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_yaml(text)


INTO_SOURCES: dict[str, tuple[Any, ...]] = {
    "scores over weights": ("score", "dense", "-o", "dense/model.safetensors", *PAPER),
    "scores into a model": ("score", "dense", "-o", "dense/new/s.safetensors", *PAPER),
    "scores over the samples": ("score", "dense", "-o", "chats.jsonl", *PAPER),
    "a plan over its scores": ("plan", "s.safetensors", "-o", "s.safetensors", "--ratio", 0.2),
    "a plan through a link": ("plan", "s.safetensors", "-o", "link", "--ratio", 0.2),
    "figures into a model": ("evaluate", "dense", "-o", "dense/new.json", *MEASURED),
    "figures over a text": ("evaluate", "dense", "-o", "text.txt", *MEASURED),
    "a model over its samples": ("prune", "dense", "chats.jsonl", "--ratio", 0.2, "--overwrite", *PAPER),
    "a model over its teacher": ("recover", "dense", "teacher", "--teacher", "teacher", "--overwrite", *TRAINED),
}  # fmt: skip


@pytest.mark.parametrize("command", INTO_SOURCES.values(), ids=INTO_SOURCES)
def test_no_command_writes_into_what_it_reads(command: tuple[Any, ...], place: Path, made: Path) -> None:
    (place / "teacher").symlink_to(checkpoint(place / "other"))
    (place / "s.safetensors").write_bytes(b"scores")
    (place / "link").symlink_to("s.safetensors")
    before = {file: file.read_bytes() for folder in (place, made) for file in folder.rglob("*") if file.is_file()}
    assert " source " in refused(*command)
    assert {file: file.read_bytes() for file in before} == before


def test_a_second_run_is_told_who_writes(place: Path) -> None:
    """Of every command that goes on where it stopped, from the first write to the last."""
    for written, command in {
        "out.training": ("recover", "dense", "out", *TRAINED),
        "e.json": ("evaluate", "dense", "-o", "e.json", *MEASURED),
        "out.run.json": ("run", "dense", "out", "--ratio", 0.2, *PAPER),
    }.items():
        with alone(place / f"{written}.lock", "x"):
            said = refused(*command)
        assert "is being written by another run" in said
        assert f"which holds {written}.lock" in said or f"{place / written}.lock" in said
    assert not [one.name for one in place.iterdir() if one.name.startswith(("out", "e."))]


def test_a_lock_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    with alone(tmp_path / "a" / "b" / "x.lock", "x"):
        assert (tmp_path / "a" / "b" / "x.lock").exists()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("device", ["meta", "cuda:77", "nowhere", ""])
@pytest.mark.parametrize("command", ["score", "prune", "evaluate"])
def test_a_device_that_is_not_there_is_named(command: str, device: str, place: Path) -> None:
    given = {
        "score": ("dense", "-o", "s.safetensors", *PAPER), "prune": ("dense", "out", "--ratio", 0.2, *PAPER),
        "evaluate": ("dense", "-o", "e.json", *MEASURED[:-2]),
    }  # fmt: skip
    said = refused(command, *given[command], "--device", device)
    assert f"--device is {device!r}, which names no device" in said or f"--device is {device}, but this machine" in said
    assert not {"out", "s.safetensors", "e.json"} & {one.name for one in place.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--evaluate", "--measure", "perplexity", "--text", "nothing.txt"), "cannot read nothing.txt"),
        (("--evaluate", "--measure", "zero_shot", "--tasks", "no_such_task"), "no_such_task"),
        (("--recover", "--data", "nothing.jsonl"), "no data set 'nothing.jsonl'"),
        (("--recover", "--learning-rate", -1), "--learning-rate is -1"),
    ],
)
def test_a_run_tries_first_what_would_fail_last(
    options: tuple[Any, ...], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amprune.pipeline.prune", lambda *_, **__: pytest.fail("something was pruned"))
    assert message in refused("run", "dense", "out", "--ratio", 0.2, *PAPER, *options)
    assert not [one.name for one in place.iterdir() if one.name.startswith("out")]


def test_a_cache_that_cannot_be_written_is_named_before_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "taken"))
    said = refused("inspect", tmp_path / "model.gguf")
    assert "cannot be written" in said
    assert "name a folder that can by the variable AMPRUNE_CACHE" in said


@pytest.mark.training
def test_every_weight_is_trained_where_there_is_no_gpu(place: Path) -> None:
    assert CliRunner().invoke(app, ["prune", "dense", "pruned", "--ratio", "0.2", *map(str, PAPER)]).exit_code == 0
    options = ("--full", "--data", "chats.jsonl", "--max-steps", 1)
    assert CliRunner().invoke(app, ["recover", "pruned", "out", *map(str, options)]).exit_code == 0


@pytest.mark.parametrize("count", ["-3", '"many"', "null", "true", "1.5"])
def test_an_evaluation_counts_parameters_in_whole_numbers(count: str, place: Path) -> None:
    assert CliRunner().invoke(app, ["evaluate", "dense", "-o", "e.json", *map(str, MEASURED)]).exit_code == 0
    known = json.loads((place / "e.json").read_text(encoding="utf-8"))["models"][0]["parameters"]
    text = (place / "e.json").read_text(encoding="utf-8")
    (place / "e.json").write_text(text.replace(f'"parameters": {known}', f'"parameters": {count}'), encoding="utf-8")
    said = refused("evaluate", "dense", "-o", "e.json", *MEASURED)
    assert "parameters is" in said
    assert "the file is damaged" in said


class _Code:
    """Code of a model and of a tokenizer, which tell when they run."""

    CONFIG = (
        "from pathlib import Path\nPath(__file__).with_name('config-ran').touch()\n"
        "Path({place!r}).joinpath('config-ran').touch()\nfrom transformers import LlamaConfig as Own\n"
    )
    TOKENIZER = (
        "from pathlib import Path\nPath({place!r}).joinpath('tokenizer-ran').touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )


@pytest.mark.parametrize("trusted", [True, False])
def test_of_code_that_a_model_carries_the_tokenizer_s_alone_ever_runs(
    trusted: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(made / "dense", tmp_path / "model")
    for name, module, entry, code in (
        ("config.json", "configuration_own", "AutoConfig", _Code.CONFIG),
        ("tokenizer_config.json", "tokenization_own", "AutoTokenizer", _Code.TOKENIZER),
    ):
        (model / f"{module}.py").write_text(code.format(place=str(tmp_path)), encoding="utf-8")
        content = json.loads((model / name).read_text(encoding="utf-8"))
        reference = f"{module}.Own"
        content["auto_map"] = {entry: [None, reference] if entry == "AutoTokenizer" else reference}
        (model / name).write_text(json.dumps(content), encoding="utf-8")
    load_tokenizer(model, trust_remote_code=trusted)
    assert not (tmp_path / "config-ran").exists()
    assert (tmp_path / "tokenizer-ran").exists() == trusted


@pytest.mark.parametrize("text", ["\\ud800", "\\uDFFF tail"])
def test_half_a_character_in_a_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(f'{{"criterion": ["{text}"]}}', encoding="utf-8")
    with pytest.raises(AmpruneError, match="cannot be read: 'utf-8' codec can't encode character"):
        read_object(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"name": "\\ud83e\\udd8a"}', encoding="utf-8")  # both halves
    assert read_object(tmp_path / "plan.json") == {"name": "\U0001f98a"}


@pytest.mark.parametrize("length", ['"long"', "[1]"])
def test_a_tokenizer_that_fails_on_any_text_is_named(length: str, made: Path, tmp_path: Path) -> None:
    model = shutil.copytree(made / "dense", tmp_path / "model")
    content = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    content["model_max_length"] = json.loads(length)
    (model / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AmpruneError, match=r"the tokenizer in \S+ cannot be loaded"):
        load_tokenizer(model)


@pytest.mark.parametrize("command", [("inspect", "x" * 5000), ("report", "x" * 5000), ("plan", "x" * 5000, "-o", "p")])
def test_a_name_that_no_file_can_have_is_told_shortly(command: tuple[str, ...], tmp_path: Path) -> None:
    said = refused(*command, *(("--ratio", 0.2) if command[0] == "plan" else ()))
    assert "File name too long" in said
    assert "unexpected" not in said
    assert len(said) < 400 or command[0] == "plan"  # whose own error names the file
