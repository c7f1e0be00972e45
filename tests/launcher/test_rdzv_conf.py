"""What `--rdzv-conf` may say: each key has a type, and a mistake is one line, under either command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousParameters

from launcher.elastic.handlers import create_handler
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.errors import UsageError

MISTAKES = [
    ({"is_host": "flase"}, "--rdzv-conf is_host=flase: expected true or false"),
    ({"is_host": "2"}, "--rdzv-conf is_host=2: expected true or false"),
    ({"lease_ttl": "soon"}, "--rdzv-conf lease_ttl=soon: expected a number of seconds"),
    ({"lease_ttl": "nan"}, "--rdzv-conf lease_ttl=nan: expected a number of seconds"),
    ({"join_timeout": "inf"}, "--rdzv-conf timeout=inf: expected a number of seconds"),
    ({"lease_ttl": "0"}, "--rdzv-conf lease_ttl=0: input should be greater than or equal to 1"),
    ({"strikes": "2.5"}, "--rdzv-conf strikes=2.5: expected a whole number"),
    ({"protocol": "ftp"}, "--rdzv-conf protocol=ftp: input should be 'http' or 'https'"),
    ({"cacert": ""}, "--rdzv-conf cacert=: a value is missing"),
    ({"lease_tl": "3"}, "--rdzv-conf lease_tl: no such key; did you mean lease_ttl?"),
    ({"join_timeut": "3"}, "--rdzv-conf join_timeut: no such key; did you mean join_timeout?"),
    ({"qqq": "3"}, "--rdzv-conf qqq: no such key; known are token_file, "),
    ({"token": "hidden"}, "--rdzv-conf token: every user of a machine can read its command lines; use token_file"),
]


def test_strings_as_torchrun_hands_them_over() -> None:
    conf = RendezvousConf.parse({"lease_ttl": "3", "last_call_timeout": "1.5", "timeout": 900, "rank": 0})
    assert (conf.lease_ttl, conf.last_call, conf.timeout) == (3.0, 1.5, 900.0)
    assert RendezvousConf.parse({"last_call": "4"}).last_call == 4.0


@pytest.mark.parametrize(("text", "meant"), [("true", True), ("False", False), ("1", True), ("no", False)])
def test_whether_this_node_hosts_the_store(text: str, meant: bool) -> None:
    assert RendezvousConf.parse({"is_host": text}).is_host is meant


def test_text_as_a_command_line_has_it() -> None:
    conf = RendezvousConf.parse_text(" token_file=/a , prefix=/jobs/,user=me, ")
    assert (conf.token_file, conf.prefix, conf.user, conf.cacert) == (Path("/a"), "/jobs/", "me", None)


@pytest.mark.parametrize(("given", "told"), MISTAKES)
def test_a_mistake_is_one_line(given: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError) as error:
        RendezvousConf.parse(given)
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)
    assert "hidden" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("text", "told"), [("user", "--rdzv-conf user: expected KEY=VALUE,..."), ("a=1,=b", "=b: ")])
def test_what_is_no_list_of_pairs(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        RendezvousConf.parse_text(text)


@pytest.mark.parametrize(("given", "told"), MISTAKES)
def test_under_torchrun(given: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        create_handler(RendezvousParameters("etcd3", "127.0.0.1:1", "r", 1, 2, None, timeout=900, **given))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"torchrun: error: {told}")
    assert err.count("\n") == 1
