"""Whatever is wrong with a file: one clear paragraph or a right result, nothing half-written, sources untouched."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from adversary_damage import damages
from adversary_process import MEGABYTES, SECONDS, Outcome, Zygote
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_evaluation import checkpoint, text_file
from tiny_recovery import save_chats

from amprune import evaluate, prune, recover
from amprune.running import Advance

pytestmark = pytest.mark.process
EXAMPLES = int(os.environ.get("AMPRUNE_ADVERSARY", "40"))
"""Of all commands together; thousands take half an hour."""
LOG = os.environ.get("AMPRUNE_ADVERSARY_LOG")
"""Where failures are written as they come."""

TRAINED = [
    "--data",
    "chats.jsonl",
    "--max-steps",
    "4",
    "--device",
    "cpu",
    "--validation-share",
    "0",
    "--save-steps",
    "2",
]
SCORED = ["--calibration", "chats.jsonl", "--samples", "4", "--preset", "paper"]
MEASURED = ["--measure", "perplexity", "--text", "text.txt", "--sequence-length", "32", "--device", "cpu"]


@dataclass(frozen=True)
class Attack:
    """A command, the files that are damaged, and what it may write."""

    argv: list[str]
    files: tuple[str, ...]
    """Patterns of the files that it reads."""
    writes: tuple[str, ...] = ()
    """What may be new or other afterwards, where it ends well."""
    renews: tuple[str, ...] = ()
    """What may be other afterwards, whole, however it ends."""
    proves: list[str] | None = None
    """A command that has to agree where it ends well."""


PROVEN = ["verify", "out", "--dense", "dense"]
RECORDS = ("pruned/*", "pruned/amprune/*")
ATTACKS = {
    "inspect": Attack(["inspect", "dense"], ("dense/*",)),
    "score": Attack(
        ["score", "dense", "-o", "s.safetensors", *SCORED], ("dense/*", "chats.jsonl"), writes=("s.safetensors",)
    ),
    "plan": Attack(
        ["plan", "scores.safetensors", "--ratio", "0.2", "-o", "p.json"], ("scores.safetensors",), writes=("p.json",)
    ),
    "apply": Attack(
        ["apply", "dense", "plan.json", "out"], ("dense/*", "plan.json"), writes=("out",), proves=PROVEN
    ),
    "apply, refitted": Attack(
        ["apply", "dense", "refitted/amprune/plan.json", "out", "--calibration", "chats.jsonl", "--samples", "4"],
        ("refitted/amprune/plan.json",), writes=("out",), proves=PROVEN,
    ),
    "verify": Attack(["verify", "pruned", "--dense", "dense"], (*RECORDS, "dense/*")),
    "verify, refitted": Attack(["verify", "refitted", "--dense", "dense"], ("refitted/amprune/*",)),
    "prune": Attack(
        ["prune", "dense", "out", "--ratio", "0.2", *SCORED], ("dense/*", "chats.jsonl"), writes=("out",),
        proves=PROVEN,
    ),
    "prune, recipe": Attack(
        ["prune", "dense", "out", "--recipe", "pruned/amprune/recipe.yaml"], ("pruned/amprune/recipe.yaml",),
        writes=("out",), proves=PROVEN,
    ),
    "recover": Attack(["recover", "pruned", "out", *TRAINED], (*RECORDS, "chats.jsonl"), writes=("out",)),
    "recover, resumed": Attack(
        ["recover", "pruned", "stopped", "--resume", *TRAINED], ("stopped.training/*", "stopped.training/*/*"),
        writes=("stopped", "stopped.training"), renews=("stopped.training",),
    ),
    "evaluate": Attack(
        ["evaluate", "dense", "pruned", "-o", "evaluation.json", *MEASURED],
        ("evaluation.json", "text.txt", *RECORDS), renews=("evaluation.json",),
    ),
    "report": Attack(["report", "results"], ("results/evaluation.json",), writes=("results",)),
    "report, pruned": Attack(
        ["report", "recovered"], ("recovered/amprune/*", "recovered/README.md"), renews=("recovered",)
    ),
    "push": Attack(["push", "pruned", "someone/model", "--dry-run"], RECORDS),
    "quantize": Attack(["quantize", "pruned", "out", "--type", "int8"], RECORDS, writes=("out",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all went well."""
    place = tmp_path_factory.mktemp("good")
    checkpoint(place / "dense")
    (place / "dense" / "README.md").write_text("---\nlicense: mit\nbase_model: owner/base\n---\n# Dense\n", "utf-8")
    save_chats(place, repeat=2)
    text_file(place / "text.txt")
    quick: dict[str, Any] = {"ratio": 0.2, "calibration": str(place / "chats.jsonl"), "samples": 4}
    pruned = prune(place / "dense", place / "pruned", preset="paper", **quick).folder
    prune(place / "dense", place / "refitted", **quick, neuron_multiple=1)
    shutil.copy(pruned / "amprune" / "scores.safetensors", place / "scores.safetensors")
    shutil.copy(pruned / "amprune" / "plan.json", place / "plan.json")
    trained: dict[str, Any] = {
        "data": str(place / "chats.jsonl"), "device": "cpu", "validation_share": 0.0, "max_steps": 4, "save_steps": 2,
    }  # fmt: skip
    recover(pruned, place / "recovered", **trained)
    measured: dict[str, Any] = {
        "measure": ("perplexity",), "texts": (str(place / "text.txt"),), "sequence_length": 32, "device": "cpu",
    }  # fmt: skip
    models = [f"dense={place / 'dense'}", str(pruned), str(place / "recovered")]
    evaluate(models[:2], place / "evaluation.json", **measured)
    for folder in ("results", "recovered/amprune"):
        (place / folder).mkdir(exist_ok=True)
        evaluate(models, place / folder / "evaluation.json", **measured)
    with pytest.raises(KeyboardInterrupt):
        recover(pruned, place / "stopped", **trained, progress=stopped_at(3))
    return place


