"""Names of a run's objects. Pure.

RUN/owner.json                                  who may commit (see `storage.run.owner`)
RUN/beat-<token>                                changes as long as the owner of that claim lives (see `run.heartbeat`)
RUN/step-000000120/.metadata                    stock DCP metadata: it is there <=> the checkpoint is committed
RUN/step-000000120/manifest.json                index with checksums (see `manifest`), a copy of the attempt's
RUN/step-000000120/attempt-<uuid>/manifest.json the index of that attempt, never overwritten
RUN/step-000000120/attempt-<uuid>/__<rank>_<i>.distcp    data of one attempt, never overwritten
RUN/step-000000120/attempt-<uuid>-<n>/<xx>/__<rank>_<i>.distcp    the same, spread over n prefixes
RUN/step-000000120/attempt-<uuid>/receipt-<rank>.json    what that rank wrote, or why it could not
RUN/step-000000120/attempt-<uuid>/aborted.json           why the coordinator gave the attempt up
RUN/step-000000120/quarantined-<sha256>.metadata  a `.metadata` that counts no more: its checkpoint was found corrupt
RUN/.probe-<hex>                                what a process asked the store with, and would have removed
"""

from __future__ import annotations

import hashlib
import numbers
import re

from storage.errors import UsageError

QUARANTINED_PREFIX = "quarantined-"
OWNER = "owner.json"
HEARTBEAT_PREFIX = "beat-"
METADATA = ".metadata"
MANIFEST = "manifest.json"
ABORTED = "aborted.json"

PREFIX_SPREAD_MAX = 256
"""The most prefixes over which the data of an attempt can be spread."""

STEP_LIMIT = 1 << 63
"""Steps are below it, for they travel as 64 bits with a sign."""

_STEP = re.compile(r"step-(\d{9,19})")
_ATTEMPT = re.compile(r"attempt-([0-9a-f-]{8,64})")
_ATTEMPT_NAMED = re.compile(rb"attempt-([0-9a-f-]{8,64})/(?:[0-9a-f]{2}/)?__")
_SPREAD = re.compile(r"[0-9a-f-]{32,60}-([0-9a-f]{1,3})")  # no id of others ends in so short a part
_ATTEMPT_MANIFEST = re.compile(r"attempt-[0-9a-f-]{8,64}/manifest\.json")
_RECEIPT = re.compile(r"receipt-(\d{6,})\.json")
_DATA_OF = re.compile(r"attempt-([0-9a-f-]{8,64})/(?:[^/]+/)*__(\d+)_\d+\.distcp")
_DATA = re.compile(r"attempt-[0-9a-f-]{8,64}/(?:([0-9a-f]{2})/)?__\d+_\d+\.distcp")
_BEAT = re.compile(r"beat-[0-9a-f]{32}")


def as_step(step: object) -> int:
    """`step` as a plain int; numpy's integers count as whole numbers, and bools do not. Raises UsageError."""
    if not isinstance(step, bool) and isinstance(step, numbers.Integral) and 0 <= int(step) < STEP_LIMIT:
        return int(step)
    shown = " ".join(repr(step).split())
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise UsageError(f"step is {shown} ({type(step).__name__}); it must be a whole number from 0 to 2**63 - 1")


def step_folder(step: int) -> str:
    """Folder name of a step's checkpoint. Raises UsageError."""
    return f"step-{as_step(step):09d}"


def parse_step(name: str) -> int | None:
    """The step of a folder name, None for other folders."""
    match = _STEP.fullmatch(name)
    step = int(match[1]) if match else STEP_LIMIT
    return step if step < STEP_LIMIT else None


def attempt_folder(attempt: str) -> str:
    """Folder name of an attempt, below its step."""
    return f"attempt-{attempt}"


def parse_attempt(name: str) -> str | None:
    """The attempt's id, None for other folders."""
    match = _ATTEMPT.fullmatch(name)
    return match[1] if match else None


