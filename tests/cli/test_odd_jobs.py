"""Every field of a job file in turn, with values that it cannot have: one line each, and none is read as another."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Strict

from elastic_moe import config
from elastic_moe.cli.console import ZonedFormatter
from elastic_moe.data.sources import find_sources
from elastic_moe.errors import UserError
from elastic_moe.section import Section
from launcher import Infeasible, MeshSpec, hide_secrets, price
from launcher.events import append_event
from launcher.rounds.mesh import _rounds
from storage import StorageError, open_store
from storage.text import DiscreetFormatter
from storage.text import hide_secrets as of_storage

HUGE = 1 << 20_000
"""More digits than Python writes."""

ODD: list[Any] = [
    *(True, "", "abc", "1", "inf", "\0", "x" * 500, -1, 0, 1, 1.5, 1.0, 1e308, math.nan, math.inf, -math.inf),
    *(10**28, 1 << 63, 10**400, HUGE, [], {}, [1, 2], {"a": 1}, "none", "no\nline", "\udcff"),
]


def fields() -> Iterator[tuple[str, str, Any]]:
    for section, info in config.JobConfig.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        for name, field in model.model_fields.items():
            yield section, name, field.annotation


def types_of(annotation: Any) -> set[Any]:
    """The plain types that a field says it takes."""
    if typing.get_origin(annotation) is Literal:
        return {str}
    if inner := typing.get_args(annotation):
        return {each for one in inner for each in types_of(one)}
    return {annotation} if isinstance(annotation, type) else set()


def marks_of(annotation: Any) -> list[Any]:
    """What is said of a field's type beside the type."""
    return [mark for one in (annotation, *typing.get_args(annotation)) for mark in getattr(one, "__metadata__", ())]


@pytest.mark.parametrize("value", ODD, ids=["huge" if value == HUGE else repr(value)[:12] for value in ODD])
def test_a_value_is_taken_as_what_it_is_or_refused_in_one_line(value: Any) -> None:
    for section, name, annotation in fields():
        if name == "calibration":
            continue  # a file is read
        try:
            job = config.checked({section: {name: value}}, "job.toml")
            config.mesh_spec(job)
        except UserError as error:
            told = str(error)
            assert name in told or section == "mesh", told
            assert "\n" not in told
            assert len(told) < 500
            continue
        taken = getattr(getattr(job, section), name)
        if value == "none" and type(None) in types_of(annotation):
            assert taken is None
        elif name != "preset":
            assert taken == (float(value) if type(taken) is float else value)
            assert type(value) in types_of(annotation) or (type(value) is int and float in types_of(annotation))


@pytest.mark.parametrize(
    "fields",
    [
        {
            "mesh": {"flops_per_s": 1.0, "memory_bytes_per_s": 1.0, "latency_s": 3600.0},
            "train": {"global_batch": 10**7},
        },
        {"mesh": {"memory_gib": 1e-3, "max_idle": 1 << 62}},
        {
            "model": {"num_layers": 1 << 62, "num_experts": 1 << 62, "vocab_size": 1 << 62},
            "train": {"seq_len": 1 << 62},
        },
    ],
)
def test_a_mesh_is_planned_for_whatever_a_job_may_say(fields: dict[str, Any]) -> None:
    spec = config.mesh_spec(config.checked(fields, "job.toml"))
    with contextlib.suppress(Infeasible):
        assert price(8, spec, ranks_per_node=8).step_s > 0


