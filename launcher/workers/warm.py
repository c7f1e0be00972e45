"""The agent's side of warm workers: keeps a zygote, and says which socket a worker's boot should ask."""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

from launcher.events import Emit
from launcher.workers import guardian
from launcher.workers.family import Found, below

log = logging.getLogger(__name__)

COLD = "-"
_PROGRAM = (sys.executable, "-m", "launcher.workers.zygote")
_GUARDIAN = (sys.executable, "-I", "-S", guardian.__file__)


class WarmStart:
    """A zygote that is started when workers are first wanted and replaced if it is found dead.

    For the agent's main thread only: the kernel ties the zygote to the thread that started it.
    """

    def __init__(self, runtime_dir: Path, emit: Emit) -> None:
        self._path = runtime_dir / "zygote.sock"
        self._emit = emit
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: int | None = None
        self._zygote_pid: int | None = None

    def socket_path(self) -> str:
        """Where to ask for a worker; `COLD` if there is no zygote to be had."""
        if self._process is not None and self._process.poll() is not None:
            self._emit("warm_start_lost", exit_code=self._process.returncode)
            self._process = None
        if self._process is None:
            self.start()
        return str(self._path) if self._process is not None else COLD

    def start(self) -> None:
        """Start the zygote; workers may ask it at once and are forked when its imports are done."""
        self._path.unlink(missing_ok=True)
        self._close_ready()
        self._zygote_pid = None
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(self._path))
                os.chmod(self._path, 0o600)
                listener.listen(256)
                self._ready, ready_w = os.pipe()
                try:
                    self._process = subprocess.Popen(
                        [*_GUARDIAN, str(os.getpid()), *_PROGRAM, str(listener.fileno()), str(ready_w)],
                        stdin=subprocess.DEVNULL,
                        pass_fds=[listener.fileno(), ready_w],
                    )
                finally:
                    os.close(ready_w)
        except OSError as error:
            log.warning("workers start cold: %s", error)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the zygote has made its imports (or died of them). A node that joins before that only makes the
        others wait for it with their workers stopped.
        """
        if self._ready is None:
            return False
        readable, _, _ = select.select([self._ready], [], [], timeout_s)
        if readable and self._zygote_pid is None:
            self._zygote_pid = int(os.read(self._ready, 32) or b"0")
        return bool(readable)

    def orphans(self) -> Found:
        """What workers have started whose parents have ended: it is below the zygote's guardian, beside the zygote."""
        if self._process is None or not self.wait_ready(0) or not self._zygote_pid:
            return {}
        return below([self._process.pid], without=[self._zygote_pid]) if self._zygote_pid != self._process.pid else {}

    def zygote_pid(self) -> int | None:
        """The process that forks workers; None before it can."""
        return self._zygote_pid if self.wait_ready(0) else None

    def _close_ready(self) -> None:
        if self._ready is not None:
            os.close(self._ready)
            self._ready = None

    def close(self) -> None:
        """End the zygote, and with it every worker that it forked."""
        self._close_ready()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
