"""What nobody needs any more in a run: left behind by jobs that died. The decision is pure; `remove` carries it out.

A job cleans up after its own forerunners whenever it commits (see `retention`). This is for runs that no job
works on any more, and for what no listing shows: parts of unfinished uploads. Age is the only judge here, because
nobody can be asked; committed and quarantined checkpoints are never touched.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from storage.errors import NotFound
from storage.format import layout
from storage.run import retention
from storage.run.retention import StepState
from storage.stores.keys import PROBE_PREFIX, is_probe_name
from storage.stores.objects import ObjectInfo, ObjectStore, Upload

AGE_S_MIN = 3600.0
"""The least age of what is removed. No save takes longer: younger things may be a living job's."""


class GarbageKind(enum.StrEnum):
    """What a thing was to its job; the value is what `ckpt gc` calls it."""

    ATTEMPT = "attempt"
    MANIFEST = "manifest"
    PROBE = "probe"
    HEARTBEAT = "beat"
    UPLOAD = "upload"


@dataclass(frozen=True)
class Garbage:
    """One thing to remove: an attempt or manifest that commits nothing, a probe, a heartbeat, an unfinished upload."""

    name: str
    kind: GarbageKind
    num_objects: int
    size_bytes: int
    modified_unix_s: float
    keys: tuple[str, ...] = ()
    upload: Upload | None = None


def find(store: ObjectStore, now_unix_s: float, age_s: float) -> list[Garbage]:
    """What is older than `age_s` and no part of any checkpoint, by name.

    Raises:
        Transient, Denied: by the store.
    """
    before_unix_s = now_unix_s - age_s
    probes, heartbeats = store.list(PROBE_PREFIX), store.list(layout.HEARTBEAT_PREFIX)
    found = of_names(probes, GarbageKind.PROBE, is_probe_name, before_unix_s)
    found += of_names(heartbeats, GarbageKind.HEARTBEAT, layout.is_heartbeat_name, before_unix_s)
    found += of_uploads(store.uploads(), before_unix_s)
    for state in retention.observe(store):
        found += of_step(state, store.list(layout.step_folder(state.step) + "/"), before_unix_s)
    return sorted(found, key=lambda garbage: (garbage.name, garbage.kind))


def of_step(state: StepState, listed: Iterable[ObjectInfo], before_unix_s: float) -> list[Garbage]:
    """What can go of one step. Pure.

    An attempt goes if all of it was last written before `before_unix_s`, and it is not the committed one. So does the
    manifest at the top of a step without a commit: its writer died just before it committed, or while it removed the
    step. Of a step that is quarantined, written by stock DCP, or whose manifest is damaged, nothing goes.
    """
    if state.quarantined or (state.committed and state.attempt is None):
        return []
    garbage = []
    objects = list(listed)
    for attempt in sorted(state.attempts - {state.attempt}):
        folder = f"{layout.step_folder(state.step)}/{layout.attempt_folder(attempt)}"
        own = [info for info in objects if info.key.startswith(folder + "/")]
        if (newest := _newest(own)) is not None and newest < before_unix_s:
            garbage.append(_of_objects(folder, GarbageKind.ATTEMPT, own, newest))
    if not state.committed:
        copy = f"{layout.step_folder(state.step)}/{layout.MANIFEST}"
        own = [info for info in objects if info.key == copy]
        if (newest := _newest(own)) is not None and newest < before_unix_s:
            garbage.append(_of_objects(copy, GarbageKind.MANIFEST, own, newest))
    return garbage


def of_names(
    listed: Iterable[ObjectInfo], kind: GarbageKind, is_one: Callable[[str], bool], before_unix_s: float
) -> list[Garbage]:
    """Probes (see `storage.stores.s3.probe`) and heartbeats (see `storage.run.heartbeat`) whose process died. Pure."""
    rows = [(info, _newest([info])) for info in listed if is_one(info.key)]
    return [_of_objects(i.key, kind, [i], when) for i, when in rows if when is not None and when < before_unix_s]


def of_uploads(uploads: Iterable[Upload], before_unix_s: float) -> list[Garbage]:
    """Uploads that nobody has finished. Pure."""
    old = [upload for upload in uploads if upload.started_unix_s < before_unix_s]
    return [Garbage(upload.key, GarbageKind.UPLOAD, 0, 0, upload.started_unix_s, upload=upload) for upload in old]


def remove(store: ObjectStore, garbage: Garbage) -> None:
    """Delete one thing. What is gone already is no error."""
    for key in garbage.keys:
        store.delete(key)
    if garbage.upload is not None:
        try:
            store.abort(garbage.upload)
        except NotFound:
            return


def _of_objects(name: str, kind: GarbageKind, objects: Sequence[ObjectInfo], newest_unix_s: float) -> Garbage:
    size_bytes = sum(info.size_bytes for info in objects)
    return Garbage(name, kind, len(objects), size_bytes, newest_unix_s, tuple(info.key for info in objects))


def _newest(objects: Sequence[ObjectInfo]) -> float | None:
    """When the last of them was written; None where the store does not say that of all."""
    times = [info.modified_unix_s for info in objects]
    known = [when for when in times if when is not None]
    return max(known) if known and len(known) == len(times) else None
