"""The class of a failure, from the texts that gloo, NCCL, c10d and CUDA really leave."""

from __future__ import annotations

import signal
from types import ModuleType

import pytest

from launcher.rounds.failures import (
    TRACEBACK_MAX_CHARS,
    Death,
    FailureClass,
    WorkerError,
    classify,
    error_in,
    place_of,
    shorten,
)
from launcher.workers import boot, program, zygote
from launcher.workers.channel import WorkerPhase

SEED = "Traceback (most recent call last):\n"
GLOO = "/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp"
NCCL = (
    "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3763"
)


def death(message: str = "", *, exit_code: int | None = 1, phase: WorkerPhase = WorkerPhase.RUNNING, **fields) -> Death:
    error = WorkerError(message, f"{SEED}{message}") if message else None
    return Death(**{"exit_code": exit_code, "error": error, "phase": phase, "lived_s": 10.0, **fields})


@pytest.mark.parametrize(
    "message",
    [
        f"RuntimeError: [{GLOO}/pair.cc:553] Connection closed by peer [127.0.0.1]:7043. This is typically caused by",
        "PeerGone: rank 1 has closed its connection",
        "PeerGone: rank 1 does not answer: timed out",
        "PeerGone: rank 1 does not answer within 1800 s",
        "PeerGone: rank 1 cannot be told: [Errno 32] Broken pipe",
        f"RuntimeError: [{GLOO}/pair.cc:537] Read error [127.0.0.1]:23971: Connection reset by peer. This is",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for "
        "recv operation to complete",
        "RuntimeError: Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
        f"{NCCL}, remote process exited or there was a network error, NCCL version 2.28.8\nncclRemoteError: A call "
        "failed possibly due to a network error or a remote process exiting prematurely.",
        f"{NCCL}, internal error, NCCL version 2.14.3\nncclInternalError: Internal check failed.\nLast error:\n"
        "Net : Connection closed by remote peer user<50260>",
        f"{NCCL}, unhandled system error, NCCL version 2.18.1\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error.\nLast error:\nsocketProgressOpt: Call to recv from "
        "10.0.0.7<33759> failed : Connection reset by peer",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7753, OpType=ALLREDUCE, "
        "Timeout(ms)=600000) ran for 600061 milliseconds before timing out.",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the "
        "remote server shutdown or crash?",
        "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cpu//0/0",
    ],
)
def test_a_connection_to_a_rank_that_broke_makes_a_victim(message: str) -> None:
    assert classify(death(message)) is FailureClass.LOST_PEER
    assert classify(death(message, phase=WorkerPhase.ATTACHED)) is FailureClass.LOST_PEER, "also before the first step"


@pytest.mark.parametrize(
    "message",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously",
        "torch.AcceleratorError: CUDA error: uncorrectable NVLink error detected during the execution",
        "RuntimeError: CUDA error: unspecified launch failure",
        "RuntimeError: No CUDA-capable device is detected",
        "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        f"{NCCL}, unhandled system error, NCCL version 2.18.1\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error.",
    ],
)
def test_the_device_is_at_fault(message: str) -> None:
    assert classify(death(message)) is FailureClass.DEVICE


@pytest.mark.parametrize(
    "message",
    [
        "ValueError: boom",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of",
        "RuntimeError: CUDA error: device-side assert triggered",
        f"what():  [enforce fail at {GLOO}/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4. Received data size",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE",
        "requests.exceptions.ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset by "
        "peer'))",
    ],
)
def test_the_program_is_at_fault(message: str) -> None:
    assert classify(death(message)) is FailureClass.PROGRAM


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (death("ValueError: x", phase=WorkerPhase.GAVE_UP), FailureClass.GAVE_UP),
        (death(exit_code=-signal.SIGTERM, phase=WorkerPhase.GAVE_UP), FailureClass.GAVE_UP),
        (death(exit_code=2, phase=WorkerPhase.ATTACHED), FailureClass.USAGE),
        (death(exit_code=2, phase=WorkerPhase.STARTING), FailureClass.USAGE),
        (death("--width: no such option", exit_code=2, phase=WorkerPhase.ATTACHED), FailureClass.USAGE),
        (death(exit_code=2, phase=WorkerPhase.STARTING, lived_s=3600.0), FailureClass.PROGRAM),
        (death(exit_code=2), FailureClass.PROGRAM),
        (death(exit_code=3, phase=WorkerPhase.STARTING), FailureClass.PROGRAM),
        (death("ModuleNotFoundError: No module named 'x'", phase=WorkerPhase.STARTING), FailureClass.START_UP),
        (
            death("ModuleNotFoundError: No module named 'x'", phase=WorkerPhase.STARTING, lived_s=1e4),
            FailureClass.PROGRAM,
        ),
        (death("KeyError: 'x'", phase=WorkerPhase.ATTACHED), FailureClass.START_UP),
        (death("KeyError: 'x'", phase=WorkerPhase.STARTING), FailureClass.PROGRAM),
        (death("urllib.error.URLError: <urlopen error>", phase=WorkerPhase.ATTACHED), FailureClass.PROGRAM),
        (death("KeyError: 'x'"), FailureClass.PROGRAM),
        (death("KeyError: 'x'", exit_code=None), FailureClass.PROGRAM),
        (death("KeyError: 'x'", exit_code=-signal.SIGTERM), FailureClass.PROGRAM),
        (death(exit_code=-signal.SIGKILL), FailureClass.SIGNAL),
        (death(exit_code=128 + signal.SIGKILL), FailureClass.SIGNAL),
        (death(exit_code=-signal.SIGKILL, oom_kills=1), FailureClass.OUT_OF_MEMORY),
        (death(exit_code=-signal.SIGSEGV, oom_kills=1), FailureClass.SIGNAL),
        (death("MemoryError"), FailureClass.OUT_OF_MEMORY),
        (
            death("RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate"
                  " memory: you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
            FailureClass.OUT_OF_MEMORY,
        ),
        (death(exit_code=-signal.SIGTERM), FailureClass.SIGNAL),
        (death(exit_code=-signal.SIGTERM, draining=True), FailureClass.PREEMPTION),
        (death("ValueError: boom", draining=True), FailureClass.PROGRAM),
    ],
)  # fmt: skip
def test_ends(case: Death, expected: FailureClass) -> None:
    assert classify(case) is expected


