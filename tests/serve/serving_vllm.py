"""vLLM in processes of its own environment, which `make test-serving` makes and AMPRUNE_VLLM_PYTHON names."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from serving_models import NEW_TOKENS

SCRIPT = Path(__file__).with_name("vllm_tokens.py")
OPTIONS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**28,
}  # fmt: skip
# What vLLM's own implementation cannot load, and its words; falcon's has no other. Dense models of these types load.
REFUSED_BY_VLLM = {
    ("qwen2", "heads and neurons"): r"length \(\d+\) exceeds dimension size",
    ("falcon", "neurons"): r"length \(\d+\) exceeds dimension size",
}
# vLLM's own implementation left aside for that of transformers.
BY_TRANSFORMERS = {"model_impl": "transformers"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
START_SECONDS, REQUEST_SECONDS, STOP_SECONDS = 600, 120, 60
SECONDS_PER_MODEL = 120


def vllm_python() -> str:
    """Returns the Python of the environment; skips the test where there is none."""
    python = os.environ.get("AMPRUNE_VLLM_PYTHON")
    if not python:
        pytest.skip("needs AMPRUNE_VLLM_PYTHON, the Python of an environment with vLLM (make test-serving sets it)")
    return python


def vllm_environment(**entries: str) -> dict[str, str]:
    """Returns the environment of a process: offline, one thread, nothing told to anyone or left in the user's cache."""
    ours = {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(Path(vllm_python()).parent.parent / "vllm-cache"),
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, **ours, **entries}


@dataclass(frozen=True)
class Question:
    """A checkpoint, the prompts for it as token ids, and options of vLLM beside the common ones."""

    folder: Path
    prompts: list[list[int]]
    options: Mapping[str, Any] = field(default_factory=dict)


def vllm_answers(questions: Sequence[Question], place: Path) -> list[dict[str, Any]]:
    """Asks vLLM for greedy tokens of every checkpoint, in one process; where a model ends it, in another one.

    Returns what `vllm_tokens.py` writes for each.
    """
    found: list[dict[str, Any]] = []
    while left := questions[len(found) :]:
        models = [{"folder": str(q.folder), "prompts": q.prompts, "options": {**OPTIONS, **q.options}} for q in left]
        job, results = place / "job.json", place / "results.jsonl"
        job.write_text(json.dumps({"models": models, "count": NEW_TOKENS}), encoding="utf-8")
        results.write_text("", encoding="utf-8")
        ending = _run_script(job, results, place / "vllm.log", seconds=SECONDS_PER_MODEL * (1 + len(left)))
        lines = results.read_text(encoding="utf-8").splitlines()
        found += [json.loads(line) for line in lines] or [{"error": ending}]
    return found


def _run_script(job: Path, results: Path, log: Path, *, seconds: float) -> str:
    """Runs the script, and returns how it ended with the last of what it said."""
    command = [vllm_python(), str(SCRIPT), str(job), str(results)]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=job.parent, env=vllm_environment(**IN_PROCESS), stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        ending = f"the process ended with {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        ending = f"the process ran longer than {seconds} s"
    finally:
        stop(process)
    return f"{ending}: {_tail(log)}"


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(command: list[str], address: str, place: Path) -> Iterator[None]:
    """Runs a server until the block ends, and enters the block once it says that it is healthy."""
    log = place / "server.log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command, cwd=place, env=vllm_environment(), stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_healthy(server, address, log)
        yield
    finally:
        stop(server)


def _wait_until_healthy(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}: {_tail(log)}")
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(1)
    pytest.fail(f"the server was not healthy within {START_SECONDS} s: {_tail(log)}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Asks a process that leads its own group to end, and ends whatever is left of the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)


def request(address: str, path: str, body: Any = None) -> Any:
    """Returns the JSON that the server answers: to a GET, or to a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=REQUEST_SECONDS) as answer:
        return json.load(answer)