def test_a_mistyped_batch_is_planned_for_in_no_time() -> None:
    assert sum(1 for _ in _rounds(8, MeshSpec(global_batch=10**20))) < 1000
    few = [rounds for _, rounds in _rounds(1, MeshSpec(global_batch=60))]
    assert few == sorted({-(-60 // micro_batch) for micro_batch in range(1, 61)})


def test_what_may_be_none_is_that_by_its_name(tmp_path: Path) -> None:
    """TOML has no word for it, and the metrics and the clipping are there by default."""
    path = tmp_path / "job.toml"
    path.write_text('[train]\nmetrics = "none"\n[optim]\nclip_norm = "none"\n')
    job = config.load(path, environ={"ELASTIC_MOE__MESH__CALIBRATION": "none"})
    assert (job.train.metrics, job.optim.clip_norm, job.mesh.calibration) == (None, None, None)
    with pytest.raises(UserError, match=r"data\.url"):
        config.load(path, sets=["data.url=none", "data.url="], environ={})


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xef\xbb\xbf[train]\nsteps = 3\n", ""),
        (b"[train]\r\nsteps = 3\r\n", ""),
        (b"", ""),
        (b"\xff\xfe[\0t\0", "is not a TOML file"),
        (b"a = " + b"[" * 9000 + b"]" * 9000, "nested too deeply"),
        (b"[train]\nsteps = 3\nsteps = 4\n", "is not a TOML file"),
        (b"[train.steps]\na = 1\n", "train.steps = {'a': 1}: it must be a valid integer"),
        (b"[[train]]\nsteps = 1\n", "train = [{'steps': 1}]: it must be a valid dictionary"),
        (b'["tr\\u0000ain"]\nsteps = 1\n', "unknown section"),
        ('[train]\n"schritte ü" = 1\n'.encode(), "unknown key train.schritte ü"),
        (b"[data]\nend_of_document = 1.5\n", "data.end_of_document = 1.5: it must be a valid integer"),
        (b"[model]\nx = 1\ny = 2\ndim = 0\n", "(and 2 more)"),
    ],
)
def test_odd_files(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    if not line:
        assert config.load(path, environ={}).train.steps in (3, 100)
        return
    with pytest.raises(UserError) as caught:
        config.load(path, environ={})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device without an end, and a checkpoint's tensors."""
    pipe, large = tmp_path / "pipe.toml", tmp_path / "large.toml"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    for path, line in ((pipe, "is a pipe or a device"), (Path("/dev/zero"), "is a pipe"), (large, "larger than 1 MiB")):
        with pytest.raises(UserError, match=line) as caught:
            config.load(path, environ={})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["train.metrics", "train.init_from", "data.cache", "mesh.calibration"])
@pytest.mark.parametrize("url", ["s3://bucket/x", "file:///tmp/x"])
def test_a_url_is_no_local_path(field: str, url: str, tmp_path: Path) -> None:
    """The system would make a folder of that name, here, of which nobody knows."""
    (tmp_path / "job.toml").touch()
    with pytest.raises(UserError, match=r"is a URL, and must be a path on this machine|cannot be read"):
        config.load(tmp_path / "job.toml", sets=[f"{field}={url}"], environ={})


@pytest.mark.parametrize("url", ["s3:/bucket/run", "gs:/bucket/run", "fsspec+s3:/bucket"])
def test_a_url_with_one_slash_is_no_folder(url: str) -> None:
    for section in ("checkpoint", "data"):
        with pytest.raises(UserError, match=rf"{section}\.url: '{re.escape(url)}' has one slash: write "):
            config.checked({section: {"url": url}}, "job.toml")
    for fine in (
        f"./{url}",
        "http://h:80/a@b",
        "file:/tmp/x",
        "C:/x",
        "simplecache::http://host/x",
        "zip://*::/tmp/x.zip",
    ):
        assert config.checked({"data": {"url": fine}}, "job.toml").data.url == fine


def test_a_file_url_names_one_folder_on_every_way(tmp_path: Path) -> None:
    """As it stands: fsspec, which reads data, makes no blank of %20 either."""
    (tmp_path / "a%20b.txt").write_text("text")
    for given, meant in ((f"file://localhost{tmp_path}/x", f"file://{tmp_path}/x"), ("file:///a%20b", "file:///a%20b")):
        checked = config.checked({"data": {"url": given}, "checkpoint": {"url": given}}, "job.toml")
        assert (checked.data.url, checked.checkpoint.url) == (meant, meant)
    (found,) = find_sources(config.checked({"data": {"url": f"file://{tmp_path}/a%20b.txt"}}, "job.toml").data)
    assert found.path == open_store(f"file://{tmp_path}/a%20b.txt/run").url.removesuffix("/run")
    with pytest.raises(UserError, match=r"'file://host/x' must be file:///absolute/path"):
        config.checked({"data": {"url": "file://host/x"}}, "job.toml")


@pytest.mark.parametrize(
    "field", [f"{section}.{name}" for section, name, kind in fields() if Strict() in marks_of(kind)]
)
def test_a_password_in_a_url_is_told_to_nobody(field: str) -> None:
    section, _, name = field.partition(".")
    for scheme, variable in (("ftp", "FSSPEC_FTP_PASSWORD"), ("https", "FSSPEC_HTTPS in"), ("s3", "AWS_SECRET_ACCESS")):
        with pytest.raises(
            UserError, match=rf"{section}\.{name}: '.*u:\.\.\.@host.* has a password.*{variable}"
        ) as caught:
            config.checked({section: {name: f"{scheme}://u:hunt/er2@host/x"}}, "job.toml")
        assert "er2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see ftp://u:p@ss@host/x, or it", "see ftp://u:...@host/x, or it"),
        ('{"a":"https://:p@h/x","b":"http://h:1/@x"}', '{"a":"https://:...@h/x","b":"http://h:1/@x"}'),
        ("s3://b/x?X-Amz-Signature=ab&X-Amz-Expires=3", "s3://b/x?X-Amz-Signature=...&X-Amz-Expires=3"),
        ("https://h/x?key=v&sig=a%2Bb#c", "https://h/x?key=v&sig=...#c"),
        ('got "https://h/x?token=ab" \\"', 'got "https://h/x?token=..." \\"'),
        ("s3://AKIA:ab/cd+e@b/x", "s3://AKIA:...@b/x"),
        ("https://ghp_ab@host/x", "https://...@host/x"),
        ("zip://a::s3://b/c@d", "zip://a::s3://b/c@d"),
        ("tcp://[::1]:80/a@b", "tcp://[::1]:80/a@b"),
        ("http://h:1/x?tokenizer=bpe&max_tokens=3", "http://h:1/x?tokenizer=bpe&max_tokens=3"),
        ("u:p@host and a?token=b", "u:p@host and a?token=b"),
        ("http://127.0.0.1:80/ of u@host", "http://127.0.0.1:80/ of u@host"),
    ],
)
def test_secrets_of_urls_are_left_out_of_what_is_told(text: str, told: str, tmp_path: Path) -> None:
    assert hide_secrets(text) == told
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (text,), None)
    assert ZonedFormatter("%(message)s").format(record) == told
    append_event(tmp_path / "events", run_id="", node="", generation=0, event="e", fields={"reason": text})
    assert json.loads((tmp_path / "events").read_text())["reason"] == told
    assert of_storage(text) == told
    assert DiscreetFormatter("%(message)s").format(record) == told
    assert str(StorageError(text)) == told


@pytest.mark.parametrize("name", ["a job.toml", "jöb ☃.toml", "-job.toml", "job.toml/", "../{here}/./job.toml"])
def test_a_job_file_may_be_named_as_it_likes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = name.format(here=tmp_path.name)
    Path(name).write_text("[train]\nsteps = 3\n")
    assert config.load(name, environ={}).train.steps == 3


def test_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job file, and behind a `--set`'s `=`, no shell has seen it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.toml").write_text('[checkpoint]\nurl = "~/run"\n[data]\nurl = "~"\n')
    job = config.load("~/job.toml", sets=["train.metrics=~/m.jsonl"], environ={})
    found = (job.checkpoint.url, job.data.url, job.train.metrics)
    assert found == (f"{tmp_path}/run", str(tmp_path), f"{tmp_path}/m.jsonl")
    assert config.checked({"data": {"url": "a~/~"}}, "job.toml").data.url == "a~/~"
