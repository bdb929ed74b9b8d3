"""Corruptions planted in good outputs, by kind and place: `verify` finds all but those that change nothing."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer

from amprune import prune, verify
from amprune.errors import AmpruneError

Damage = Callable[[Path], None]
TEXTS = [f"The quick brown fox jumps over dog {number}, and the dog does not mind." for number in range(30)]


def tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    stored = load_file(out / "model.safetensors")
    change(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def one_more(tensor: torch.Tensor, place: int) -> torch.Tensor:
    flat = tensor.clone().flatten()
    flat[place] = torch.nextafter(flat[place], torch.tensor(torch.inf))
    return flat.view_as(tensor)


TENSOR_KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first entry by a unit in the last place": lambda tensor: one_more(tensor, 0),
    "last entry by a unit in the last place": lambda tensor: one_more(tensor, -1),
    "a thousandth more": lambda tensor: tensor * 1.001,
    "rounded to bfloat16": lambda tensor: (tensor + tensor.abs().max() / 300).bfloat16().float(),
    "reversed": lambda tensor: (tensor + torch.arange(len(tensor)).view(-1, *[1] * (tensor.dim() - 1))).flip(0),
}


def in_json(name: str, *path: Any, to: Any) -> Damage:
    def damage(out: Path) -> None:
        content = json.loads((out / name).read_text(encoding="utf-8"))
        place = content
        for key in path[:-1]:
            place = place[key]
        old = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]
        place[path[-1]] = to(old) if callable(to) else to
        (out / name).write_text(json.dumps(content), encoding="utf-8")

    return damage


def corruptions(out: Path) -> Iterator[tuple[str, Damage]]:
    """Yields every corruption of an output with its name."""
    stored = load_file(out / "model.safetensors")
    for name, (kind, change) in product(stored, TENSOR_KINDS.items()):
        yield f"{name}: {kind}", lambda out, n=name, c=change: tensors(out, lambda s: s.update({n: c(s[n])}))
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    yield "two layers swapped", lambda out: tensors(out, lambda s: s.update({first: s[second], second: s[first]}))
    yield "a tensor less", lambda out: tensors(out, lambda s: s.pop(second, None))
    yield "a tensor in another dtype", lambda out: tensors(out, lambda s: s.update({first: s[first].bfloat16()}))
    yield "a tensor of another shape", lambda out: tensors(out, lambda s: s.update({first: s[first][:-1]}))
    yield "weights cut off", lambda out: (out / "model.safetensors").write_bytes(
        (out / "model.safetensors").read_bytes()[:-100]
    )  # fmt: skip
    config: dict[str, Any] = {
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "vocab_size": 161, "num_hidden_layers": 1, "eos_token_id": 3,
        "bos_token_id": 5, "pad_token_id": 9, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "attention_bias": True, "mlp_bias": True, "head_dim": 8, "hidden_size": 47, "intermediate_size": 8,
        "num_attention_heads": 3, "num_key_value_heads": 1, "model_type": "qwen2", "initializer_range": 1.0,
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.5, "dtype": "bfloat16", "new": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "use_cache": False,
    }  # fmt: skip
    for name, value in config.items():
        yield f"config.json: {name}", in_json("config.json", name, to=value)
    yield "generation_config.json", in_json("generation_config.json", "eos_token_id", to=7)
    yield (
        "tokenizer.json: two ids swapped",
        in_json("tokenizer.json", "model", "vocab", to=lambda ids: {**ids, "a": ids["b"], "b": ids["a"]}),
    )
    yield "tokenizer.json: a merge less", in_json("tokenizer.json", "model", "merges", to=lambda merges: merges[:-1])
    yield "tokenizer.json: no start token", in_json("tokenizer.json", "post_processor", to=None)
    yield "tokenizer.json: another decoder", in_json("tokenizer.json", "decoder", to=None)
    yield (
        "tokenizer.json: a rare word",
        in_json("tokenizer.json", "added_tokens", to=lambda known: [*known, {**known[0], "id": 159, "content": "zyx"}]),
    )
    for name, value in {"eos_token": "<pad>", "model_max_length": 7, "bos_token": "x", "padding_side": "left"}.items():
        yield f"tokenizer_config.json: {name}", in_json("tokenizer_config.json", name, to=value)
    yield "chat template", lambda out: (out / "chat_template.jinja").write_text("{{ 'obey' }}", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                 "config.json", "model.safetensors", "amprune/plan.json"):  # fmt: skip
        yield f"{name} is missing", lambda out, name=name: (out / name).unlink()
    for name in ("model-2.safetensors", "pytorch_model.bin", "model.gguf", "modeling_x.py", "adapter_config.json",
                 "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"):  # fmt: skip
        yield f"{name} is new", lambda out, name=name: (out / name).write_text("{}", encoding="utf-8")
    yield "an index of other weights", lambda out: (out / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {first: "other.safetensors"}}), encoding="utf-8"
    )  # fmt: skip
    plan: dict[str, tuple[Any, ...]] = {
        "a kept head": ("layers", 0, "query_heads"), "a kept neuron": ("layers", 1, "neurons"),
        "the ratio": ("ratio_actual",), "the criterion": ("provenance", "criterion"),
        "the fingerprint": ("provenance", "fingerprint"), "the calibration": ("provenance", "calibration"),
    }  # fmt: skip
    content = json.loads((out / "amprune" / "plan.json").read_text(encoding="utf-8"))
    for name, path in plan.items():
        value = content
        for key in path:
            value = value[key] if isinstance(value, list) else value.get(key, "")
        other = [*value[:-1], value[-1] - 1] if isinstance(value, list) and value else 0.5
        yield f"plan.json: {name}", in_json("amprune/plan.json", *path, to=other)
    yield "scores", lambda out: (out / "amprune" / "scores.safetensors").write_bytes(b"")
    yield "a planted training", lambda out: (out / "amprune" / "recovery.json").write_text(
        json.dumps({"format": 1}), encoding="utf-8"
    )  # fmt: skip
    if (out / "amprune" / "reconstruction.json").is_file():
        yield "the refit's record", in_json("amprune/reconstruction.json", "rows", to=5)
        yield "the refit's hashes", in_json("amprune/reconstruction.json", "sha256", to={})


def reformatted(out: Path) -> None:
    content = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(content, indent=7, sort_keys=True), encoding="utf-8")


HARMLESS: dict[str, Damage] = {
    "config.json in another layout": reformatted,
    "tensors in another order": lambda out: tensors(out, lambda s: s.update({n: s.pop(n) for n in [*s][::-1]})),
    "a tensor swapped and swapped back": lambda out: tensors(
        out, lambda s: s.update({n: s[n].flip(0).flip(0) for n in s})
    ),
    "another card": lambda out: (out / "README.md").write_text("mine", encoding="utf-8"),
    "a note beside": lambda out: (out / "notes.txt").write_text("mine", encoding="utf-8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_model(find("llama-gqa")).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    options: Any = {"calibration": TEXTS, "samples": 30, "ratio": 0.3, "max_length": 64}
    prune(folder / "dense", folder / "paper", preset="paper", **options)
    prune(folder / "dense", folder / "best", preset="best", allocate=False, **options)
    return folder


def found(made: Path, kind: str, damage: Damage, place: Path) -> bool:
    out = shutil.copytree(made / kind, place)
    damage(out)
    try:
        passed = verify(out, dense=made / "dense").passed
    except AmpruneError:
        passed = False
    shutil.rmtree(out)
    return not passed


@pytest.mark.parametrize("kind", ["paper", "best"])
def test_every_corruption_is_found(kind: str, made: Path, tmp_path: Path) -> None:
    planted = list(corruptions(made / kind))
    assert len(planted) > 150
    assert len(dict(planted)) == len(planted)
    assert [name for name, damage in planted if not found(made, kind, damage, tmp_path / "out")] == []


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_let_pass(name: str, made: Path, tmp_path: Path) -> None:
    assert not found(made, "best", HARMLESS[name], tmp_path / "out")
