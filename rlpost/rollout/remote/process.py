"""One vLLM server that a run, or `rlpost serve`, starts, watches and ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rlpost.rollout.remote.client import ServerLost, answers

_ENDS_WITHIN_S = 12.0


class ServerProcess:
    """A server on a Unix socket that only this user can reach, or on HOST:PORT."""

    def __init__(
        self,
        arguments: Callable[[str], list[str]],
        environment: dict[str, str],
        *,
        cores: tuple[int, ...],
        log: Path,
        remove: Path | None,
        start_s: float,
        address: str | None = None,
    ) -> None:
        """`arguments`: vLLM's, for an address. `log`: what the server prints is added to it. `remove`: a folder that goes, too,
        when this process dies. `start_s`: how long the server may take to answer. `address`: HOST:PORT instead of a socket."""
        self._arguments, self._environment, self._cores = arguments, environment, cores
        self.log, self._remove, self._start_s = log, remove, start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None  # of the socket: paths of sockets are short, and a run's folder may not be
        self._listens = address
        self.address = ""

    def start(self) -> None:
        """Starts the server and waits until it answers. Raises ServerLost, with the end of its log, when it does not."""
        self.end()
        if self._listens is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rlpost-"))
            self.address = f"unix:{self._folder / 'vllm.sock'}"
        else:
            self.address = f"http://{self._listens}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            began = log.tell()
            self._process = self._spawn(log)
        if self._cores:
            try:
                os.sched_setaffinity(self._process.pid, self._cores)  # its children inherit it
            except OSError as error:
                self.end()
                raise ServerLost(
                    f"it may not use the cores {list(self._cores)} (rollout.engine.cores): {error}"
                ) from error
        until = time.monotonic() + self._start_s
        while not answers(self.address, deadline_s=30):
            if (code := self._process.poll()) is not None:
                said = _last_words(self.log, began)
                self.end()
                raise ServerLost(f"it ended with exit code {code} while starting: {said}")
            if time.monotonic() > until:
                said = _last_words(self.log, began)
                self.end()
                raise ServerLost(f"it did not answer within {self._start_s:g} s of its start: {said}")
            time.sleep(0.3)

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        remove = [str(folder) for folder in (self._remove, self._folder) if folder is not None]
        command = [sys.executable, "-m", "rlpost.rollout.remote.child", *remove, "--"]
        return subprocess.Popen(
            [*command, *self._arguments(self._listens or self.address)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for the learner, which then ends the server
        )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """Ends the server with all of its processes. Ending twice does nothing."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_WITHIN_S)
            # What watches the server may hang, or have been killed itself: then the rest of its group is still there.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _last_words(log: Path, began: int) -> str:
    """The lines of the log that say what went wrong, else its last ones."""
    with log.open("rb") as file:
        file.seek(began)
        lines = file.read().decode(errors="replace").splitlines()
    telling = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
    chosen = telling[-3:] or [line.strip() for line in lines[-5:]]
    return f"{' / '.join(chosen)[:600]} (all of it: {log})"
