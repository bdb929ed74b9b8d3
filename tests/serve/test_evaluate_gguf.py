"""GGUF files among the models that are measured: their own bytes, speed in llama.cpp, quality of their weights."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers
from tiny_gguf import WORDS, save_dense, save_pruned
from transformers import AutoModelForCausalLM

from amprune import EvaluationError, LatencySettings, evaluate, export_gguf
from amprune.errors import CheckpointError
from amprune.evaluation.energy import energy_records
from amprune.evaluation.records import Evaluation, Record
from amprune.model.gguf_file import read_gguf
from amprune.model.latency import generation_run
from amprune.model.llama_cpp import llama_cpp_model
from amprune.model.source import open_source
from amprune.records import read_object
from amprune.running import no_progress
from amprune.settings import EvaluationSettings

reads_gguf = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"), reason="needs transformers 5.20, which reads the tokenizers of GGUF files"
)
CASE = LatencySettings(prompt_tokens=4, new_tokens=6, warmup=1, runs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    pruned = save_pruned(save_dense(place / "dense", "llama"), place / "pruned", heads=0.34)
    for kind in ("f32", "q8_0"):
        export_gguf(pruned, place / f"{kind}.gguf", type=kind, check=False)
    (place / "text.txt").write_text(f"{WORDS} " * 20)
    return place


def one(evaluation: Evaluation, model: str, measurement: str, metric: str) -> Record:
    (found,) = (record for record in evaluation.of(model, measurement) if record.metric == metric)
    return found


@reads_gguf
def test_a_gguf_file_is_measured_beside_the_checkpoint_that_it_was_made_from(folder: Path) -> None:
    models = [folder / "pruned", folder / "f32.gguf", folder / "q8_0.gguf"]
    found = evaluate(
        models, folder / "evaluation.json", measure=["perplexity", "latency"], texts=[folder / "text.txt"],
        sequence_length=64, windows=4, latency=[CASE], dtype="float32", device="cpu",
    )  # fmt: skip
    whole, same, small = (one(found, name, "perplexity", "perplexity") for name in ("pruned", "f32.gguf", "q8_0.gguf"))
    assert same.value == pytest.approx(whole.value, rel=1e-4)
    assert small.value == pytest.approx(whole.value, rel=0.05)
    assert small.value != whole.value
    assert small.note == "q8_0 weights, dequantised and run by transformers"
    assert whole.note is None
    header = read_gguf(folder / "q8_0.gguf")
    assert one(found, "q8_0.gguf", "size", "weight_bytes").value == header.weight_bytes
    assert one(found, "q8_0.gguf", "size", "weight_bytes_per_token").value == header.weight_bytes_per_token
    assert header.weight_bytes_per_token < header.weight_bytes  # of the embedding table a row is read
    assert one(found, "q8_0.gguf", "size", "kv_cache_bytes_per_token").value == 2 * 2 * (2 * 16) * 2
    assert found.models["q8_0.gguf"].dtype == "q8_0"
    assert found.models["q8_0.gguf"].sha256 != found.models["f32.gguf"].sha256
    runs = {name: one(found, name, "latency", "decode") for name in ("pruned", "f32.gguf", "q8_0.gguf")}
    assert {name: run.settings["mode"] for name, run in runs.items()} == {
        "pruned": "eager", "f32.gguf": "llama.cpp", "q8_0.gguf": "llama.cpp",
    }  # fmt: skip
    assert len({run.items_hash for run in runs.values()}) == 1  # interleaved
    assert all(len(run.items) == 3 and min(run.items) > 0 for run in runs.values())
    assert str(runs["q8_0.gguf"].note).startswith("by llama.cpp, xllamacpp ")
    assert runs["f32.gguf"].settings == runs["q8_0.gguf"].settings  # so that a report sets them side by side


MHA = {"num_attention_heads": 6, "num_key_value_heads": 6}
SEVERAL_LLAMAS: list[tuple[str, dict[str, Any], float, str]] = [
    ("llama", MHA, 0.17, "mistral"),  # five heads, which LlamaConfig refuses
    ("qwen2", {}, 0.34, "llama"),  # with biases of queries, keys and values
    ("llama", {**MHA, "attention_bias": True, "mlp_bias": True}, 0.0, "llama"),
]


@reads_gguf
@pytest.mark.parametrize(("family", "entries", "heads", "written_as"), SEVERAL_LLAMAS)
def test_whatever_llama_cpp_calls_llama_is_dequantised_to_what_was_exported(
    family: str, entries: dict[str, Any], heads: float, written_as: str, tmp_path: Path
) -> None:
    pruned = save_pruned(save_dense(tmp_path / "dense", family, **entries), tmp_path / "pruned", heads=heads)
    export_gguf(pruned, tmp_path / "f32.gguf", type="f32", check=False)
    assert read_gguf(tmp_path / "f32.gguf").architecture == "llama"
    source = open_source(tmp_path / "f32.gguf", dtype="float32")
    assert read_object(source.folder / "config.json")["model_type"] == written_as
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits
            for place in (source.folder, pruned)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@reads_gguf
def test_a_file_of_which_transformers_leaves_weights_out_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = gguf.GGUFReader(folder / "f32.gguf")
    kind = SimpleNamespace(name="F32")
    more = SimpleNamespace(name="blk.0.more.bias", shape=[7], n_elements=7, n_bytes=28, tensor_type=kind)
    reader.tensors.append(more)
    ours, theirs = iter([reader]), gguf.GGUFReader  # amprune's own reader comes before that of transformers
    monkeypatch.setattr(gguf, "GGUFReader", lambda *given: next(ours, None) or theirs(*given))
    shutil.copy(folder / "f32.gguf", tmp_path / "more.gguf")
    with pytest.raises(
        CheckpointError, match=r"more.gguf has \d+,\d+ weights, of which transformers reads .* as a llama"
    ):
        open_source(tmp_path / "more.gguf")


@reads_gguf
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"split.count": 2, "split.no": 0}, r"is part 1 of 2 of a model; join the parts"),
        ({"block_count": 99}, r"says block_count 99, but its \d+ tensors have 2; it is incomplete or damaged"),
        ({"block_count": 2**31}, r"says block_count 2,147,483,648, but its"),
        ({"embedding_length": 2**20}, r"says embedding_length 1,048,576, but its \d+ tensors have 96"),
        ({"feed_forward_length": 2**20}, r"says feed_forward_length 1,048,576, but its"),
        ({"-": "blk.1."}, r"says block_count 2, but its \d+ tensors have 1"),
        ({"-": "blk.1.attn_q"}, r"lacks 1 tensors of a llama, such as model.layers.1.self_attn.q_proj.weight"),
        ({"-": "output_norm"}, r"lacks 1 tensors of a llama, such as model.norm.weight"),
        ({"-": ""}, r"says block_count 2, but its 0 tensors have others"),
    ],
)
def test_a_part_of_a_model_is_never_taken_for_the_whole(
    damage: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    """Nothing is drawn at random in the place of what a file lacks."""
    file = rewritten(folder / "f32.gguf", tmp_path / "damaged.gguf", damage)
    with pytest.raises(CheckpointError, match=message):
        open_source(file)


def rewritten(source: Path, target: Path, damage: dict[str, Any]) -> Path:
    """Copies a GGUF file with other fields, and without the tensors whose names begin with that of `-`."""
    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, kind)
    own = {name if name.startswith("split.") else f"{kind}.{name}": value for name, value in damage.items()}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        types = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, own.pop(field.name, field.contents()), field.types[0], sub_type=types)
    for name, value in own.items():
        if not name.endswith(".-"):
            writer.add_uint16(name, value)
    for tensor in reader.tensors:
        if "-" not in damage or not tensor.name.startswith(damage["-"]):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@reads_gguf
def test_a_file_of_which_transformers_would_rotate_another_part_of_each_head_is_refused(tmp_path: Path) -> None:
    """Transformers takes half of each head for every Nemotron."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    for factor in (0.5, 1.0):
        rotated = {"rope_parameters": {**rope, "partial_rotary_factor": factor}}
        dense = save_dense(tmp_path / f"{factor}", "nemotron", **rotated)
        export_gguf(dense, tmp_path / f"{factor}.gguf", type="f32", check=False)
    assert open_source(tmp_path / "0.5.gguf").folder.is_dir()
    with pytest.raises(CheckpointError, match=r"1.0.gguf rotates 16 numbers of each head, but transformers reads 8"):
        open_source(tmp_path / "1.0.gguf")


def test_a_run_whose_energy_is_measured_generates_as_many_tokens(folder: Path) -> None:
    with llama_cpp_model(read_gguf(folder / "q8_0.gguf"), positions=16, threads=1) as model:
        assert generation_run(model, CASE)() == 6
        figures = energy_records(CASE, EvaluationSettings(energy_seconds=1.0), {"q8": model}, no_progress)
    assert figures["q8"][0].settings["mode"] == "llama.cpp"


@reads_gguf
@pytest.mark.parametrize("case", [LatencySettings(batch_size=2), LatencySettings(mode="compile")])
def test_cases_that_llama_cpp_does_not_run_are_refused_before_anything_is_measured(
    case: LatencySettings, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"q8_0.gguf is a GGUF file.*--latency-batch 1 --mode eager"):
        evaluate([folder / "q8_0.gguf"], tmp_path / "e.json", measure=["latency"], latency=[case])
    with pytest.raises(EvaluationError, match=r"mode of a latency run is 'llama.cpp', expected eager or compile"):
        evaluate([folder / "pruned"], tmp_path / "e.json", latency=[LatencySettings(mode="llama.cpp")])
    assert not (tmp_path / "e.json").exists()
