"""Real S3 servers as places where nodes meet: one that honours conditional puts, and one that does not."""

from __future__ import annotations

import contextlib

import pytest

from elastic_moe.register import open_register
from launcher.errors import UsageError
from launcher.kv.bucket.client import BucketKV
from tests.s3 import S3Server


def test_a_real_gateway_that_lets_two_writers_through_is_refused_in_one_line(juicefs: S3Server) -> None:
    with pytest.raises(UsageError, match="honours no conditional puts") as caught:
        open_register(juicefs.url("meet"))
    assert "\n" not in str(caught.value)


def test_nodes_meet_on_a_server_that_honours_conditions(moto: S3Server) -> None:
    with (
        contextlib.closing(BucketKV(open_register(moto.url("meet")))) as one,
        contextlib.closing(BucketKV(open_register(moto.url("meet")))) as other,
    ):
        lease = one.lease(30.0)
        entry = one.put("a", b"\x00", if_revision=0, lease=lease)
        assert entry is not None
        assert other.get("a") == entry
        assert other.put("a", b"", if_revision=0) is None
        lease.revoke()
        assert other.get("a") is None
