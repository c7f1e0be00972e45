"""An NFS that shows new files late is told where nodes meet on it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from elastic_moe import mounts
from elastic_moe.mounts import remembers_absence
from elastic_moe.register import open_register

ROOT = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"
NFS = "40 22 0:50 / /shared rw,relatime shared:7 - nfs4 server:/export {}"


@pytest.mark.parametrize(
    ("lines", "folder", "found"),
    [
        ((ROOT, NFS.format("rw,vers=4.2,hard")), "/shared/meet", "/shared"),
        ((NFS.format("rw,vers=4.2,hard"), ROOT), "/shared", "/shared"),
        ((ROOT, NFS.format("rw,vers=3,lookupcache=pos")), "/shared/meet", ""),
        ((ROOT, NFS.format("rw,vers=3,lookupcache=none")), "/shared/meet", ""),
        ((ROOT, NFS.format("rw,sync,noac,acregmin=0,acdirmax=0")), "/shared/meet", ""),
        ((ROOT, NFS.format("rw")), "/sharedelse", ""),
        ((ROOT.replace(" - ext4", " - nfs"),), "/home", "/"),
        ((ROOT.replace(" - ext4", " - nfs"), NFS.format("rw").replace("nfs4", "xfs")), "/shared/x", ""),
        ((ROOT, NFS.format("rw").replace("/shared", "/a\\040b")), "/a b/meet", "/a b"),
        (("nonsense", "", "1 2 - x"), "/shared", ""),
    ],
)
def test_which_mounts_remember_that_a_file_was_not_there(lines: tuple[str, ...], folder: str, found: str) -> None:
    assert remembers_absence("\n".join(lines), folder) == found


def test_whoever_meets_on_one_is_told_what_to_mount_it_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    info = tmp_path / "mountinfo"
    info.write_text(ROOT.replace(" - ext4", " - nfs4"))
    monkeypatch.setattr(mounts, "MOUNT_INFO", info)
    with caplog.at_level(logging.WARNING):
        open_register(str(tmp_path / "meet")).close()
        open_register(f"file://{tmp_path}/a b?mode=0640").close()
    told = [record.getMessage() for record in caplog.records if "lookupcache=positive" in record.getMessage()]
    assert len(told) == 2
    assert all("\n" not in line for line in told)
