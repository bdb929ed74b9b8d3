"""amprune makes open language models smaller and faster by removing attention heads and MLP neurons.

The stages, each a module that reads and writes files (`pipeline.py` runs them in order):

    MODEL -> score -> scores.safetensors -> make_plan -> plan.json -> apply_plan (and refit) -> OUT -> verify
    OUT -> quantize -> OUT of fewer bits; OUT -> export_gguf -> OUT.gguf, which llama.cpp runs
    OUT -> recover -> OUT; any models -> evaluate -> evaluation.json -> write_report -> report.html

The method is AMP: "Efficient LLMs with AMP: Attention Heads and MLP Pruning", arXiv 2504.21174.
"""

import logging
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# Where they are installed, transformers imports them with itself, and they speak of kernels that this machine lacks.
for _library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_library).setLevel(logging.ERROR)

# The public names are those of __init__.pyi; `import amprune` and `amprune --help` stay instant.
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Imports a public name on first use; where an optional library is missing, says what to type."""
    try:
        return _find(name)
    except ModuleNotFoundError as error:
        from amprune.errors import required

        required(f"amprune.{name}", str(error.name).partition(".")[0])
        raise
