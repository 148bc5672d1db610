"""Commands in processes of their own, to be killed: a server imports once, then forks for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
KILL_MOMENTS = int(os.environ.get("KILL_MOMENTS", "1"))
"""At how many moments each command is killed; ``make test-full`` takes 10."""

# Runs every line of its input as a command in a fork: prints its number, then its status. A command may be told to kill
# itself just before it makes, renames or removes a file, the number of such events below a folder being given.
SERVER = """
import importlib, json, os, signal, sys, traceback
import torch
main = importlib.import_module(f"qdiff.cli.{sys.argv[1]}").main
torch.set_num_threads(1)
CHANGES = ("tempfile.mkstemp", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
def count_changes(folder, last):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in CHANGES and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return lambda: seen
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        log = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        changes = count_changes(*job["dies"]) if job["dies"] else None
        status = 1
        try:
            status = main(job["argv"])
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        if changes is not None:
            print("changes", changes())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print("process", pid, flush=True)
    print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """One after another, all of the same module of ``qdiff.cli``."""

    def __init__(self, server: subprocess.Popen, output: Path):
        self._server, self._output = server, output
        self._process: int | None = None

    def start(self, argv: list[str], dies: tuple[Path, int] | None = None) -> None:
        """Let one begin.

        Args:
            dies: a folder, and the number of the change in it, from 1 on, before which the command kills itself. If
                there are fewer it says last how many there were.
        """
        job = {"argv": argv, "output": str(self._output), "dies": dies and (str(dies[0]), dies[1])}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        self._process = self._next("process")

    def _next(self, word: str) -> int:
        while True:  # what a test that failed did not read goes by
            said, number = self._server.stdout.readline().split()
            if said == word:
                return int(number)

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):  # over already
            os.kill(self._process, number)

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return self._next("status")

    def said(self) -> str:
        return self._output.read_text()


@contextmanager
def serving(command: str, folder: Path, first: Path = REPOSITORY) -> Iterator[Commands]:
    """Commands of ``qdiff.cli``; what the latest of them says is kept in ``folder``.

    Args:
        first: a folder of modules that are found before others, ``sitecustomize`` for one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{first}{os.pathsep}{REPOSITORY}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER, command], env=environment, **pipes) as server:
        yield Commands(server, folder / "output")
        server.stdin.close()


def wait_for(happened: Callable[[], bool], commands: Commands) -> None:
    began = time.perf_counter()
    while not happened():
        time.sleep(0.005)
        assert time.perf_counter() - began < 120, commands.said()
