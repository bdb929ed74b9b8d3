"""Data: what llama.cpp cannot hold of the families that amprune prunes."""

from amprune.errors import UnsupportedModelError
from amprune.shape import ModelShape

UNKNOWN: dict[str, str] = {}
"""Model types that llama.cpp does not know, or computes otherwise."""
WHOLE_HEADS: dict[str, str] = {}
"""Model types whose heads must make up the hidden size in llama.cpp, which derives the head size from it."""


def check_family(shape: ModelShape) -> None:
    """Refuses a model that llama.cpp would not load.

    Raises:
        UnsupportedModelError: names llama.cpp, the family and why.
    """
    if reason := UNKNOWN.get(shape.model_type):
        raise UnsupportedModelError(
            f"llama.cpp does not run the family {shape.model_type}: {reason}; serve it with transformers or vLLM"
        )
    width = shape.num_attention_heads * shape.head_dim
    if (reason := WHOLE_HEADS.get(shape.model_type)) and width != shape.hidden_size:
        raise UnsupportedModelError(
            f"llama.cpp does not run a {shape.model_type} model with {shape.num_attention_heads} heads of "
            f"{shape.head_dim} on a hidden size of {shape.hidden_size}: {reason}; prune neurons alone (--only "
            "neurons), or serve it with transformers or vLLM"
        )
