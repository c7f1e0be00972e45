"""What a service's keeper has of it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.service import address, keeper
from storage.service.keeper import KeeperSafe, State
from storage.service.messages import Stage
from storage.service.notes import Notes
from tests.cluster import until
from tests.storage.test_service_messages import STAGE


class Pair:
    """Both ends: what a service tells its keeper, and what that makes of it."""

    def __init__(self, folder: Path) -> None:
        self.link, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._its = its
        self.safe = KeeperSafe(its, [], patience_s=0.01)
        self.state = State(Notes(folder))

    def heed(self) -> None:
        """Take in one message."""
        packet, fds, _, _ = socket.recv_fds(self.link, keeper._PACKET_BYTES_MAX, keeper._FDS_MAX)
        self.state.heed(packet, fds)

    def heed_all(self) -> None:
        """Take in all that was said."""
        while select.select([self.link], [], [], 0)[0]:
            self.heed()

    def close(self) -> None:
        self.link.close()
        self._its.close()
        for kept in self.state.kept.values():
            kept.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path / "kept")
    yield made
    made.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("a-slot")
    os.write(made, b"a slot")
    yield made
    os.close(made)


def kept_fds() -> int:
    """How many descriptors there are of what is kept here: of others, some may be closed or opened meanwhile."""
    num = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            num += os.readlink(f"/proc/self/fd/{name}").startswith(("/memfd:a-slot", "/memfd:elastic-moe-note"))
    return num


def test_a_save_is_kept_until_it_has_ended_and_its_memory_is_not_held_any_more(pair: Pair, fd: int) -> None:
    text = STAGE.model_dump_json()
    num_fds = kept_fds()
    for first, second in (("done", "released"), ("released", "done")):
        pair.safe.keep("a", text, [fd])
        pair.heed()
        (kept,) = pair.state.kept.values()
        assert (kept.stage, os.pread(kept.fds[0], 6, 0)) == (text, b"a slot")
        pair.safe.stored("a")
        getattr(pair.safe, first)("a")
        pair.heed()
        pair.heed()
        assert (kept.is_stored, kept.is_done, kept.is_released) == (True, first == "done", first == "released")
        assert list(pair.state.kept) == ["a"]
        getattr(pair.safe, second)("a")
        pair.heed()
        assert not pair.state.kept
    assert kept_fds() == num_fds


def test_a_stage_of_any_length_is_kept(pair: Pair, fd: int) -> None:
    stage = STAGE.model_copy(update={"told": {"MESH": "x" * 1_000_000}})
    pair.safe.keep("a", stage.model_dump_json(), [fd, fd])
    pair.heed()
    assert Stage.model_validate_json(pair.state.kept["a"].stage) == stage


def test_what_is_remembered_is_the_last_word(pair: Pair) -> None:
    for text in ("one", "x" * 300_000):
        pair.safe.remember("who", text)
        pair.heed()
        assert pair.state.remembered == {"who": text}


def test_a_keeper_that_does_not_read_keeps_no_save_waiting_and_hears_it_later(pair: Pair, fd: int) -> None:
    pair.safe.keep("a", STAGE.model_dump_json(), [fd])
    while not pair.safe._unsaid:
        pair.safe.stored("nothing")
    for name in ("b", "c"):
        pair.safe.keep(name, STAGE.model_dump_json(), [fd])  # as safe as the service alone
    pair.safe.released("a")
    pair.safe.done("a")
    pair.link.settimeout(60)
    pair.heed()
    pair.heed()
    assert list(pair.state.kept) == ["a"]
    while pair.state.kept:
        pair.safe.stored("nothing")  # the next word brings what was not said
        pair.heed()


@pytest.mark.parametrize("packet", [b"", b"{", b"[]", b'["keep", "a"]', b'["remember", "a"]', b'["what", "a"]'])
def test_what_a_keeper_cannot_make_anything_of_leaves_nothing_open(pair: Pair, packet: bytes) -> None:
    spare = os.dup(0)
    fds = [spare] if b"keep" not in packet and b"remember" not in packet else []
    with contextlib.suppress(ValueError):
        pair.state.heed(packet, fds)
    assert not pair.state.kept
    assert fds == [] or not os.path.exists(f"/proc/self/fd/{spare}")
    if not fds:
        os.close(spare)


def test_where_memory_lacks_copies_for_others_go_first_and_then_all_that_is_only_held(pair: Pair, fd: int) -> None:
    for name, text in {"part:1": '{"of_node": "b"}', "part:2": '{"of_node": ""}', "a": "{}", "b": "{}"}.items():
        pair.safe.keep(name, text, [fd, fd])
        if name != "b":  # which is not stored yet
            pair.safe.done(name)
        pair.heed_all()
    num_fds = kept_fds()
    for left in (["part:2", "a", "b"], ["b"], ["b"]):
        pair.state.shed_bytes = 0
        num_before = len(pair.state.kept)
        pair.state.shed()
        assert list(pair.state.kept) == left
        assert pair.state.shed_bytes == (num_before - len(left)) * 2 * len(b"a slot")
    assert kept_fds() == num_fds - 3 * 3  # with their papers


KEEPER = """
import os, signal, sys
from pathlib import Path
from storage.service import keeper

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as it is where whoever starts it ignores the end of children
looks = iter(range(100))
keeper.num_oom_kills = lambda: next(looks)  # one more with each
keeper._LACK_S = 0.0

