"""Writes why a job has failed into the file in which whoever started the launcher looks for it.

`TORCHELASTIC_ERROR_FILE` in the launcher's environment names it, as for torchrun (`record` in
torch/distributed/elastic/multiprocessing/errors): {"message": {"message", "errorCode", "extraInfo": {"py_callstack",
"timestamp"}}}. TorchX reads it, and Kubernetes shows it where it is /dev/termination-log. Every node of a failed job
writes the root cause, wherever that failed.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from typing import Any

from launcher.rounds.records import Round
from launcher.text import hide_secrets
from launcher.workers.program import ERROR_FILE_VARIABLE

log = logging.getLogger(__name__)

_MAX_BYTES = {"/dev/termination-log": 4096}  # Kubernetes keeps no more, and half a JSON object is none


def tell_failed(ended: Round, worker_file: str) -> None:
    """Write the root cause of a job that has failed; `worker_file` is where its worker wrote it, "" on another node."""
    if not ended.causes:
        _write(f"the job {ended.outcome}", "", time.time(), ended.verdict.exit_code)
        return
    failure = ended.causes[0].failure
    if told := _read(worker_file):  # it has all of the traceback, and what a `record` of the user's own put there
        told["message"]["errorCode"] = failure.exit_code
        _put(told)
    else:
        _write(failure.message, failure.traceback, failure.ts, failure.exit_code)


def tell_raised(error: BaseException, exit_code: int) -> None:
    """Write an error of the launcher itself, or a signal that ended it."""
    stack = "".join(traceback.format_exception(error))
    _write(f"{type(error).__name__}: {error}", stack, time.time(), exit_code)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("message"), dict) else None


def _write(message: str, stack: str, ts: float, exit_code: int) -> None:
    extra = {"py_callstack": stack, "timestamp": str(int(ts))}
    _put({"message": {"message": message, "errorCode": exit_code, "extraInfo": extra}})


def _put(told: dict[str, Any]) -> None:
    """Write into the file as it is: it may be a mount, which cannot be replaced."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path:
        return
    data = hide_secrets(json.dumps(told)).encode()
    extra = told["message"].get("extraInfo")
    limit_bytes = _MAX_BYTES.get(path)
    while limit_bytes is not None and len(data) > limit_bytes and isinstance(extra, dict) and extra.get("py_callstack"):
        too_long = -(-(len(data) - limit_bytes) // 6)  # JSON writes a character in at most six bytes
        extra["py_callstack"] = str(extra["py_callstack"])[too_long:]  # its end tells most
        data = hide_secrets(json.dumps(told)).encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
    except OSError as error:
        log.warning("%s=%s: the cause is not written there: %s", ERROR_FILE_VARIABLE, path, error.strerror)
