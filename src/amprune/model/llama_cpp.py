"""GGUF files run by llama.cpp, through xllamacpp, in this process."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from amprune.errors import ExportError, reason
from amprune.model.gguf_file import GgufFile
from amprune.model.llama_cpp_tools import import_runtime


@dataclass(frozen=True)
class Generated:
    """What llama.cpp generated greedily, and how long it took by its own clock."""

    tokens: tuple[int, ...]
    prefill: float
    """Seconds from the prompt to the first token."""
    decode: float
    """Seconds from the first token to the last."""


class LlamaCppModel:
    """A GGUF file that llama.cpp holds in memory."""

    def __init__(self, file: GgufFile, server: Any, version: str) -> None:
        self.path = file.path
        self.vocabulary = file.vocabulary
        """Token ids that it embeds."""
        self.version = version
        """Of xllamacpp."""
        self._server = server

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Generated:
        """Generates greedily from token ids; no token that ends a text is chosen."""
        request = {
            "prompt": list(map(int, prompt)), "n_predict": new_tokens, "temperature": 0, "cache_prompt": False,
            "ignore_eos": True, "return_tokens": True, "verbose": True,
        }  # fmt: skip
        try:
            answer = self._server.handle_completions(request)["__verbose"]
            tokens, timings = tuple(answer["tokens"]), answer["timings"]
            return Generated(tokens, timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"llama.cpp failed to generate with {self.path}: {reason(error)}") from error


@contextmanager
def llama_cpp_model(
    file: GgufFile, *, positions: int, threads: int, exact: bool = False, gpu: bool = False
) -> Iterator[LlamaCppModel]:
    """Loads a GGUF file.

    Args:
        file: what is loaded.
        positions: longest sequence.
        threads: of the processor.
        exact: keys and values in float32 and plain attention, as transformers computes in float32; else llama.cpp's own
            settings: keys and values in float16, and flash attention where it has it.
        gpu: layers go to an accelerator that llama.cpp was built for.
    """
    runtime = import_runtime()
    parameters = runtime.CommonParams()
    parameters.model.path = str(file.path)
    # The server rounds a context to multiples of 256.
    parameters.n_ctx, parameters.n_parallel, parameters.fit_params = -(-positions // 256) * 256, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers = 999 if gpu else 0
    parameters.verbosity, parameters.warmup = -1, False
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = runtime.Server(parameters)
    except RuntimeError as error:
        raise ExportError(
            f"llama.cpp (xllamacpp {runtime.__version__}) does not load {file.path}: {reason(error)}"
        ) from error
    model = LlamaCppModel(file, server, str(runtime.__version__))
    try:
        yield model
    finally:
        del server, model._server
        gc.collect()  # the server's threads and memory go with it