def serve(listener, link, state):
    safe = keeper.KeeperSafe(link, list(state.kept))
    if not state.num_restarts:
        fd = os.memfd_create("x")
        for name, text in {"part:1": '{"of_node": "b"}', "part:2": '{"of_node": ""}', "a": "{}"}.items():
            safe.keep(name, text, [fd])
        safe.done("part:1"), safe.done("part:2")
        os.write(fd, b"four")
    print(*state.kept, state.shed_bytes, flush=True)
    if state.num_restarts < 3:
        os.kill(os.getpid(), signal.SIGKILL)

sys.exit(keeper.keep(Path(sys.argv[1]), serve, int(sys.argv[2])))
"""


def test_a_service_that_is_killed_for_lack_of_memory_is_started_with_less(tmp_path: Path) -> None:
    path, (reading, writing) = tmp_path / "node" / "service.sock", os.pipe()
    command = [sys.executable, "-c", KEEPER, str(path), str(reading)]
    process = subprocess.Popen(command, pass_fds=[reading], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until("its socket", path.exists)
        with socket.socket(socket.AF_UNIX) as caller:
            until("it to listen", lambda: caller.connect_ex(str(path)) == 0)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
    assert out.splitlines() == ["0", "part:2 a 4", "a 4", "a 0"]
    assert err.count("memory may be what it lacks") == 3


WITHOUT_STDOUT = """
import sys
from pathlib import Path
from storage.service import keeper

sys.stdout = None  # as Python has it where that was closed
sys.exit(keeper.keep(Path(sys.argv[1]), lambda listener, link, state: None, None))
"""


def test_a_service_that_has_no_stdout_ends_all_the_same(tmp_path: Path) -> None:
    """And is not taken for one that has crashed, and started again for ever."""
    path = tmp_path / "node" / "service.sock"
    process = subprocess.Popen([sys.executable, "-c", WITHOUT_STDOUT, str(path)], stderr=subprocess.PIPE, text=True)
    try:
        until("its socket", path.exists)
        with socket.socket(socket.AF_UNIX) as caller:
            until("it to listen", lambda: caller.connect_ex(str(path)) == 0)
            _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, "started again" in err) == (0, False)


def test_whoever_looks_through_a_folder_keeps_no_service_from_beginning_there(tmp_path: Path) -> None:
    """It has the lock for an instant, which a service takes for another one's otherwise."""
    path = tmp_path / "node" / "service.sock"
    swept = address.lock(path)
    assert swept is not None
    assert address.lock(path) is None
    with ThreadPoolExecutor(1) as beside:
        beginning = beside.submit(address.lock, path, 60.0)
        address.remove(path)
        os.close(swept)
        begun = beginning.result()
    assert begun is not None
    os.close(begun)
