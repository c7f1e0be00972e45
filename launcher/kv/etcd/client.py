"""The store in an etcd v3 cluster: survives the loss of any node, and of a minority of its own members."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from launcher.errors import KVError, KVUnavailable, UsageError
from launcher.kv.base import Entry, Snapshot
from launcher.kv.etcd.config import EtcdConfig
from launcher.kv.etcd.diagnosis import Flaw, diagnose
from launcher.kv.etcd.outage import LONGEST_TTL_S, EtcdMembers
from launcher.kv.etcd.transport import (
    CALL_TIMEOUT_S,
    AuthToken,
    Endpoints,
    LeaseEnded,
    Transport,
    UserRefused,
    etcdrpc,
    is_half_close_refused,
)
from launcher.kv.etcd.watch import EtcdWatch
from launcher.kv.lease import Lease

log = logging.getLogger(__name__)

_DIAGNOSIS_TIMEOUT_S = 1.0
_DIAGNOSIS_STEP_TIMEOUT_S = 0.5  # it connects, asks, and asks once more with TLS
_RETRY_S = 0.2
_RENEWALS_RECONNECT_S = 0.1  # an etcd that is back has a part of a TTL left to answer in: none of it is slept away


class EtcdKV:
    """A client of one cluster. Calls and watches share a channel; leases are renewed over one of their own.

    Nothing is connected before the first call. A process that holds an open one must not fork without exec.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        endpoints, token = Endpoints(len(config.endpoints)), AuthToken()
        self._calls = Transport(config, endpoints, token)
        self._renewals = Transport(config, endpoints, token, reconnect_s=_RENEWALS_RECONNECT_S)
        self._members = EtcdMembers(self._renewals, config.endpoints)
        self._leases: list[Lease] = []
        self._watches: list[EtcdWatch] = []

    def distrust_refusals(self) -> None:
        """Take a refused connection for silence: the endpoint may be a tunnel's near end."""
        self._members.trusts_refusals = False

    def wait_ready(self, timeout_s: float, prefix: str = "elastic-moe/") -> None:
        """Wait until etcd answers a read of the keys under `prefix`, which this client's user may need a right to.

        Raises:
            UsageError: it does not within `timeout_s`, or shows before then that it never will.
        """
        ends_s = time.monotonic() + timeout_s
        told = False
        probe = self._range(prefix, count_only=True)
        while True:
            try:
                for transport in (self._calls, self._renewals):  # no lease's first renewal waits for a connection
                    left_s = ends_s - _DIAGNOSIS_TIMEOUT_S - time.monotonic()
                    transport.call(lambda p: p.kv.Range, probe, timeout_s=max(0.5, min(left_s, CALL_TIMEOUT_S)))
                self._members.learn()  # before there is a lease to keep, and while nobody waits for this node
                return
            except UserRefused as error:
                raise UsageError(str(error)) from error
            except KVUnavailable as error:
                flaw = self._diagnose(str(error), prefix)
                if flaw.permanent or time.monotonic() >= ends_s - _DIAGNOSIS_TIMEOUT_S:
                    raise self._unusable(flaw.what) from error
                if not told:
                    log.warning("etcd cannot be used yet: %s; asked again for %g s", flaw.what, timeout_s)
                    told = True
            except KVError as error:
                if "user name is empty" in str(error):
                    raise UsageError(
                        "--rdzv-conf user: this etcd wants one; set user=NAME and password_file=PATH"
                    ) from error
                raise self._unusable(
                    f"something listens there, but it does not answer as etcd does ({error})"
                ) from error
            time.sleep(_RETRY_S)

    def _unusable(self, why: str) -> UsageError:
        named = ",".join(self._calls.name(i) for i in range(len(self._config.endpoints)))
        return UsageError(f"--rdzv-endpoint {named} cannot be used: {why}")

    def _diagnose(self, told: str, prefix: str) -> Flaw:
        """Return the flaw that tells a user most: one that waiting will not mend, else the first endpoint's."""
        if "permission denied" in told:
            user = f"user {self._config.user}" if self._config.user else "this client"
            return Flaw(f"{user} may not read {prefix!r}", permanent=True)
        each_s = _DIAGNOSIS_STEP_TIMEOUT_S / len(self._config.endpoints)
        flaws = [diagnose(host, port, self._config.tls, each_s) for host, port in self._config.endpoints]
        found = [flaw for flaw in flaws if flaw is not None]
        if len(found) < len(flaws):  # one speaks as etcd does: without a leader, or still starting
            return Flaw(told, permanent=False)
        return next((flaw for flaw in found if flaw.permanent), found[0])

    def get(self, key: str) -> Entry | None:
        answer = self._calls.call(lambda p: p.kv.Range, etcdrpc.RangeRequest(key=key.encode()))
        return self._entry(answer.kvs[0]) if answer.kvs else None

    def put(
        self, key: str, value: bytes, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> Entry | None:
        put = etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease.lease_id if lease else 0)
        read = etcdrpc.RangeRequest(key=key.encode())  # in the same transaction: what was just written
        request = etcdrpc.TxnRequest(
            compare=self._unchanged(key, if_revision),
            success=[etcdrpc.RequestOp(request_put=put), etcdrpc.RequestOp(request_range=read)],
        )
        try:
            answer = self._calls.call(lambda p: p.kv.Txn, request, repeatable=if_revision is None)
        except LeaseEnded:
            return None
        return self._entry(answer.responses[1].response_range.kvs[0]) if answer.succeeded else None

    def list(self, prefix: str) -> Snapshot:
        answer = self._calls.call(lambda p: p.kv.Range, self._range(prefix))
        return Snapshot(tuple(self._entry(kv) for kv in answer.kvs), answer.header.revision)

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        delete = etcdrpc.DeleteRangeRequest(key=key.encode())
        request = etcdrpc.TxnRequest(
            compare=self._unchanged(key, if_revision), success=[etcdrpc.RequestOp(request_delete_range=delete)]
        )
        answer = self._calls.call(lambda p: p.kv.Txn, request, repeatable=False)
        return bool(answer.succeeded and answer.responses[0].response_delete_range.deleted)

    def watch(self, prefix: str, from_revision: int) -> EtcdWatch:
        watch = EtcdWatch(self._calls, *_span(prefix), from_revision)
        self._watches = [w for w in self._watches if not w.is_cancelled()]
        self._watches.append(watch)
        return watch

    def lease(self, ttl_s: float) -> Lease:
        """Grant a lease. etcd grants whole seconds and a least TTL; the lease's `ttl_s` is what it granted."""
        granted_s = time.monotonic()
        granted = self._calls.call(lambda p: p.lease.LeaseGrant, etcdrpc.LeaseGrantRequest(TTL=math.ceil(ttl_s)))
        lease_id, granted_ttl_s = granted.ID, float(granted.TTL)
        if granted_ttl_s > ttl_s:
            log.info("lease TTL %g s asked for, %g s granted", ttl_s, granted_ttl_s)
        lease = Lease(
            lease_id,
            granted_ttl_s,
            granted_s=granted_s,
            renew=lambda: self._renew(lease_id, granted_ttl_s),
            revoke=lambda: self._revoke(lease_id),
            stands=self._members.no_lease_ends if granted_ttl_s <= LONGEST_TTL_S else None,
        ).start()
        self._leases.append(lease)
        return lease

    def _renew(self, lease_id: int, ttl_s: float) -> bool:
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease_id)
        endpoints = self._renewals.endpoints
        timeout_s, first_share = renewal_times(min(CALL_TIMEOUT_S, ttl_s), endpoints.num_endpoints)
        try:
            answer = self._renewals.call(
                lambda p: p.renew_held_open if endpoints.holds_streams_open else p.renew,
                request,
                timeout_s=timeout_s,
                first_share=first_share,
            )
        except LeaseEnded:
            return False
        except KVUnavailable as error:
            if not endpoints.holds_streams_open and is_half_close_refused(str(error)):
                endpoints.holds_streams_open = True
                log.info("streams to etcd stay open in both directions from now on: %s", error)
                return self._renew(lease_id, ttl_s)
            raise
        if answer.TTL > 0:
            self._members.learn()
        return bool(answer.TTL > 0)  # 0 is how etcd answers for a lease that it does not know

    def _revoke(self, lease_id: int) -> None:
        try:
            self._calls.call(lambda p: p.lease.LeaseRevoke, etcdrpc.LeaseRevokeRequest(ID=lease_id))
        except LeaseEnded:
            log.debug("lease %x had ended before it was revoked", lease_id)

    def close(self) -> None:
        for lease in self._leases:
            lease.stop()
        for watch in self._watches:
            watch.cancel()
        self._calls.close()
        self._renewals.close()

    # --- keys

    def _entry(self, kv: Any) -> Entry:
        return Entry(kv.key.decode(), kv.value, kv.mod_revision, kv.create_revision)

    def _range(self, prefix: str, *, count_only: bool = False) -> Any:
        key, range_end = _span(prefix)
        return etcdrpc.RangeRequest(key=key, range_end=range_end, count_only=count_only)

    def _unchanged(self, key: str, revision: int | None) -> tuple[Any, ...]:
        """Return the condition of a transaction; a key that does not exist has revision 0."""
        if revision is None:
            return ()
        compare = etcdrpc.Compare
        return (compare(result=compare.EQUAL, target=compare.MOD, key=key.encode(), mod_revision=revision),)


def renewal_times(ttl_s: float, num_endpoints: int) -> tuple[float, float]:
    """Return how long a renewal may take, in seconds, and the share of that for the first endpoint.

    Followers of an etcd leader that was killed hold a renewal until they have elected another one. So that this is
    found out before workers have to yield (0.6 TTL after the last answer; a renewal begins 0.25 TTL after it), the
    first endpoint has a quarter of a TTL, and the next one only the time that an etcd takes that is well.
    """
    if num_endpoints == 1:
        return ttl_s / 2, 1.0
    return 0.3 * ttl_s, 0.25 / 0.3


def _span(prefix: str) -> tuple[bytes, bytes]:
    """Return the first key, and the end, of the range of all keys with a prefix; a zero byte means "no end" to etcd."""
    first = prefix.encode()
    end = first[:-1] + bytes([first[-1] + 1]) if first else b"\0"  # no byte of UTF-8 is the last one
    return first or b"\0", end
