"""Data: what llama.cpp cannot hold of the families that amprune prunes, and what it can hold under another name."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from amprune.checkpoint import Checkpoint, write_json
from amprune.errors import UnsupportedModelError

UNKNOWN: Mapping[str, str] = {}
"""Model types that llama.cpp does not know, or computes otherwise."""

WHOLE_HEADS = frozenset(
    {"cohere", "cohere2", "exaone4", "glm", "jais2", "nemotron", "olmo", "phi", "phi3", "qwen2", "starcoder2"}
)
"""Model types whose heads must make up the hidden size: llama.cpp takes the query projection to be square."""

# Model types that need whole heads, and the config under which llama.cpp computes the same without that need.
_TWINS: Mapping[str, Mapping[str, Any]] = {
    # Llama with biases of queries, keys and values, which llama.cpp takes where they are there.
    "qwen2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": False},
}
_PLAIN_ROPE = ("default", "linear")


def check_family(checkpoint: Checkpoint) -> None:
    """Refuses a model that llama.cpp would not load.

    Raises:
        UnsupportedModelError: names llama.cpp, the family and why.
    """
    shape = checkpoint.shape
    if reason := UNKNOWN.get(shape.model_type):
        raise UnsupportedModelError(
            f"llama.cpp does not run the family {shape.model_type}: {reason}; serve it with transformers or vLLM"
        )
    if _lacks_heads(checkpoint) and _twin(checkpoint) is None:
        raise UnsupportedModelError(
            f"llama.cpp does not run a {shape.model_type} model with {shape.num_attention_heads} heads of "
            f"{shape.head_dim} on a hidden size of {shape.hidden_size}: of this family it takes the query projection "
            "to be square; prune neurons alone (--only neurons), or serve it with transformers or vLLM"
        )


@contextmanager
def as_known(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yields what to convert: the checkpoint's folder, or links to its files beside a config that computes the same."""
    twin = _twin(checkpoint) if _lacks_heads(checkpoint) else None
    if twin is None:
        yield checkpoint.folder
        return
    with TemporaryDirectory(prefix="amprune-twin-") as place:
        for file in checkpoint.folder.iterdir():
            if file.is_file() and file.name != "config.json":
                os.symlink(file.resolve(), Path(place) / file.name)
        write_json(Path(place) / "config.json", {**checkpoint.config, **twin, "head_dim": checkpoint.shape.head_dim})
        yield Path(place)


def _lacks_heads(checkpoint: Checkpoint) -> bool:
    shape = checkpoint.shape
    return shape.model_type in WHOLE_HEADS and shape.num_attention_heads * shape.head_dim != shape.hidden_size


def _twin(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    config = checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) in _PLAIN_ROPE and not config.get("use_sliding_window")
    return _TWINS.get(checkpoint.shape.model_type) if plain else None
