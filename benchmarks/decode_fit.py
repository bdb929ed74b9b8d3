"""How much of the time of a decoded token hangs on the weights that are read for it: a line through several widths.

    python benchmarks/decode_fit.py evaluation.json

Of an evaluation that timed at least three models of one type, all their sizes of one family, prints the fixed time, the
time for a megabyte, how far the medians lie from the line, and what the line makes of the first model's speedups.
"""

import statistics
import sys

import numpy as np

from amprune.evaluation.records import Evaluation, Record


def main(file: str) -> None:
    """Fits and prints."""
    found = Evaluation.load(file)
    megabytes = {name: _one(found, name, "size", "weight_bytes_per_token").value / 1e6 for name in found.models}
    decode = {name: _one(found, name, "latency", "decode") for name in found.models}
    milliseconds = {
        name: 1000 * statistics.median(run.items) / (run.settings["new_tokens"] - 1) for name, run in decode.items()
    }
    sizes, times = (np.array(list(values.values())) for values in (megabytes, milliseconds))
    slope, fixed = np.polyfit(sizes, times, 1)
    print(f"{fixed:.2f} ms a token + {slope:.4f} ms a MB, to {np.abs(times - fixed - slope * sizes).max():.2f} ms")
    dense = sizes[0]
    for name, size in megabytes.items():
        line = (fixed + slope * dense) / (fixed + slope * size)
        print(f"{name}: {size:.1f} MB, {milliseconds[name]:.2f} ms, ideal {dense / size:.2f}x, by the line {line:.2f}x")


def _one(found: Evaluation, model: str, measurement: str, metric: str) -> Record:
    return next(record for record in found.of(model, measurement) if record.metric == metric)


if __name__ == "__main__":
    main(sys.argv[1])
