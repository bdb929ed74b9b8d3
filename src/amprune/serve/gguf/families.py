"""Families that llama.cpp cannot hold without some of their heads, and those that it can under another name."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from amprune.errors import UnsupportedModelError
from amprune.model.backends import NARROW_ATTENTION
from amprune.model.reader import Checkpoint
from amprune.records import write

# Model types of which llama.cpp takes the head size to be the hidden size over the heads, and the config under which it
# computes the same without doing so.
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
    if _lacks_heads(checkpoint) and _twin(checkpoint) is None:
        raise UnsupportedModelError(
            f"llama.cpp does not run a {shape.model_type} model with {shape.num_attention_heads} heads of "
            f"{shape.head_dim} on a hidden size of {shape.hidden_size}: of this family it takes the head size to be "
            "the hidden size over the heads; prune neurons alone (--only neurons), or serve it with transformers "
            "or vLLM"
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
        write(Path(place) / "config.json", {**checkpoint.config, **twin, "head_dim": checkpoint.shape.head_dim})
        yield Path(place)


def _lacks_heads(checkpoint: Checkpoint) -> bool:
    shape = checkpoint.shape
    narrow = shape.model_type in {*NARROW_ATTENTION["llama.cpp"], *_TWINS}
    return narrow and shape.num_attention_heads * shape.head_dim != shape.hidden_size


def _twin(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    config = checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) in _PLAIN_ROPE and not config.get("use_sliding_window")
    return _TWINS.get(checkpoint.shape.model_type) if plain else None
