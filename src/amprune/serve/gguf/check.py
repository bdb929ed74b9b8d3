"""Proof of an export: what the GGUF file says of its sizes, and the tokens that llama.cpp generates with it."""

from dataclasses import dataclass

import torch

from amprune.errors import ExportError
from amprune.model.gguf_file import GgufFile
from amprune.model.llama_cpp import llama_cpp_model
from amprune.model.reader import Checkpoint
from amprune.prove.comparison import finite, probe_ids, probe_logits, token_gaps
from amprune.serve.gguf.convert import KINDS

PROMPT, NEW = 8, 16


@dataclass(frozen=True)
class TokenCheck:
    """Greedy tokens of llama.cpp, each judged by transformers' logits after the same tokens, in float32."""

    runtime: str
    """What ran the file, with its version."""
    tokens: int
    agreed: int
    """Tokens that transformers would have chosen."""
    largest_gap: float
    """How far below the best the worst token's logit lies, in standard deviations of the logits; 0 where all agree."""


def check_sizes(file: GgufFile, checkpoint: Checkpoint) -> None:
    """Holds the sizes in the header to those of the checkpoint."""
    shape = checkpoint.shape
    expected = {
        "block_count": shape.num_layers,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
    }
    # Where the file leaves one out, llama.cpp takes these.
    heads = file.fields.get("attention.head_count", shape.num_attention_heads)
    width = file.fields.get("embedding_length", shape.hidden_size) // heads
    assumed = {
        "attention.head_count_kv": heads, "attention.key_length": width, "attention.value_length": width,
    }  # fmt: skip
    for name, value in expected.items():
        found = file.fields.get(name, assumed.get(name))
        # Some converters of llama.cpp write a list, one entry a layer.
        if found != value and not (isinstance(found, list) and set(found) == {value}):
            raise ExportError(
                f"the converted file says {file.architecture}.{name} = {found}, but the checkpoint has {value}; this "
                "version of llama.cpp cannot hold the shape: remove neurons alone (--only neurons), or try a newer one"
            )


def check_tokens(file: GgufFile, checkpoint: Checkpoint, *, threads: int) -> TokenCheck:
    """Lets llama.cpp generate greedily, and transformers judge every token, with the checkpoint streamed once."""
    prompts = probe_ids(checkpoint, PROMPT)
    with llama_cpp_model(file, positions=PROMPT + NEW, threads=threads, exact=True) as model:
        generated = [model.generate(prompt.tolist(), NEW).tokens for prompt in prompts]
        version = f"xllamacpp {model.version}"
    if any(len(tokens) != NEW for tokens in generated):
        raise ExportError(f"llama.cpp generated {[len(tokens) for tokens in generated]} tokens, expected {NEW} each")
    chosen = torch.tensor(generated)
    logits = finite(
        probe_logits(checkpoint, torch.cat([prompts, chosen], dim=1), dtype=torch.float32),
        ExportError(
            f"{checkpoint.folder} gives logits that are not finite, so that nothing can be said of the converted file; "
            "look for weights that are not finite, or make the model again"
        ),
    )
    gaps = token_gaps(logits[:, prompts.shape[1] - 1 : -1], chosen, never=file.control_tokens)
    found = TokenCheck(version, gaps.numel(), int((gaps == 0).sum()), float(gaps.max()))
    allowed = KINDS[file.type].largest_gap if file.type in KINDS else None
    if allowed is not None and not found.largest_gap <= allowed:
        raise ExportError(
            f"llama.cpp chooses other tokens than transformers with the converted file: {found.agreed} of "
            f"{found.tokens} agree, and one lies {found.largest_gap:.2g} standard deviations of the logits below the "
            f"best, expected at most {allowed:g} for {file.type}; this version of llama.cpp computes another model"
        )
    return found
