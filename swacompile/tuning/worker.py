"""A process that answers requests, one line of JSON each way, and is replaced when it crashes or takes too long."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

Document = Mapping[str, Any]
LONGEST_ANSWER = 1 << 20


class WorkerFailed(Exception):
    """The process ended or did not answer in time; `hung` says which. The next request gets a new process."""

    def __init__(self, message: str, *, hung: bool) -> None:
        super().__init__(message)
        self.hung = hung


class Worker:
    """One such process, started with the first request. Not for several threads at once."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Document, *, seconds: float) -> dict[str, Any]:
        """The answer. Raises WorkerFailed."""
        process = self._running()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return dict(json.loads(self._read_line(process, time.monotonic() + seconds)))
        except WorkerFailed:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise WorkerFailed(f"no answer: {error}", hung=False) from error
        except BaseException:
            self.close()  # an interrupted request's answer must not be taken for the next one's
            raise

    def close(self) -> None:
        """End the process and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    @staticmethod
    def _read_line(process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
        assert process.stdout is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise WorkerFailed("no answer in time", hung=True)
                piece = os.read(process.stdout.fileno(), 65536)
                line += piece
                if not piece or len(line) > LONGEST_ANSWER:
                    raise WorkerFailed(f"the process ended ({_how(process)})", hung=False)
        return line


def _how(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "its answer was not one line"
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


def python_module(name: str) -> tuple[str, ...]:
    """The command that runs a module of this package with this interpreter."""
    return (sys.executable, "-m", name)


def serve(answer: Callable[[Document], Document]) -> None:
    """The worker's side: answer requests until the input ends. What else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(dict(answer(json.loads(line)))) + "\n")
        answers.flush()
