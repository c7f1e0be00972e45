"""Which mounted file systems show a new file late. Pure but for reading what the kernel says of them."""

from __future__ import annotations

import os
from pathlib import Path

_NFS = ("nfs", "nfs4")
_SHOWS_AT_ONCE = ("lookupcache=none", "lookupcache=pos", "lookupcache=positive", "noac", "acdirmax=0", "acdirmax=1")
MOUNT_INFO = Path("/proc/self/mountinfo")


def remembers_absence(mount_info: str, folder: str) -> str:
    """Where the file system of `folder` is mounted, if it is an NFS that goes on for up to a minute to say that a file
    is not there which another host has made; "" if it is not, or if nothing is known.

    See nfs(5), "lookupcache" and "acdirmax".

    Args:
        mount_info: as of proc(5), /proc/PID/mountinfo.
        folder: an absolute path without links.
    """
    best, found = "", ""
    for line in mount_info.splitlines():
        before, _, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(more) < 3:
            continue
        mount = fields[4].encode().decode("unicode_escape")  # a space is told as \\040
        if len(mount) < len(best) or not (folder + "/").startswith(mount.rstrip("/") + "/"):
            continue
        options = {*fields[5].split(","), *more[2].split(",")}
        best = mount
        found = mount if more[0] in _NFS and not options.intersection(_SHOWS_AT_ONCE) else ""
    return found


def mount_that_remembers_absence(folder: str) -> str:
    """The same of this machine's mounts."""
    try:
        return remembers_absence(MOUNT_INFO.read_text(errors="replace"), os.path.realpath(folder))
    except OSError:
        return ""
