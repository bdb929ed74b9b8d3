"""Writes a random checkpoint of about 1.7 GB, applies a plan to it and prints what memory that took, as JSON.

    python tests/cut/apply_memory.py FOLDER [SOURCE_SHARD_SIZE]

The peak is that of the process above what the imports take, in MB (Linux: VmHWM of /proc/self/status).
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import amprune
import amprune.cut.run  # the imports are part of the baseline
from amprune.model.architecture import describe
from amprune.model.files import TensorHeader
from amprune.model.reader import read_checkpoint
from amprune.model.writer import write_shards
from amprune.records import write
from amprune.scoring.scores import ImportanceScores, LayerScores

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}


def make_checkpoint(folder: Path, shard_size: str) -> None:
    """Writes random weights shard by shard."""
    folder.mkdir(parents=True)
    write(folder / "config.json", CONFIG)
    shapes = describe(CONFIG).tensors
    headers = {name: TensorHeader(shape, torch.bfloat16) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)

    def weights(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)

    write_shards(folder, headers, weights, max_shard_size=shard_size)


def peak_mb() -> float:
    """Returns the most memory that this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main(folder: Path, shard_size: str) -> None:
    """Runs and prints."""
    dense = folder / "dense"
    if not dense.exists():
        make_checkpoint(dense, shard_size)
        return
    baseline = peak_mb()
    checkpoint = read_checkpoint(dense)
    shape, random = checkpoint.shape, np.random.default_rng(0)
    layers = tuple(
        LayerScores(*(random.random(size, dtype=np.float32) for size in sizes))
        for sizes in [(shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)]
        * shape.num_layers
    )
    scores = ImportanceScores(layers, shape, checkpoint.fingerprint, "random", {}, {})
    plan = amprune.make_plan(scores, ratio=0.25)
    start = time.perf_counter()
    result = amprune.apply_plan(dense, plan, folder / "out", max_shard_size="200MB")
    report = {
        "checkpoint_bytes": result.bytes_before,
        "seconds": round(time.perf_counter() - start, 1),
        "imports_mb": round(baseline),
        "peak_above_imports_mb": round(peak_mb() - baseline),
        "verified": result.verification.passed,
        "shards": len(list((folder / "out").glob("model-*.safetensors"))),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "200MB")
