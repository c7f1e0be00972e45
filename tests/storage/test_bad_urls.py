"""A URL that names no store, or a setting that is wrong: one line that says what to do, and holds no secret."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from storage.errors import BadURL, Denied, Forbidden
from storage.stores.atomic_files import AtomicFiles
from storage.stores.registry import open_store


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "empty"),
        ("gs://bucket/run", "install gcsfs"),
        ("nothing://bucket/run", "nothing://"),
        ("/data/run-\udcff", "no valid Unicode text"),
        ("~nobody-has-this/run", "a home that is not known here"),
        ("fsspec+nothing://bucket/run", "nothing://"),
        ("file://host/run", "file:///absolute"),
        ("file://", "file:///absolute"),
        ("memory://", "name"),
        ("s3://", "needs a bucket"),
        ("s3:///run", "needs a bucket"),
        ("s3://key:hunter2@bucket/run", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/run?secret_access_key=hunter2", "does not belong into a URL"),
        ("s3://bucket/run?session_token=hunter2", "does not belong into a URL"),
        ("s3://bucket/run?colour=red", "no option 'colour'"),
        ("s3://bucket/run?part_size_mib=1", "part_size_mib=1"),
        ("s3://bucket/run?sse=rot13", "sse=rot13"),
        ("s3://bucket/run?endpoint_url=localhost:9000", "must be http://host"),
        ("s3://bucket/../run", "refused"),
        ("s3://bucket/run?profile=nobody-has-this", "no profile 'nobody-has-this'"),
        ("s3://no/run?endpoint_url=https://u:hunter2@host", "must be http://host"),
        ("file:///run?mode=0666", "mode=0666 .* one of 0600, 0640, 0644, 0660, 0664"),
        ("file:///run?mode=0777", "mode=0777"),
        ("file:///run?mode=0400", "mode=0400"),
        ("file:///run?mode=rw", "mode=rw"),
        ("file:///run?mode=9", "mode=9"),
        ("file:///run?mode=", "has the option mode"),
        ("file:///run?umask=022", "has the option mode"),
        ("file:///run?mode=0640&x=1", "has the option mode"),
        ("file:///what?", "has a . as a path"),
        ("/run?mode=0640", r"file:///run\?mode=0640 instead"),
        ("run?mode=0640", r"file:///.*/run\?mode=0640 instead"),
        ("s3://bucket/run?request_payer=me", "request_payer=me"),
        ("s3://bucket/run?checksum=md4", "checksum=md4"),
        ("ftp://u:hunter2@host/run", "FSSPEC_FTP_PASSWORD"),
        ("fsspec+sftp://:hunter2@ss@host/run", "FSSPEC_SFTP_PASSWORD"),
    ],
)
def test_bad_urls_are_told_in_one_line_without_secrets(url: str, says: str) -> None:
    with pytest.raises(BadURL, match=says) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_names_are_taken_as_they_stand(tmp_path: Path) -> None:
    """As fsspec and the AWS command line take them; a run that was written with %20 so far is not begun anew."""
    assert open_store(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a%20b"
    (tmp_path / "a b").mkdir()
    assert open_store(f"file://{tmp_path}/a b?mode=0640").url == f"file://{tmp_path}/a b?mode=0640"
    with pytest.raises(BadURL, match=r"a%20b .* write it so, names are taken as they stand"):
        open_store(f"file://{tmp_path}/a%20b")
    (tmp_path / "a%20b").mkdir()
    assert open_store(f"file://localhost{tmp_path}/a%20b").url == f"{tmp_path}/a%20b"


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing" / "here")
    for url, says in {"file/run": "is no folder", "link": "is no folder", "x" * 300: "File name too long"}.items():
        with pytest.raises((BadURL, Denied), match=says) as caught:
            open_store(tmp_path / url).put("k", [b"x"])
        assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)

    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    with pytest.raises(BadURL, match="run is below the current folder, which is gone"):
        open_store("run")


def test_a_file_system_that_is_only_read_is_no_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    store = open_store(tmp_path)
    monkeypatch.setattr(AtomicFiles, "put", refuse)
    with pytest.raises(Forbidden, match=r"Read-only file system; what is only read takes Access\.READ"):
        store.put("k", [b"x"])
