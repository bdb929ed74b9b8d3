"""Kills at renames, removals, new folders and files: no output is half, no source changed, the next run succeeds."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from adversary_process import Zygote
from test_adversary import MEASURED, SCORED, TRAINED, state
from tiny_evaluation import checkpoint, text_file
from tiny_recovery import save_chats

from amprune import prune, recover

pytestmark = pytest.mark.process
EVERY = int(os.environ.get("AMPRUNE_KILLS", "0")) or None
"""Kill before every change of so many in a command; a few are tried otherwise."""
FEW = (3, 11)


@dataclass(frozen=True)
class Work:
    """A command, how it is asked for again, what it writes, and what tells that this is whole."""

    argv: list[str]
    again: list[str] = field(default_factory=list)
    writes: tuple[str, ...] = ("out",)
    proof: list[str] | None = None


PROVEN = ["verify", "out", "--dense", "dense"]
PRUNE = ["prune", "dense", "out", "--ratio", "0.3", *SCORED]
RUN = [
    "run", "dense", "out", "--ratio", "0.2", *SCORED, "--recover", *TRAINED, "--evaluate", "--measure", "latency",
    "--new-tokens", "2", "--warmup", "1", "--runs", "1",
]  # fmt: skip
WORKS = {
    "score": Work(["score", "dense", "-o", "out", *SCORED]),
    "plan": Work(["plan", "scores.safetensors", "--ratio", "0.3", "-o", "out"]),
    "prune": Work(PRUNE, proof=PROVEN),
    "prune, overwriting": Work([*PRUNE, "--overwrite"], proof=PROVEN),
    "recover": Work(["recover", "pruned", "out", *TRAINED], ["--resume"], proof=PROVEN),
    "recover, resumed": Work(["recover", "pruned", "out", *TRAINED, "--resume", "--overwrite"], proof=PROVEN),
    "evaluate": Work(["evaluate", "dense", "pruned", "-o", "out", *MEASURED]),
    "quantize": Work(["quantize", "pruned", "out", "--type", "int8"]),
    "report": Work(["report", "recovered"], writes=("recovered",)),
    "run": Work(RUN),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    checkpoint(place / "dense")
    save_chats(place, repeat=2)
    text_file(place / "text.txt")
    quick: dict[str, Any] = {"ratio": 0.2, "calibration": str(place / "chats.jsonl"), "samples": 4, "preset": "paper"}
    pruned = prune(place / "dense", place / "pruned", **quick).folder
    shutil.copy(pruned / "amprune" / "scores.safetensors", place / "scores.safetensors")
    recover(pruned, place / "recovered", data=str(place / "chats.jsonl"), device="cpu", max_steps=1)
    return place


def fresh(good: Path, name: str, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place)
    if "overwrit" in name or "resumed" in name:
        shutil.copytree(place / "pruned", place / "out")
    return place


def others(place: Path, work: Work) -> dict[str, str]:
    """Returns all but what a command writes, and the names that it gives to its own."""
    prefixes = tuple(f"{name}{end}" for name in work.writes for end in ("/", "."))
    prefixes += tuple(f".{name}." for name in work.writes)
    return {
        path: what for path, what in state(place).items() if path not in work.writes and not path.startswith(prefixes)
    }


@pytest.mark.parametrize("name", WORKS)
def test_a_kill_leaves_nothing_half_and_the_next_run_succeeds(
    name: str, good: Path, zygote: Zygote, tmp_path: Path
) -> None:
    work, place = WORKS[name], tmp_path / "place"
    before = others(fresh(good, name, place), work)
    assert zygote.run(work.argv, place).code == 0
    expected = {path for path in state(place) if not path.endswith((".svg", ".png"))}
    kills, problems = 0, []
    for number in range(1, 10_000) if EVERY else FEW:
        fresh(good, name, place)
        old = state(place / "out") if (place / "out").is_dir() else {}
        if zygote.run(work.argv, place, kill=number).code != -9:
            break
        kills += 1
        if others(place, work) != before:
            problems.append(f"{name}, {number}: something else was changed")
        if work.proof and (place / "out").exists() and state(place / "out") != old:
            outcome = zygote.run(work.proof, place)
            if outcome.code:
                problems.append(f"{name}, {number}: what is there is not whole: {outcome.stderr[-300:]}")
        outcome = zygote.run([*work.argv, *work.again], place)
        if outcome.code and "--overwrite" in outcome.stderr:  # it was there already, whole
            outcome = zygote.run([*work.argv, *work.again, "--overwrite"], place)
        if outcome.code:
            problems.append(f"{name}, {number}: the next run: {outcome.stderr[-400:]}")
        elif (left := {path for path in state(place) if not path.endswith((".svg", ".png"))}) != expected:
            problems.append(f"{name}, {number}: {sorted(left ^ expected)[:4]} is left or missing")
        if EVERY and kills >= EVERY:
            break
    assert kills
    print(f"{name}: {kills} kills")
    assert problems == []
