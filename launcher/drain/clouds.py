"""The preemption notices of three clouds, from the metadata service that each machine can ask without credentials.

Asked directly, never through a proxy and never following a redirect: the service is the machine's own, and AWS's
session token must reach nobody else. The token is in no error, event or log.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from launcher.drain.notices import Notice, seconds_left

_TIMEOUT_S = 3.0
_BODY_BYTES_MAX = 1 << 16
_TEXT_CHARS_MAX = 100


def _ask(
    base_url: str, path: str, headers: Mapping[str, str], *, method: str = "GET", timeout_s: float = _TIMEOUT_S
) -> tuple[int, str]:
    """Send one request, and return its status and body.

    Raises:
        OSError: no answer, or none that is HTTP.
    """
    parts = urlsplit(base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    try:
        connection.request(method, parts.path.rstrip("/") + path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(_BODY_BYTES_MAX).decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"{base_url}{path}: no HTTP answer ({type(error).__name__})") from error
    except OSError as error:
        raise OSError(f"{base_url}{path}: {error}") from error
    finally:
        connection.close()


def _expect_ok(base_url: str, path: str, status: int) -> None:
    if status != 200:
        raise OSError(f"{base_url}{path}: HTTP status {status}")


def _take_no_argument(argument: str) -> None:
    if argument:
        raise ValueError(f"takes no argument, got {argument!r}")


def _checked(url: str, what: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.port == 0:  # `port` raises ValueError if it is no number
        raise ValueError(f"{what}{url!r} is not an http:// address")
    return url


class AwsSpot:
    """EC2's interruption notice, two minutes ahead, through IMDSv2; the rebalance recommendation is a hint.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html (also for the period)
    """

    poll_s = 5.0
    _TOKEN_TTL_S = 21600

    def __init__(self, argument: str = "") -> None:
        _take_no_argument(argument)
        ipv6 = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        default = "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"
        variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
        self._base_url = _checked(os.environ.get(variable) or default, f"{variable}=")
        self._token = ""

    def poll(self) -> Notice | None:
        action = self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            return _aws_notice(action)
        if self._get("/latest/meta-data/events/recommendations/rebalance") is not None:
            return Notice("AWS recommends to rebalance: an interruption is more likely", is_final=False)
        return None

    def _get(self, path: str) -> str | None:
        """Return what lies at a path, None where nothing does (404). An expired token (401) is replaced once."""
        status, body = 401, ""
        for _ in range(2):
            if not self._token:
                self._token = self._new_token()
            status, body = _ask(self._base_url, path, {"X-aws-ec2-metadata-token": self._token})
            if status != 401:
                break
            self._token = ""
        if status == 404:
            return None
        _expect_ok(self._base_url, path, status)
        return body

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(self._TOKEN_TTL_S)}
        status, token = _ask(self._base_url, "/latest/api/token", headers, method="PUT")
        _expect_ok(self._base_url, "/latest/api/token", status)
        return token.strip()


def _aws_notice(body: str) -> Notice:
    """Read `{"action": "terminate", "time": "2026-01-01T12:00:00Z"}`; what cannot be read is a notice all the same."""
    try:
        fields = json.loads(body)
        action, at = str(fields["action"]), str(fields["time"])
        within_s = seconds_left(datetime.datetime.fromisoformat(at), time.time())
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Notice("AWS takes this instance")
    return Notice(f"AWS spot: {action[:_TEXT_CHARS_MAX]} at {at[:_TEXT_CHARS_MAX]}", within_s)


class GcpPreemption:
    """Compute Engine's `instance/preempted`, which turns TRUE up to 30 s before the machine is stopped.

    https://cloud.google.com/compute/docs/instances/create-use-preemptible
    """

    poll_s = 1.0
    _NOTICE_S = 30.0
    _PATH = "/computeMetadata/v1/instance/preempted"

    def __init__(self, argument: str = "") -> None:
        _take_no_argument(argument)
        host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        self._base_url = _checked(f"http://{host}", "GCE_METADATA_HOST: ")

    def poll(self) -> Notice | None:
        status, body = _ask(self._base_url, self._PATH, {"Metadata-Flavor": "Google"})
        _expect_ok(self._base_url, self._PATH, status)
        return Notice("GCP preempts this instance", self._NOTICE_S) if body.strip() == "TRUE" else None


class AzureScheduledEvents:
    """Azure's scheduled events `Preempt` and `Terminate` for this machine; a reboot or redeployment of it is a hint.

    The document is that of all machines of a scale or availability set, so events name whom they concern.
    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events (its first answer may take two minutes)
    """

    poll_s = 1.0
    _FIRST_TIMEOUT_S = 150.0
    _EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
    _NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"

    def __init__(self, argument: str = "") -> None:
        """`argument`: another address of the service, where the usual one cannot be reached."""
        self._base_url = _checked(argument or "http://169.254.169.254", "")
        self._name = ""

    def poll(self) -> Notice | None:
        if not self._name:
            self._name = self._get(self._NAME_PATH).strip()
        document = json.loads(self._get(self._EVENTS_PATH))
        notices = [_azure_notice(event) for event in document.get("Events", []) if self._concerns_this(event)]
        return next((n for n in notices if n.is_final), notices[0] if notices else None)

    def _concerns_this(self, event: Mapping[str, Any]) -> bool:
        return self._name in event.get("Resources", [])

    def _get(self, path: str) -> str:
        timeout_s = self._FIRST_TIMEOUT_S if path == self._EVENTS_PATH else _TIMEOUT_S
        status, body = _ask(self._base_url, path, {"Metadata": "true"}, timeout_s=timeout_s)
        _expect_ok(self._base_url, path, status)
        return body


def _azure_notice(event: Mapping[str, Any]) -> Notice:
    kind, not_before = str(event.get("EventType", ""))[:_TEXT_CHARS_MAX], str(event.get("NotBefore", ""))
    try:
        within_s = seconds_left(email.utils.parsedate_to_datetime(not_before), time.time())
    except ValueError:  # it is empty once the event has started
        within_s = None
    return Notice(f"Azure scheduled event: {kind}", within_s, is_final=kind in ("Preempt", "Terminate"))
