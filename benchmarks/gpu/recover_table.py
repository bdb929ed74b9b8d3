"""Puts what recover.sh measured into one file and one table: python benchmarks/gpu/recover_table.py OUT."""

import json
import sys
from pathlib import Path
from statistics import mean


def main(out: Path) -> None:
    """Reads `evaluation.json`, `recover-RATIO.json` and `training-RATIO.jsonl`; writes `recover.json`."""
    records = json.loads((out / "evaluation.json").read_text())["records"]
    rows = {}
    for name in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == name]
        perplexity = next(record["value"] for record in own if record["measurement"] == "perplexity")
        accuracies = {record["task"]: record["value"] for record in own if record["measurement"] == "zero_shot"}
        rows[name] = {"perplexity": perplexity, "tasks": accuracies, "average": mean(accuracies.values())}
    dense = rows["dense"]
    for row in rows.values():
        row["perplexity_ratio"] = row["perplexity"] / dense["perplexity"]
        row["average_share"] = row["average"] / dense["average"]
    trainings = {}
    for file in sorted(out.glob("recover-*.json")):
        ratio = file.stem.removeprefix("recover-")
        record = json.loads(file.read_text())
        log = [json.loads(line) for line in (out / f"training-{ratio}.jsonl").read_text().splitlines()]
        trainings[ratio] = {**{name: record[name] for name in ("settings", "data", "steps", "versions")}, "log": log}
    device = next(record["device"] for record in records)
    found = {"device": device, "models": rows, "trainings": trainings}
    (out / "recover.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{device}\n\n| model | perplexity | x dense | average of tasks | of dense |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['perplexity']:.2f} | {row['perplexity_ratio']:.2f} | {100 * row['average']:.1f} "
            f"| {100 * row['average_share']:.1f} % |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
