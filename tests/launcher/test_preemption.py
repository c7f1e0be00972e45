"""Watchers for preemption notices: files, three clouds' metadata services on loopback, and third parties' own."""

from __future__ import annotations

import datetime
import email.utils
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.drain.clouds import AwsSpot, AzureScheduledEvents, GcpPreemption
from launcher.drain.draining import DrainOrder, DrainSource
from launcher.drain.notices import Notice, seconds_left
from launcher.drain.preemption import FileWatcher, NoticeWatch, OrderWatcher, watchers
from launcher.errors import UsageError
from tests.cluster import until

ACTION, REBALANCE = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/recommendations/rebalance"
TOKEN = "secret-token"


class Metadata:
    """A metadata service: IMDSv2 with tokens that expire, and the two others' headers."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.tokens: list[str] = []
        self.asked: list[str] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                outer.put(self)

            def do_GET(self) -> None:
                outer.get(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def put(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in handler.headers:
            self._answer(handler, 400, "")
            return
        self.tokens.append(f"{TOKEN}-{len(self.tokens)}")
        self._answer(handler, 200, self.tokens[-1])

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(handler.path)
        allowed = {
            "/latest": bool(self.tokens) and handler.headers.get("X-aws-ec2-metadata-token") == self.tokens[-1],
            "/computeMetadata": handler.headers.get("Metadata-Flavor") == "Google",
            "/metadata": handler.headers.get("Metadata") == "true" and "api-version=" in handler.path,
        }
        if not any(ok for prefix, ok in allowed.items() if path.startswith(f"{prefix}/")):
            self._answer(handler, 401, "")
        elif self.status != 200:
            self._answer(handler, self.status, "")
        else:
            self._answer(handler, 200 if path in self.answers else 404, self.answers.get(path, ""))

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, body: str) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body.encode())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    served = Metadata()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{served.address}")
    monkeypatch.setenv("GCE_METADATA_HOST", served.address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: a proxy is never asked
    yield served
    served.close()


def ahead(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


class TestAws:
    def test_an_interruption_is_told_with_its_time(self, metadata: Metadata) -> None:
        watcher = AwsSpot()
        assert watcher.poll() is None
        metadata.answers[ACTION] = json.dumps(
            {"action": "terminate", "time": ahead(120).strftime("%Y-%m-%dT%H:%M:%SZ")}
        )
        notice = watcher.poll()
        assert notice is not None
        assert "terminate" in notice.detail
        assert notice.within_s is not None and 0 < notice.within_s <= 120
        assert len(metadata.tokens) == 1, "one token serves many polls"

    @pytest.mark.parametrize("body", ["", "soon", "[]", '{"action": "stop"}', '{"action": "stop", "time": "soon"}'])
    def test_what_cannot_be_read_is_a_notice_all_the_same(self, metadata: Metadata, body: str) -> None:
        metadata.answers[ACTION] = body
        assert AwsSpot().poll() == Notice("AWS takes this instance")

    def test_a_token_that_has_expired_is_replaced(self, metadata: Metadata) -> None:
        watcher = AwsSpot()
        assert watcher.poll() is None
        metadata.tokens.append("another")
        assert watcher.poll() is None
        assert len(metadata.tokens) == 3

    def test_a_rebalance_recommendation_is_a_hint(self, metadata: Metadata) -> None:
        metadata.answers[REBALANCE] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
        notice = AwsSpot().poll()
        assert notice is not None
        assert not notice.is_final

    def test_the_token_is_in_no_error_and_no_log(self, metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        metadata.status = 500
        watcher = AwsSpot()
        with pytest.raises(OSError, match="HTTP status 500") as error:
            watcher.poll()
        assert TOKEN in metadata.tokens[0]
        assert TOKEN not in f"{error.value!r} {caplog.text} {vars(error.value)}"

    def test_where_there_is_no_service_the_error_says_what_was_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=r"127\.0\.0\.1:9/latest/api/token"):
            AwsSpot().poll()


def test_gcp(metadata: Metadata) -> None:
    path, watcher = "/computeMetadata/v1/instance/preempted", GcpPreemption()
    metadata.answers[path] = "FALSE"
    assert watcher.poll() is None
    metadata.answers[path] = "TRUE\n"
    assert watcher.poll() == Notice("GCP preempts this instance", 30.0)


class TestAzure:
    def document(self, metadata: Metadata, *events: dict[str, Any]) -> Notice | None:
        metadata.answers["/metadata/instance/compute/name"] = "pool_3"
        metadata.answers["/metadata/scheduledevents"] = json.dumps({"DocumentIncarnation": 1, "Events": events})
        return AzureScheduledEvents(f"http://{metadata.address}").poll()

    def test_a_preemption_of_this_machine_is_a_notice(self, metadata: Metadata) -> None:
        at = email.utils.format_datetime(ahead(30), usegmt=True)
        other = {"EventType": "Reboot", "Resources": ["pool_3"], "NotBefore": at}
        notice = self.document(metadata, other, {"EventType": "Preempt", "Resources": ["pool_3"], "NotBefore": at})
        assert notice is not None
        assert notice.is_final and "Preempt" in notice.detail
        assert notice.within_s is not None and 0 < notice.within_s <= 30

    def test_one_that_has_started_leaves_the_time_to_the_node(self, metadata: Metadata) -> None:
        notice = self.document(metadata, {"EventType": "Preempt", "Resources": ["pool_3"], "NotBefore": ""})
        assert notice == Notice("Azure scheduled event: Preempt")

    def test_other_machines_are_none_of_ours(self, metadata: Metadata) -> None:
        assert self.document(metadata, {"EventType": "Preempt", "Resources": ["pool_1", "pool_33"]}) is None

    def test_a_reboot_is_a_hint(self, metadata: Metadata) -> None:
        notice = self.document(metadata, {"EventType": "Reboot", "Resources": ["pool_3"]})
        assert notice is not None
        assert not notice.is_final


class TestFile:
    def test_it_appears(self, tmp_path: Path) -> None:
        path = tmp_path / "notice"
        watcher = FileWatcher(str(path))
        assert watcher.poll() is None
        path.touch()
        assert watcher.poll() == Notice(f"the file {path}")

    @pytest.mark.parametrize(
        ("text", "within_s"),
        [("45\n", 45.0), ("-3", None), ("when we say so", None), ("\0", None), ("inf", None), ("1767225600", None)],
    )
    def test_it_may_say_how_long_there_is(self, tmp_path: Path, text: str, within_s: float | None) -> None:
        path = tmp_path / "notice"
        path.write_text(text)
        notice = FileWatcher(str(path)).poll()
        assert notice is not None
        assert notice.within_s == within_s

    def test_it_may_say_when(self, tmp_path: Path) -> None:
        path = tmp_path / "notice"
        path.write_text(ahead(90).isoformat())
        notice = FileWatcher(str(path)).poll()
        assert notice is not None and notice.within_s is not None
        assert 0 < notice.within_s <= 90


def test_a_time_that_is_over_or_far_is_not_believed() -> None:
    now = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
    unix_s = now.timestamp()
    assert seconds_left(now + datetime.timedelta(seconds=7), unix_s) == 7
    assert seconds_left(datetime.datetime(2026, 1, 1, 12, 0, 7), unix_s) == 7, "no zone is UTC"
    assert seconds_left(now, unix_s) is None
    assert seconds_left(now + datetime.timedelta(days=2), unix_s) is None


def test_a_command_is_a_notice_with_its_own_source() -> None:
    assert OrderWatcher(lambda: None).poll() is None
    order = DrainOrder(("a",), "me@here", 20.0)
    assert OrderWatcher(lambda: order).poll() == Notice("elastic-moe drain by me@here", 20.0, DrainSource.COMMAND)


class Scripted:
    """A watcher that does what it is told, in this order; then nothing."""

    poll_s = 0.001

    def __init__(self, *said: Notice | Exception) -> None:
        self.said = list(said)
        self.num_polls = 0

    def poll(self) -> Notice | None:
        self.num_polls += 1
        found = self.said.pop(0) if self.said else None
        if isinstance(found, Exception):
            raise found
        return found


class TestNoticeWatch:
    def run(self, watcher: Scripted) -> tuple[list[Notice], list[tuple[str, dict[str, Any]]]]:
        heeded: list[Notice] = []
        told: list[tuple[str, dict[str, Any]]] = []
        with NoticeWatch({"w": watcher}, heeded.append, lambda event, /, **fields: told.append((event, fields))):
            until("all was said", lambda: heeded or (not watcher.said and watcher.num_polls > 5))
        return heeded, told

    def test_a_notice_is_heeded_once(self) -> None:
        heeded, told = self.run(Scripted(Notice("now"), Notice("again")))
        assert heeded == [Notice("now")]
        assert told == []

    def test_hints_and_errors_are_told_once_each_and_watching_goes_on(self) -> None:
        hint, down = Notice("perhaps", is_final=False), OSError("no route")
        heeded, told = self.run(Scripted(hint, down, down, hint, down, Notice("now")))
        assert heeded == [Notice("now")]
        assert told == [
            ("preemption_hint", {"watcher": "w", "detail": "perhaps"}),
            ("preemption_watch_failed", {"watcher": "w", "reason": "OSError: no route"}),
            ("preemption_watch_failed", {"watcher": "w", "reason": "OSError: no route"}),
        ]


class TestNames:
    @pytest.fixture
    def installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A third party's package, as pip leaves it."""
        info = tmp_path / "ours-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
        points = "[elastic_moe.preemption]\nours = ours_notices:OurWatcher\nbroken = ours_missing:Nothing\n"
        (info / "entry_points.txt").write_text(points)
        (tmp_path / "ours_notices.py").write_text(
            "from launcher.drain.notices import Notice\n"
            "class OurWatcher:\n"
            "    poll_s = 1.0\n"
            "    def __init__(self, argument):\n"
            "        self.argument = argument\n"
            "    def poll(self):\n"
            "        return Notice(f'ours: {self.argument}')\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    def test_several_may_be_given(self, tmp_path: Path) -> None:
        found = watchers([f"file:{tmp_path / 'a'}", f"file:{tmp_path / 'b'}", "aws"])
        assert [type(w) for w in found.values()] == [FileWatcher, FileWatcher, AwsSpot]

    def test_a_third_partys_is_found_by_its_entry_point(self, installed: None) -> None:
        (watcher,) = watchers(["ours:rack:7"]).values()
        assert watcher.poll() == Notice("ours: rack:7")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("awz", "--preemption-notice awz: there is no such watcher; did you mean aws?"),
            ("weather", "known are file, aws, gcp, azure, broken, ours"),
            ("file", "--preemption-notice file: expected file:PATH"),
            ("aws:x", "takes no argument"),
            ("azure:ftp://x", "is not an http:// address"),
            ("azure:http://x:port", "Port could not be cast to integer value"),
            ("broken", "ours_missing:Nothing cannot be loaded: ModuleNotFoundError"),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, installed: None, spec: str, message: str) -> None:
        with pytest.raises(UsageError) as error:
            watchers([spec])
        assert message in str(error.value)
        assert "\n" not in str(error.value)
