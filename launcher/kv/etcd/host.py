"""Runs a real etcd on this machine as a member of a cluster, and keeps it one: for `elastic-moe etcd`.

The engine is an installed etcd; here it is found, given its place (`seats.py`), started, and started again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import KVError, KVUnavailable, LauncherError
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.etcd.place import EtcdPlace, etcd_command, log_path
from launcher.kv.etcd.seats import (
    Add,
    ClusterView,
    Remove,
    Seat,
    SeatedMember,
    SetAside,
    StandBy,
    Start,
    Step,
    lost,
    next_step,
)
from launcher.kv.etcd.transport import AuthToken, Endpoints, Transport, etcdrpc

log = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 3.0
_STATUS_TIMEOUT_S = 0.5
_LOOK_TIMEOUT_S = 2.0  # a member that is slow is not lost
_FIRST_LOOK_S = 3.0  # for a cluster that may be there, before a new one is founded
_LOOK_PERIOD_S = 2.0
_TURN_S = 20.0
_POLL_S = 0.2
_TELL_PERIOD_S = 10.0
_STOP_TIMEOUT_S = 15.0
_NUM_FAILURES_MAX = 6
_LONGEST_PAUSE_S = 30.0

Tell = Callable[..., None]
"""`tell(event, **fields)`: starting, waiting, serving, ended, removed, added, set_aside, standing_by."""


class EtcdHost:
    """Takes this machine's seat, or stands by for one, from `run` until `stop` is set."""

    def __init__(self, place: EtcdPlace, tell: Tell) -> None:
        self.stop = threading.Event()
        self._place = place
        self._tell = tell
        self._told: tuple[str, object, float] = ("", None, 0.0)
        self._answered_s: dict[int, float] = {}
        self._began_s = time.monotonic()
        self._others = [seat for seat in place.seats if seat != place.own]
        self._cluster = self._to(self._others)  # one for all questions: it goes on with an endpoint that has answered

    def run(self) -> None:
        """Be a member until `stop` is set.

        Raises:
            LauncherError: etcd ends again and again, with its own last words.
        """
        try:
            self._run()
        finally:
            self._cluster.close()

    def _run(self) -> None:
        num_failures = 0
        while not self.stop.is_set():
            try:
                step = self._decide()
                if not isinstance(step, Start):
                    self._take(step)
                    continue
            except KVError as error:
                self._tell_now_and_then("waiting", reason=str(error))
                self.stop.wait(_LOOK_PERIOD_S)
                continue
            if not self.stop.is_set() and self._serve(step):
                num_failures = 0
            if self.stop.is_set():
                return
            num_failures += 1
            words = self._last_words()
            self._tell("ended", reason=words)
            if num_failures >= _NUM_FAILURES_MAX:
                raise LauncherError(f"etcd ended {num_failures} times in a row: {words}")
            self.stop.wait(min(_LONGEST_PAUSE_S, 2.0 ** (num_failures - 1)))

    def _tell_now_and_then(self, event: str, **fields: object) -> None:
        """Tell what is so for a while: when it begins, and what has changed since each ten seconds."""
        last, what, since_s = self._told
        now_s = time.monotonic()
        if last != event or (what != fields and now_s >= since_s + _TELL_PERIOD_S):
            self._told = (event, fields, now_s)
            self._tell(event, **fields)

    # --- what the others say

    @property
    def _has_data(self) -> bool:
        """Whether etcd has begun to keep a log here: whoever has none starts as a new member."""
        return any((self._place.data_dir / "member" / "wal").glob("*.wal"))

    def _decide(self) -> Step:
        place = self._place
        listed = self._list()
        while listed is None and not self._has_data and not self._is_alone() and not self.stop.wait(_POLL_S):
            listed = self._list()
        known = ClusterView(place.seats, place.num_seats, place.scheme, listed)
        if listed is not None and known.member_at(place.own) is None:
            self._look_at(listed)
            turn = max(0, place.seats.index(place.own) - place.num_seats)  # several may stand by: one after the other
            patience_s = place.replace_after_s + turn * _TURN_S
            gone = lost(known, self._answered_s, time.monotonic(), patience_s)
            known = ClusterView(place.seats, place.num_seats, place.scheme, listed, gone)
        return next_step(place.own, known, has_data=self._has_data)

    def _is_alone(self) -> bool:
        """Whether a new cluster may be founded: nobody can be asked, or has said anything for a while."""
        if all(_refuses(seat) for seat in self._others):
            return True
        if there := [seat.endpoint for seat in self._others if self._status(seat)]:
            raise KVUnavailable(f"etcd at {', '.join(there)} is there, and without a majority of its members")
        return time.monotonic() > self._began_s + _FIRST_LOOK_S

    def _list(self) -> tuple[SeatedMember, ...] | None:
        """The members, as a majority says; None where there is none to ask."""
        if not self._others:
            return None
        try:
            told = self._cluster.call(
                lambda peer: peer.cluster.MemberList, etcdrpc.MemberListRequest(), timeout_s=_ASK_TIMEOUT_S
            )
        except KVUnavailable as error:
            log.debug("nobody lists the members: %s", error)
            return None
        return tuple(SeatedMember(m.ID, m.name, tuple(m.peerURLs), tuple(m.clientURLs)) for m in told.members)

    def _to(self, seats: Sequence[Seat]) -> Transport:
        config = EtcdConfig(tuple((seat.host, seat.port) for seat in seats), self._place.config.tls)
        return Transport(config, Endpoints(len(seats)), AuthToken())

    def _status(self, seat: Seat, timeout_s: float = _STATUS_TIMEOUT_S) -> Any:
        """What the etcd there says of itself; None where it does not answer."""
        with contextlib.closing(self._to([seat])) as transport:
            try:
                return transport.call(
                    lambda peer: peer.maintenance.Status, etcdrpc.StatusRequest(), timeout_s=timeout_s
                )
            except KVError:
                return None

    def _look_at(self, listed: Sequence[SeatedMember]) -> None:
        """Note which members answer."""
        for member in listed:
            now_s = time.monotonic()
            self._answered_s.setdefault(member.member_id, now_s)
            seats = [seat for seat in map(_seat_of, member.client_urls) if seat]
            if any(self._status(seat, _LOOK_TIMEOUT_S) for seat in seats):
                self._answered_s[member.member_id] = now_s

    # --- what follows

    def _take(self, step: Step) -> None:
        match step:
            case Remove(member, reason):
                request = etcdrpc.MemberRemoveRequest(ID=member.member_id)
                self._cluster.call(lambda peer: peer.cluster.MemberRemove, request, timeout_s=_ASK_TIMEOUT_S)
                self._tell("removed", member=member.name, member_id=f"{member.member_id:x}", reason=reason)
            case Add(peer_url):
                add = etcdrpc.MemberAddRequest(peerURLs=[peer_url])
                self._cluster.call(lambda peer: peer.cluster.MemberAdd, add, timeout_s=_ASK_TIMEOUT_S, repeatable=False)
                self._tell("added", peer_url=peer_url)
            case SetAside():
                aside = self._place.data_dir.with_name(f"{self._place.data_dir.name}.removed")
                shutil.rmtree(aside, ignore_errors=True)  # of the time before
                self._place.data_dir.rename(aside)
                self._tell("set_aside", path=str(aside), reason="the cluster has removed the member that they are of")
            case StandBy(why):
                self._tell_now_and_then("standing_by", reason=why)
                self.stop.wait(_LOOK_PERIOD_S)

    def _serve(self, start: Start) -> bool:
        """Run etcd until it ends, or `stop` is set. Returns whether it has served."""
        place = self._place
        place.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._has_data:  # a start that was refused leaves an empty database
            shutil.rmtree(place.data_dir / "member", ignore_errors=True)
        command = place.tie(etcd_command(place, start))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        fd = os.open(self._path("stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment, umask=0o077
            )
        try:
            self._tell("starting", data_dir=str(place.data_dir))
            return self._watch(process)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, process: subprocess.Popen[bytes]) -> bool:
        serves, tell_s = False, time.monotonic() + _TELL_PERIOD_S
        while process.poll() is None and not self.stop.wait(_POLL_S):
            if serves:
                continue
            if (status := self._status(self._place.own)) and status.leader:
                serves = True
                self._tell("serving", version=status.version, endpoint=",".join(s.endpoint for s in self._place.seats))
            elif time.monotonic() >= tell_s:
                tell_s += _TELL_PERIOD_S
                others = [seat.endpoint for seat in self._others if _refuses(seat)]
                self._tell(
                    "waiting", reason=f"for a majority; nothing listens at {', '.join(others) or 'nowhere else'}"
                )
        return serves

    # --- what it leaves

    def _path(self, kind: str) -> Path:
        return self._place.data_dir.with_name(f"{self._place.data_dir.name}.{kind}")

    def _last_words(self) -> str:
        """What etcd said last of why it ended, in a line."""
        for path in (self._path("stderr"), log_path(self._place)):
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace")[-20_000:].strip().splitlines()
                if lines:
                    return _told_in(lines)
        return "it said nothing"


def _told_in(lines: Sequence[str]) -> str:
    """The gravest of etcd's JSON lines in words, or its last line as it is."""
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, Mapping) and entry.get("level") in ("fatal", "panic", "error"):
                error = f": {entry['error']}" if entry.get("error") else ""
                return f"{entry.get('msg')}{error}"[:500]
    return lines[-1][:500]


def _seat_of(url: str) -> Seat | None:
    """The seat whose clients use this URL; None if it is none."""
    match = re.fullmatch(r"https?://\[?([^\]/]+?)\]?:(\d+)/?", url)
    return Seat(match[1], int(match[2])) if match else None


def _refuses(seat: Seat) -> bool:
    """Whether nothing listens there, as far as its machine says; or the name is of no machine yet."""
    try:
        socket.create_connection((seat.host, seat.port), timeout=_STATUS_TIMEOUT_S).close()
    except (ConnectionRefusedError, socket.gaierror):
        return True
    except OSError:
        return False
    return False