def stopped_at(step: int) -> Callable[[str, int], Any]:
    """A progress that interrupts the training at a step."""

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:
        done = [0]

        def advance(steps: int) -> None:
            done[0] += steps
            if description == "Training" and done[0] == step:
                raise KeyboardInterrupt

        yield advance

    return progress


def state(place: Path) -> dict[str, str]:
    """Says what every path below a folder is, without reading what never ends."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = "folder" if path.is_dir() else "special"
        found[str(path.relative_to(place))] = what
    return found


def complaints(attack: Attack, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Lists what is wrong with how a command ended."""
    found = []
    if outcome.seconds > SECONDS:
        found.append(f"took {outcome.seconds:.0f} s")
    if outcome.megabytes > MEGABYTES:
        found.append(f"took {outcome.megabytes:.0f} MB")
    if outcome.code < 0:
        found.append(f"killed by signal {-outcome.code}")
    told = outcome.stderr[outcome.stderr.find("amprune: ") :] if "amprune: " in outcome.stderr else ""
    if outcome.code == 1 and (not told or told.count("amprune: ") != 1 or "\n\n" in told.strip() or len(told) > 2500):
        found.append("no clear paragraph")
    if "amprune: unexpected" in outcome.stderr or "Traceback" in outcome.stderr:
        found.append("unexpected")
    if outcome.code not in (0, 1, 2) and outcome.code > 0:
        found.append(f"exit code {outcome.code}")
    if "\x1b[31m" in outcome.stderr + outcome.stdout:
        found.append("an escape reaches the terminal")
    if outcome.stderr.count("\n") > 40:
        found.append(f"{outcome.stderr.count(chr(10))} lines")
    allowed = attack.renews + (attack.writes if outcome.code == 0 else ())
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    left = sorted(path for path in changed if not any(path == one or path.startswith(f"{one}/") for one in allowed))
    if left:
        found.append(f"changed: {', '.join(left[:5])}")
    return found


def test_damage_is_refused_in_a_paragraph_or_harmless(good: Path, zygote: Zygote, tmp_path: Path) -> None:
    failures: list[str] = []
    counts = {"refused": 0, "harmless": 0}

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def attempt(data: st.DataObject) -> None:
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place, symlinks=True)
        name = data.draw(st.sampled_from(list(ATTACKS)))
        attack = ATTACKS[name]
        files = sorted({file for pattern in attack.files for file in place.glob(pattern) if file.is_file()})
        file = data.draw(st.sampled_from(files))
        damage = f"{name}: {file.relative_to(place)}: {data.draw(damages(file))}"
        before = state(place)
        outcome = zygote.run(attack.argv, place)
        found = complaints(attack, outcome, before, state(place))
        if outcome.code == 0 and attack.proves:
            proof = zygote.run(attack.proves, place)
            if proof.code:
                found.append(f"not proven: {proof.stderr[-300:]}")
        counts["refused" if outcome.code else "harmless"] += 1
        if found:
            said = outcome.stderr[-600:].replace("\n", " | ")
            failures.append(f"{damage}: {'; '.join(found)}\n    rc {outcome.code}: {said}")
            if LOG:
                with open(LOG, "a", encoding="utf-8") as log:
                    log.write(failures[-1] + "\n")

    attempt()
    assert sum(counts.values()) >= EXAMPLES * 0.9, counts
    assert not failures, f"{len(failures)} of {counts}\n" + "\n".join(failures)
