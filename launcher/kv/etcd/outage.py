"""May a lease have ended while etcd did not answer? Not if no member of before can lead any more.

Only a leader of the cluster ends leases, and one that is elected gives every lease its full TTL again (`Promote` in
etcd's server/lease/lessor.go). So at the moment in which every member either refuses connections, its process not being
there, or says that it does not lead, whoever leads later was elected after: no lease ends before a TTL from then.

A member that is started again listens before it serves: it has its data to read and a leader to find. A connection that
was refused a moment ago and now hangs says that a process is there, and no more. Its leader may have been elected right
after the last refusal and have been frozen before it served, and leases end by the time that it was frozen for. So the
last refusal is the last proof, and etcd has a TTL from it to answer a renewal in (workers yield at 0.6 of it).

Silence proves nothing: a member that does not answer may lead, and have lost only the way to this node. Nor does the
refusal of an address that is not a member's own (a load balancer's, a tunnel's): an endpoint counts for a member if it
is an address that this member, and no other, tells its clients to use, and if that member answered there.
"""

from __future__ import annotations

import enum
import logging
import math
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from launcher.errors import KVError
from launcher.kv.etcd.transport import EndpointChannel, Rpc, Transport, etcdrpc, grpc, metadata_of

log = logging.getLogger(__name__)

LONGEST_TTL_S = 300.0
"""Of longer leases etcd notes every five minutes what is left (`checkpointInterval`); a new leader gives them that."""

_LEARN_PERIOD_S = 60.0
_ASK_AGAIN_S = 5.0
"""While a member that was away at the first question is not known."""
_ANSWER_TIMEOUT_S = 0.3

Address = tuple[str, int]


class MemberState(enum.Enum):
    """What a member says when it is asked whether it leads."""

    REFUSED = "refused"  # no process listens there
    FOLLOWS = "follows"  # it does not lead
    UNKNOWN = "unknown"  # it leads, or does not answer


@dataclass(frozen=True)
class MemberList:
    """What the member behind an endpoint says of the cluster: its own id, and each member's addresses for clients."""

    member_id: int
    members: Mapping[int, frozenset[Address]]


def own_endpoints(endpoints: Mapping[int, frozenset[Address]], told: Mapping[int, MemberList]) -> dict[int, int]:
    """Match members with the endpoints that are their own.

    Args:
        endpoints: every address that an endpoint's name stands for, by the endpoint's index.
        told: what the endpoints that answered said, by their index.

    Returns:
        The endpoint's index by the member's id; empty unless all answers name the same members and each member has one.
    """
    if not told or len({frozenset(t.members) for t in told.values()}) != 1:
        return {}
    members = next(iter(told.values())).members
    found = {}
    for index, said in told.items():
        others = frozenset[Address]().union(*(a for m, a in members.items() if m != said.member_id))
        addresses = endpoints[index]
        if addresses and addresses <= members.get(said.member_id, frozenset()) and not addresses & others:
            found[said.member_id] = index
    return found if found.keys() == members.keys() else {}


def none_leads(answers: Iterable[MemberState]) -> bool:
    """Whether no member leads that led before the first of these answers, which are all members', was asked for."""
    found = list(answers)
    return bool(found) and all(answer in (MemberState.REFUSED, MemberState.FOLLOWS) for answer in found)


class EtcdMembers:
    """The members of a cluster, as they are known and can be asked. For the thread of one lease at a time."""

    def __init__(self, transport: Transport, endpoints: tuple[Address, ...]) -> None:
        self.trusts_refusals = True
        self._transport = transport
        self._endpoints = endpoints
        self._own: dict[int, int] = {}
        self._addresses: dict[int, frozenset[Address]] = {}
        self._learnt_s = -math.inf

    def learn(self) -> None:
        """Ask who the members are, once in a while; etcd has just answered."""
        now_s = time.monotonic()
        if not self.trusts_refusals or now_s < self._learnt_s + _LEARN_PERIOD_S:
            return
        self._learnt_s = now_s
        told = {}
        for index in range(len(self._endpoints)):
            try:
                answer = self._ask(index, lambda p: p.cluster.MemberList, etcdrpc.MemberListRequest())
            except (grpc.RpcError, KVError, ValueError) as error:
                log.debug("%s does not name its members: %s", self._transport.name(index), error)
                continue
            members = {m.ID: _addresses_of(m.clientURLs) for m in answer.members}
            told[index] = MemberList(answer.header.member_id, members)
        addresses = {index: _resolve(*endpoint) for index, endpoint in enumerate(self._endpoints)}
        own = own_endpoints(addresses, told)
        if own and not self._own:
            log.info(
                "etcd's %d members are known: an outage in which none can lead does not stop the workers", len(own)
            )
        if own or len(told) == len(self._endpoints):  # else a member is away, and what was known before stands
            self._own, self._addresses = own, addresses  # together: a name may be unknown while its member is away
            if not own:
                log.info("the endpoints given are not those of all members of etcd: an outage will stop the workers")
        elif not self._own:
            self._learnt_s = now_s - _LEARN_PERIOD_S + _ASK_AGAIN_S

    def no_lease_ends(self) -> bool:
        """Whether no lease can end before its TTL from now on, although etcd does not answer."""
        answers = []
        for member_id, index in self._own.items():
            answers.append(self._state_of(member_id, index))
            if answers[-1] is MemberState.UNKNOWN:
                break
        return none_leads(answers)

    def _state_of(self, member_id: int, index: int) -> MemberState:
        addresses = self._addresses[index]
        if all(_refuses(address) for address in addresses):
            # The member may have got another address since, and lead there: its old one refuses.
            return MemberState.REFUSED if _resolve(*self._endpoints[index]) == addresses else MemberState.UNKNOWN
        try:
            status = self._ask(index, lambda p: p.maintenance.Status, etcdrpc.StatusRequest())
        except (grpc.RpcError, KVError, ValueError):
            return MemberState.UNKNOWN
        follows = status.header.member_id == member_id and status.leader != member_id
        return MemberState.FOLLOWS if follows else MemberState.UNKNOWN

    def _ask(self, index: int, rpc: Rpc, request: Any) -> Any:
        peer: EndpointChannel = self._transport.peer(index)
        token = self._transport.authenticate(peer, _ANSWER_TIMEOUT_S)
        return rpc(peer)(request, timeout=_ANSWER_TIMEOUT_S, metadata=metadata_of(token))


def _refuses(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=_ANSWER_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _addresses_of(urls: Iterable[str]) -> frozenset[Address]:
    found: frozenset[Address] = frozenset()
    for url in urls:
        parts = urlsplit(url)
        if parts.hostname and parts.port:
            found |= _resolve(parts.hostname, parts.port)
    return found


def _resolve(host: str, port: int) -> frozenset[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return frozenset()
    return frozenset((str(address[0]), port) for *_, address in found)
