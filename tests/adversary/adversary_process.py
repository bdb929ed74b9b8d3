"""Runs command lines, each in a fork of one process that has imported everything, within limits of time and memory.

python adversary_process.py      # reads {"argv": [...], "cwd": ...} a line on stdin, answers with a line on stdout
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 20
MEGABYTES = 1024
_SPARE = 3 * 2**30
"""Address space beyond which a fork is refused memory: protects the machine, not the limit that is tested."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    code: int
    """Negative: killed by that signal; -9 where time ran out."""
    stdout: str
    stderr: str
    seconds: float
    megabytes: float
    """What the command grew by."""


class Zygote:
    """The process that is forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, argv: list[str], cwd: Path, *, kill: int = 0) -> Outcome:
        """Runs `amprune ARGV` in a folder, and kills it before that rename, removal, new folder or file, from 1 on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), "kill": kill}) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def _serve() -> None:
    """Imports what commands import, then answers requests."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="100")
    import torch

    torch.set_num_threads(1)
    import amprune.evaluation.run
    import amprune.experiments.run
    import amprune.pipeline
    import amprune.recovery.run
    import amprune.report.write
    import amprune.serve.quantize.run  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_forked(request["argv"], request["cwd"], request["kill"])) + "\n")
        answers.flush()


def _forked(argv: list[str], cwd: str, kill: int) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        before, start = _resident(), time.monotonic()
        if (child := os.fork()) == 0:
            _run(argv, cwd, kill, out.fileno(), error.fileno())
        status, usage = _wait(child, start + SECONDS)
        out.seek(0)
        error.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "stdout": out.read().decode(errors="replace"),
            "stderr": error.read().decode(errors="replace"),
            "seconds": time.monotonic() - start,
            "megabytes": usage.ru_maxrss / 1024 - before,
        }


def _resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "shutil.rmtree")


def _killed_before(number: int, cwd: str) -> None:
    """Counts what changes the folder, and kills this process before the change of that number."""
    done = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & os.O_CREAT and isinstance(path, str | os.PathLike)):
                return
        elif event not in _CHANGES:
            return
        if not os.path.abspath(os.fspath(arguments[0])).startswith(cwd):
            return
        done[0] += 1
        if done[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _run(argv: list[str], cwd: str, kill: int, out: int, error: int) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(cwd)
        os.dup2(out, 1)
        os.dup2(error, 2)
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE, used + _SPARE))
        sys.argv = ["amprune", *argv]
        if kill:
            _killed_before(kill, os.path.realpath(cwd))
        from amprune.cli import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    pause = 0.005
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


if __name__ == "__main__":
    _serve()
