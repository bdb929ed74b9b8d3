"""Prunes tiny models with the installed transformers, and reads them again with another's.

PYTHONPATH=tests python tests/model/across_versions.py prune FOLDER   # dense and pruned models, what they compute
PYTHONPATH=tests python tests/model/across_versions.py read FOLDER    # what this transformers makes of them
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_calibration import CALIBRATION
from tiny_models import VOCABULARY, Tiny, config_of, find, make_model
from transformers import AutoModelForCausalLM

from amprune import apply_plan, make_plan, score, verify
from amprune.records import read_object, write

_SOME = {"heads_ratio": 0.34, "neurons_ratio": 0.3}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def _turned(identifier: str) -> Tiny:
    """A variant that turns its queries and keys by other angles than a config that is misread gives."""
    tiny = find(identifier)
    return Tiny(tiny.model_type, tiny.variant, {**tiny.entries, **_ROPE})


MODELS: dict[str, tuple[Tiny, dict[str, Any]]] = {
    "llama": (_turned("llama-gqa"), {"heads_ratio": 0.5, "neurons_ratio": 0.3}),
    "llama-as-mistral": (_turned("llama-gqa"), _SOME),
    "llama-as-granite": (_turned("llama-biases"), _SOME),
    "qwen2": (_turned("qwen2-gqa"), _SOME),
    "qwen3": (_turned("qwen3-gqa"), _SOME),
    "gemma2": (_turned("gemma2-gqa"), _SOME),
    "gemma3": (find("gemma3_text-gqa"), _SOME),
    "phi3": (_turned("phi3-gqa"), _SOME),
    "phi": (find("phi-gqa"), _SOME),
    "gpt2": (find("gpt2-mha"), {"ratio": 0.1}),
    "gpt_neox": (find("gpt_neox-mha"), {"ratio": 0.1}),
}
OLD_STYLE = "llama-of-transformers-4-as-mistral"
"""A config.json as transformers 4 wrote it: the angles in an entry of its own, which no 5 writes."""
NAMES = (*MODELS, OLD_STYLE)


def _save_dense(name: str, folder: Path) -> dict[str, Any]:
    tiny, request = MODELS["llama-as-mistral" if name == OLD_STYLE else name]
    make_model(tiny).save_pretrained(folder)
    if name == OLD_STYLE:
        write(folder / "config.json", {**config_of(find("llama-gqa")), "rope_theta": 500.0})
    return request


def _logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


def _record(place: Path, by: str, **said: Any) -> None:
    """Keeps what a pruned model computes and what is said of it."""
    save_file({"logits": _logits(place / "pruned")}, place / f"{by}.safetensors")
    write(place / f"{by}.json", {"transformers": transformers.__version__, **said})


def prune(folder: Path) -> None:
    """Saves and prunes every model."""
    for name in NAMES:
        dense, request = folder / name / "dense", _save_dense(name, folder / name / "dense")
        apply_plan(
            dense, make_plan(score(dense, calibration=CALIBRATION, preset="paper"), **request), folder / name / "pruned"
        )
        _record(folder / name, "writer")


def read(folder: Path) -> None:
    """Loads and verifies every model that another transformers left."""
    for name in NAMES:
        report = verify(folder / name / "pruned", dense=folder / name / "dense")
        _record(folder / name, "reader", verified=report.passed)


def recorded(place: Path, by: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns the logits that the writer or the reader of a model has found, and what it says."""
    return load_file(place / f"{by}.safetensors")["logits"], read_object(place / f"{by}.json")


if __name__ == "__main__":
    {"prune": prune, "read": read}[sys.argv[1]](Path(sys.argv[2]))
