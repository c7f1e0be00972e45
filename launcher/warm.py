"""The agent's side of warm workers: keeps a zygote, and says which socket a worker's boot should ask."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from launcher.events import Emit

log = logging.getLogger(__name__)

COLD = "-"


class WarmStart:
    """A zygote that is started when workers are first wanted and replaced if it is found dead.

    For the agent's main thread only: the kernel ties the zygote to the thread that started it.
    """

    def __init__(self, runtime_dir: Path, emit: Emit) -> None:
        self._path = runtime_dir / "zygote.sock"
        self._emit = emit
        self._process: subprocess.Popen[bytes] | None = None

    def socket_path(self) -> str:
        """Where to ask for a worker; `COLD` if there is no zygote to be had."""
        if self._process is not None and self._process.poll() is not None:
            self._emit("warm_start_lost", exit_code=self._process.returncode)
            self._process = None
        if self._process is None:
            self.start()
        return str(self._path) if self._process is not None else COLD

    def start(self) -> None:
        """Start the zygote; it imports torch while this node still waits for the others."""
        self._path.unlink(missing_ok=True)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(self._path))
                os.chmod(self._path, 0o600)
                listener.listen(256)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "launcher.zygote", str(listener.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[listener.fileno()],
                )
        except OSError as error:
            log.warning("workers start cold: %s", error)

    def close(self) -> None:
        """End the zygote, and with it every worker that it forked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