def attempts_in(metadata: bytes) -> list[str]:
    """The attempts whose data objects `metadata`, a `.metadata`, names; sorted."""
    return sorted({found.decode() for found in _ATTEMPT_NAMED.findall(metadata)})


def with_spread(attempt: str, prefix_spread: int) -> str:
    """The id of an attempt like `attempt` whose data objects lie under so many prefixes: at least 1, at most 256.

    The number is in the id: whoever names an object of the attempt, on whichever rank or service, does so alike.
    """
    return attempt if prefix_spread == 1 else f"{attempt}-{prefix_spread:x}"


def data_name(attempt: str, rank: int, index: int) -> str:
    """A data object's name below its step; also `relative_path` in the stock metadata.

    Where the attempt is spread, a folder of two digits is between. Objects take turns, those of a rank as well as those
    of neighbours, and the folders lie evenly among all that there could be: a store that divides its keys into ranges,
    as S3 does, can tell them apart by the first digit.
    """
    match = _SPREAD.fullmatch(attempt)
    spread = int(match[1], 16) if match else 1
    between = f"{(rank + index) % spread * PREFIX_SPREAD_MAX // spread:02x}/" if spread > 1 else ""
    return f"{attempt_folder(attempt)}/{between}__{rank}_{index}.distcp"


def parse_data_name(name: str) -> tuple[str, int] | None:
    """The attempt and the rank of a data object, by its name below its step; None for other objects."""
    match = _DATA_OF.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def is_data_name(name: str) -> bool:
    """Whether `data_name` could have made `name`."""
    return _DATA.fullmatch(name) is not None


def is_spread(name: str) -> bool:
    """Whether a data object's name is that of an attempt that is spread over prefixes."""
    match = _DATA.fullmatch(name)
    return match is not None and match[1] is not None


def manifest_name(attempt: str) -> str:
    """Name, below its step, of the manifest of one attempt."""
    return f"{attempt_folder(attempt)}/{MANIFEST}"


def is_manifest_name(name: str) -> bool:
    """Whether `manifest_name` could have made `name`."""
    return _ATTEMPT_MANIFEST.fullmatch(name) is not None


def receipt_name(attempt: str, rank: int) -> str:
    """A receipt's name below its step."""
    return f"{attempt_folder(attempt)}/receipt-{rank:06d}.json"


def parse_receipt(name: str) -> int | None:
    """The rank of a receipt, by the last part of its name; None for other objects."""
    match = _RECEIPT.fullmatch(name)
    return int(match[1]) if match else None


def aborted_name(attempt: str) -> str:
    """Name, below its step, of the note that the coordinator leaves when it gives an attempt up."""
    return f"{attempt_folder(attempt)}/{ABORTED}"


def quarantined_name(metadata: bytes) -> str:
    """Name, below its step, under which `metadata` is set aside: it says of which `.metadata` it is a copy."""
    return f"{QUARANTINED_PREFIX}{hashlib.sha256(metadata).hexdigest()}{METADATA}"


def heartbeat_name(token: str) -> str:
    """Name of what the owner with that claim writes as long as it lives."""
    return HEARTBEAT_PREFIX + token


def is_heartbeat_name(name: str) -> bool:
    """Whether `heartbeat_name` could have made `name`, of the token of a Checkpointer."""
    return _BEAT.fullmatch(name) is not None


def split_step_url(url: str) -> tuple[str, str]:
    """Split the URL of one step's folder into the run's URL and the key prefix; ("…", "") for any other URL.

    What follows a `?` in a URL with a scheme are options of the store, and stays with the run.
    """
    path, query = _split_query(url)
    run, slash, last = path.rstrip("/").rpartition("/")
    if slash and parse_step(last) is not None:
        return run + query, last + "/"
    return url, ""


def join_url(url: str, key: str) -> str:
    """The URL of what is called `key` in the store at `url`."""
    path, query = _split_query(url)
    return f"{path.rstrip('/')}/{key}".rstrip("/") + query


def _split_query(url: str) -> tuple[str, str]:
    path, mark, query = url.partition("?") if "://" in url else (url, "", "")
    return path, mark + query
