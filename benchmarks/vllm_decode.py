"""Decode speed of checkpoints in vLLM, their runs interleaved, beside the ideal: weight bytes read for one token.

    .venv-serving/bin/python benchmarks/vllm_decode.py dense pruned --runs 11

The first folder is the baseline. Needs the environment of docs/serving.md; prints one row for each other folder.
"""

import argparse
import json
import os
import statistics
import struct
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


def main() -> None:
    """Measures and prints."""
    asked = arguments()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    options: dict[str, Any] = {"dtype": asked.dtype, "enforce_eager": not asked.compile, "kv_cache_memory_bytes": 2**28}
    length = asked.prompt_tokens + asked.new_tokens + 1
    models = {
        folder: LLM(str(folder), skip_tokenizer_init=True, max_model_len=length, enable_prefix_caching=False, **options)
        for folder in asked.folders
    }
    times = interleaved(models, asked)
    baseline = asked.folders[0]
    print(f"{baseline}: {1000 * statistics.median(times[baseline]):.2f} ms a token")
    for folder in asked.folders[1:]:
        ratios = [before / after for before, after in zip(times[baseline], times[folder], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ideal = bytes_per_token(baseline) / bytes_per_token(folder)
        print(f"{folder}: {1000 * statistics.median(times[folder]):.2f} ms a token, {middle:.2f}x as fast", end=" ")
        print(f"(quartiles {low:.2f} to {high:.2f}) of an ideal {ideal:.2f}x")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the models first")
    return parser.parse_args()


def interleaved(models: Mapping[Path, Any], asked: argparse.Namespace) -> dict[Path, list[float]]:
    """Returns seconds for one decoded token of each run: every round runs all models, in an order that turns about."""
    times: dict[Path, list[float]] = {folder: [] for folder in models}
    for round_ in range(asked.runs + 1):
        for folder in list(models)[:: -1 if round_ % 2 else 1]:
            seconds = seconds_per_token(models[folder], asked)
            if round_:  # the first one warms up
                times[folder].append(seconds)
    return times


def seconds_per_token(llm: Any, asked: argparse.Namespace) -> float:
    """Times a long answer and one of a single token: the difference is decoding alone."""
    from vllm import SamplingParams

    taken = []
    for new_tokens in (1, 1 + asked.new_tokens):
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [10 + row] * asked.prompt_tokens} for row in range(asked.batch)]
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        taken.append(time.perf_counter() - start)
    return (taken[1] - taken[0]) / asked.new_tokens


def bytes_per_token(folder: Path) -> int:
    """Counts the bytes of weights that one decoded token reads: all, but of an embedding that is not also the head."""
    tensors = {name: entry for file in folder.glob("*.safetensors") for name, entry in header(file).items()}
    untied = any(name.endswith(HEADS) for name in tensors)
    return sum(
        prod(entry["shape"]) * SIZES[entry["dtype"]]
        for name, entry in tensors.items()
        if not (untied and name.endswith(EMBEDDINGS))
    )


def header(file: Path) -> dict[str, Any]:
    """Reads names, dtypes and shapes of the tensors of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries: dict[str, Any] = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return entries


if __name__ == "__main__":
    main()
