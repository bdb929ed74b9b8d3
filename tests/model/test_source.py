"""What a user calls MODEL: what is fetched from the hub, and what a folder of its cache is called."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer

from amprune.cut.inspection import inspect
from amprune.model import source
from amprune.model.source import open_source
from amprune.pipeline import prune

REPOSITORY = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
    "additional_chat_templates/tools.jinja", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "LICENSE", "LICENCE.txt", "USE_POLICY.md", "NOTICE", "README.md",
    "consolidated.safetensors", "consolidated.00.pth", "params.json", "original/params.json",
    "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "checkpoint-500/model.safetensors",
    "checkpoint-500/optimizer.pt", "gguf/model-q4.gguf", "model.gguf", "pytorch_model.bin", "training_args.bin",
    "tf_model.h5", "flax_model.msgpack", "coreml/text/weights/model.safetensors", "2_Dense/model.safetensors",
    "2_Dense/config.json", "images/plot.png",
]  # fmt: skip


def fetched(monkeypatch: pytest.MonkeyPatch, folder: Path, repository: list[str]) -> set[str]:
    """Returns what `open_source` fetches of a repository, which it finds as empty files."""

    def fetch(name: str, *, revision: str | None, **patterns: Any) -> str:
        for file in filter_repo_objects(repository, **patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text('[{"path": "2_Dense"}]' if file == "modules.json" else "", encoding="utf-8")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    open_source("owner/name")
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_read_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fetched(monkeypatch, tmp_path, REPOSITORY) == set(REPOSITORY[:14])


def test_pickled_weights_are_fetched_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = [file for file in REPOSITORY if not file.endswith(".safetensors")]
    found = fetched(monkeypatch, tmp_path, repository)
    assert "pytorch_model.bin" in found
    assert not found & {"training_args.bin", "consolidated.00.pth", "checkpoint-500/optimizer.pt"}


def test_the_modules_of_an_embedding_model_are_fetched_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = fetched(monkeypatch, tmp_path, [*REPOSITORY, "modules.json"])
    assert found == {*REPOSITORY[:14], "modules.json", "2_Dense/model.safetensors", "2_Dense/config.json"}


def test_a_config_alone_is_fetched_for_a_look_at_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **options: asked.append(options) or tmp_path)
    source.open_source("owner/name", config_only=True)
    assert [options["allow_patterns"] for options in asked] == [["config.json"]]


def test_a_snapshot_of_the_hubs_cache_has_the_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--my--model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    found = open_source(folder)
    assert (found.name, found.base_model) == ("owner/my--model", "owner/my--model")
    (other := tmp_path / "snapshots" / "models--a--b").mkdir(parents=True)
    assert (open_source(other).name, open_source(other).base_model) == ("models--a--b", None)


def test_a_model_that_is_pruned_again_keeps_base_model_and_licence(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    make_model(find("llama-gqa")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n", encoding="utf-8")
    options: Any = {"preset": "paper", "calibration": ["Red, green and blue."], "samples": 1}
    prune(folder, tmp_path / "once", ratio=0.1, **options)
    prune(tmp_path / "once", tmp_path / "twice", ratio=0.1, **options)
    for out in ("once", "twice"):
        card = (tmp_path / out / "README.md").read_text(encoding="utf-8")
        assert "license: apache-2.0" in card
        assert "base_model:\n- owner/name" in card
        assert "language:\n- en" in card


def test_inspect_lists_what_an_output_has_beside_its_weights(tmp_path: Path) -> None:
    make_model(find("llama-gqa")).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    left = ("checkpoint-500/optimizer.pt", "checkpoint-500/trainer_state.json")
    for name in (*left, "model.onnx_data", "LICENSE", "a.md"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("", encoding="utf-8")
    (tmp_path / "model" / "key").symlink_to("/etc/passwd")
    found = inspect(tmp_path / "model")
    assert set(found.left_out) == {*left, "key (a link out of the folder)"}
    prune(tmp_path / "model", tmp_path / "out", ratio=0.2, preset="paper", calibration=["A fox."], samples=1)
    made = {"README.md", "amprune", "config.json", "model.safetensors"}
    assert set(found.carried) | made == {file.name for file in (tmp_path / "out").iterdir()}
