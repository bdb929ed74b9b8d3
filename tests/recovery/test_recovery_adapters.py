"""Adapters: where they lie, that merging them is what PEFT does, and that a bad merge is noticed."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import ALL, GQA, Tiny, make_model
from tiny_recovery import load, save_tiny, settings, weights
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from amprune import RecoveryError
from amprune.model.reader import read_checkpoint
from amprune.model.writer import RECORDS
from amprune.recovery import merging
from amprune.recovery.merging import Update, read_adapter, write_recovered
from amprune.recovery.models import with_adapters

FAMILIES = ["llama-gqa", "phi3-gqa", "gpt2-mha", "phi-mha", "opt-mha", "gpt_neox-mha"]
QUERY = "model.layers.0.self_attn.q_proj.weight"
ONE_EACH = {tiny.model_type: tiny.id for tiny in reversed(ALL)}


def save_adapter(model: Path, folder: Path, *, size: float = 0.1, alpha: float = 16) -> Path:
    """Saves an adapter of random values."""
    torch.manual_seed(5)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = with_adapters(dense, settings(lora_rank=3, lora_alpha=alpha))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def merged(model: Path, adapter: Path, out: Path) -> float:
    (out / RECORDS).mkdir(parents=True)
    return write_recovered(read_checkpoint(model), adapter, out)


def by_peft(model: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():  # of transformers about PEFT
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(load(model), adapter)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(160, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", ONE_EACH.values(), ids=ONE_EACH)
def test_every_linear_layer_but_the_head_has_an_adapter_in_float32(family: str) -> None:
    dense = make_model(next(tiny for tiny in ALL if tiny.id == family), dtype=torch.bfloat16)
    head = dense.get_output_embeddings()
    expected = {
        name
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    trained = {
        name.removeprefix("base_model.model."): parameter.dtype
        for name, parameter in with_adapters(dense, settings()).named_parameters()
        if parameter.requires_grad
    }
    assert {name.split(".lora_")[0] for name in trained} == expected
    assert set(trained.values()) == {torch.float32}
    assert len(expected) % dense.config.num_hidden_layers == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_compute_what_peft_computes(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    adapter = save_adapter(model, tmp_path / "adapter")
    assert merged(model, adapter, tmp_path / "out") < 1e-6
    theirs = by_peft(model, adapter)
    beside = logits(theirs)
    ours = logits(load(tmp_path / "out"))
    torch.testing.assert_close(ours, logits(theirs.merge_and_unload()), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, beside, atol=1e-5, rtol=1e-5)
    assert float((ours - logits(load(model))).abs().max()) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2-mha"])
def test_sums_are_made_in_float32_and_rounded_once(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family, dtype=dtype)
    adapter = save_adapter(model, tmp_path / "adapter")
    rounding = merged(model, adapter, tmp_path / "out")
    before, after = read_checkpoint(model), read_checkpoint(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 3
    changed = 0
    for name in before:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{module}.lora_A.weight" in factors:
            product = 16 / 3 * (factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"])
            expected = (expected.float() + (product.T if family.startswith("gpt2") else product)).to(dtype)
            changed += not torch.equal(expected, before[name])
        assert after[name].dtype == dtype
        assert torch.equal(after[name], expected), name
    assert changed == 2 * len(factors) / 4
    assert 1e-5 < rounding < 0.05


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied")
    merged(model, save_adapter(model, tmp_path / "adapter"), tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(model).keys()
    assert "lm_head.weight" not in weights(tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_tensors_keep_the_names_and_the_shards_that_loaders_know(tmp_path: Path) -> None:
    """The original GPT-2 lacks the prefix of the base model and holds the head that is tied."""
    model = save_tiny(tmp_path / "model", "gpt2-mha")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in weights(model).items()}
    stored["lm_head.weight"] = stored["wte.weight"].clone()
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / RECORDS).mkdir(parents=True)
    adapter = save_adapter(model, tmp_path / "adapter")
    write_recovered(read_checkpoint(model), adapter, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = weights(tmp_path / "out")
    assert found.keys() == stored.keys()
    assert torch.equal(found["wte.weight"], found["lm_head.weight"])
    theirs = by_peft(model, adapter).merge_and_unload()
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(theirs), atol=1e-5, rtol=0)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_model_trained_in_full_is_taken_as_it_is(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied", dtype=torch.bfloat16)
    trained = save_tiny(tmp_path / "trained", "llama-tied", seed=1)
    merged(model, trained, tmp_path / "out")
    expected = {name: tensor.bfloat16() for name, tensor in weights(trained).items()}
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# What is noticed.


OTHERS = {
    "more layers": (Tiny("llama", "deep", {**GQA, "head_dim": 16, "num_hidden_layers": 3}), "tensor model.layers.2"),
    "wider": (Tiny("llama", "wide", {**GQA, "head_dim": 16, "intermediate_size": 96}), r"by a matrix of \(48, 96\)"),
    "another family": (Tiny("gpt_neox", "mha", {"num_attention_heads": 6}), "has no tensor gpt_neox.layers.0"),
}  # fmt: skip


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_the_adapter_of_another_model_is_refused(other: Tiny, message: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    adapter = save_adapter(save_tiny(tmp_path / "other", other), tmp_path / "adapter")
    with pytest.raises(RecoveryError, match=f"adapter is the adapter of another model: .*{message}"):
        merged(model, adapter, tmp_path / "out")


@pytest.mark.parametrize("damage", ["no weights", "half the weights", "half a pair", "no config"])
def test_a_damaged_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    if damage == "no weights":
        file.unlink()
    elif damage == "half the weights":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "half a pair":
        save_file(dict(list(load_file(file).items())[:-1]), file)
    else:
        (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(RecoveryError, match=r"adapter (holds no adapter|is no LoRA adapter), or a damaged one: "):
        read_adapter(adapter, read_checkpoint(model))


@pytest.mark.parametrize("noticed", ["merged wrongly", "written wrongly"])
def test_a_merge_that_went_wrong_is_noticed(noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    adapter = save_adapter(model, tmp_path / "adapter")
    if noticed == "merged wrongly":
        right = Update.to_weight
        monkeypatch.setattr(Update, "to_weight", lambda update: 1.001 * right(update))
        message = r"merged model's logits differ from those of the model with its adapter by \d\.\de-\d\d"
    else:
        written = merging.write_shards

        def write(folder: Path, *arguments: Any, **options: Any) -> Any:
            found = written(folder, *arguments, **options)
            stored = load_file(folder / "model.safetensors")
            stored[QUERY][0, 0] += 0.5
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
            return found

        monkeypatch.setattr(merging, "write_shards", write)
        message = f"out: tensor {QUERY} is not what was merged; is the disk sound"
    with pytest.raises(RecoveryError, match=message):
        merged(model, adapter, tmp_path / "out")


def test_a_folder_that_does_not_load_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr("amprune.prove.comparison.loading_problems", lambda _: {"missing_keys": ["lm_head.weight"]})
    with pytest.raises(RecoveryError, match=r"from_pretrained finds 1 missing keys, such as lm_head\.weight"):
        merged(model, adapter, tmp_path / "out")


def test_weights_that_are_not_finite_are_not_handed_out(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    trained = shutil.copytree(model, tmp_path / "trained")
    stored = weights(trained)
    stored[QUERY][0, 0] = torch.nan
    save_file(stored, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecoveryError, match=r"logits .* are not finite"):
        merged(model, trained, tmp_path / "out")