class TestPlace:
    TRACEBACK = (
        "Traceback (most recent call last):\n"
        '  File "/job/train.py", line 12, in inner\n'
        "ValueError: first\n\nDuring handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n"
        '  File "/job/train.py", line 40, in <module>\n    main()\n'
        '  File "/job/loop.py", line 7, in step\n    net(x)\n'
        '  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1775, in _call_impl\n'
    )

    def place(self, message: str, traceback: str) -> str:
        return place_of(Death(1, WorkerError(message, traceback), WorkerPhase.RUNNING, 1.0))

    def test_is_the_innermost_frame_of_the_program_itself(self) -> None:
        text = f"{self.TRACEBACK}RuntimeError: mat1 and mat2 shapes cannot be multiplied (7x8 and 9x9)"
        assert self.place("RuntimeError: mat1 and mat2 ...", text) == "RuntimeError at /job/loop.py:7 in step"

    def test_does_not_depend_on_what_the_message_says(self) -> None:
        assert self.place("KeyError: 1", self.TRACEBACK) == self.place("KeyError: 2", self.TRACEBACK)
        assert self.place("KeyError: 1", self.TRACEBACK) != self.place("IndexError: 1", self.TRACEBACK)

    def test_of_a_file_that_does_not_parse(self) -> None:
        text = f'{SEED}  File "/job/train.py", line 3\n    def (\n        ^\nSyntaxError: invalid syntax'
        assert self.place("SyntaxError: invalid syntax", text) == "SyntaxError at /job/train.py:3"

    def test_without_a_traceback(self) -> None:
        assert place_of(death(exit_code=3)) == "exit code 3"
        assert place_of(death(exit_code=-9)) == place_of(death(exit_code=137)) == "SIGKILL"
        assert self.place("torch.OutOfMemoryError: CUDA", "") == "OutOfMemoryError"

    @pytest.mark.parametrize("module", [boot, program, zygote])
    def test_what_runs_the_program_is_not_the_place(self, module: ModuleType) -> None:
        ours = f'  File "{module.__file__}", line 3, in run\n    call()\n'
        text = f'Traceback (most recent call last):\n  File "/job/train.py", line 5, in main\n    go()\n{ours}'
        assert self.place("KeyError: 1", text) == "KeyError at /job/train.py:5 in main"


class TestLog:
    def test_the_last_traceback_is_found_behind_rank_prefixes(self) -> None:
        raised = f'[rank3]: {SEED}[rank3]:   File "a.py", line 1, in f\n[rank3]: OSError: no\n'
        log = f"{SEED}KeyError: old\nepoch 1\n{raised}bye"
        found = error_in(log, 1)
        assert found is not None
        assert found.message == "OSError: no"
        assert found.traceback.splitlines() == [SEED.strip(), '  File "a.py", line 1, in f', "OSError: no"]

    def test_the_word_of_a_library_that_aborted(self) -> None:
        log = (
            "terminate called after throwing an instance of 'gloo::IoException'\n  what():  [gloo/transport/tcp/x] y\n"
        )
        found = error_in(log, -signal.SIGABRT)
        assert found is not None
        assert classify(Death(-signal.SIGABRT, found, WorkerPhase.RUNNING, 1.0)) is FailureClass.LOST_PEER

    @pytest.mark.parametrize("exit_code", [None, 2, 7, -9, -15])
    def test_an_older_traceback_does_not_explain_another_end(self, exit_code: int | None) -> None:
        assert error_in(f"{SEED}KeyError: old\n", exit_code) is None

    @pytest.mark.parametrize("log", ["", "no traceback", SEED, f"{SEED}  cut short"])
    def test_a_log_may_say_nothing(self, log: str) -> None:
        assert error_in(log, 1) is None
        assert error_in(log, -signal.SIGABRT) is None


def test_long_texts_keep_both_ends() -> None:
    text = "first " + "x" * 100_000 + " last"
    short = shorten(text)
    assert short.startswith("first")
    assert short.endswith("last")
    assert len(short) < TRACEBACK_MAX_CHARS + 100
    assert shorten("short") == "short"
