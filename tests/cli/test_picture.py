"""`report --picture`: what is found in the lines of an interrupted run, and that it is drawn."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli import main as cli
from elastic_moe.pictures.story import curve, loads, read_lines, tell
from elastic_moe.whole_files import write_whole

RECORDED = Path(__file__).parent / "report"


def line(step: int, ts: float, generation: int = 1, world_size: int = 4, **more: Any) -> dict[str, Any]:
    told = {
        "step": step,
        "loss": 5.0 - 0.02 * step,
        "ts": ts,
        "generation": generation,
        "world_size": world_size,
        "mesh": {"replicate": world_size // 2, "shard": 1, "expert": 2},
        "tokens_per_s": 1000.0 * world_size,
        "load_max": 1.5,
        "load_min": 0.5,
        "mfu": 0.4,
        "val_loss": None,
        "load": [[6, 2, 4, 4], [4, 4, 4, 4]] if step % 10 == 0 else None,
    }
    return {**told, **more}


def broken_run(began_ts: float = 0.0) -> list[dict[str, Any]]:
    """Steps 1 to 25 on four ranks; two are lost, 21 to 25 are done again on two; from 41 on four again."""
    records = [line(step, began_ts + step) for step in range(1, 26)]
    records += [line(step, began_ts + 10 + step, 2, 2) for step in range(21, 41)]
    records += [line(step, began_ts + 12 + step, 3, 4, val_loss=4.2 if step == 50 else None) for step in range(41, 61)]
    return records


def test_steps_that_were_done_again_do_not_draw_backwards() -> None:
    story = tell(broken_run())
    steps, losses = story.curve("loss")
    assert steps == list(range(1, 61))
    assert not any(math.isnan(loss) for loss in losses)
    assert [[record["step"] for record in lost] for lost in story.lost] == [[21, 22, 23, 24, 25]]
    assert {record["generation"] for record in story.lost[0]} == {1}
    assert [(s.generation, s.world_size, s.first, s.last) for s in story.spans] == [
        (1, 4, 1, 20),
        (2, 2, 21, 40),
        (3, 4, 41, 60),
    ]


def test_a_step_done_three_times_is_lost_twice() -> None:
    twice = [
        *broken_run()[:25],
        *(line(step, 30 + step, 2) for step in (21, 22)),
        *(line(s, 60 + s, 3) for s in range(21, 30)),
    ]
    story = tell(reversed(twice))  # whatever the order of files
    assert [[record["step"] for record in lost] for lost in story.lost] == [[21, 22, 23, 24, 25], [21, 22]]
    assert story.curve("loss")[0] == list(range(1, 30))


def test_a_curve_breaks_where_steps_or_numbers_are_missing() -> None:
    records = [line(1, 1), line(2, 2, loss=None), line(5, 5)]
    steps, losses = curve(records, "loss")
    assert steps == [1, 2, 4.5, 5]
    assert [math.isnan(loss) for loss in losses] == [False, True, True, False]


def test_loads_are_those_over_the_mean_of_all_layers() -> None:
    steps, columns = loads([line(9, 9), line(10, 10), line(20, 20, load=[[0, 0, 0, 0]])])
    assert steps == [10]
    assert columns == [[1.25, 0.75, 1.0, 1.0]]


def test_what_is_no_record_is_counted() -> None:
    good = json.dumps(line(1, 1.0))
    records, unreadable = read_lines(
        [good, "", "{", '{"step": "1", "ts": 1}', "[1]", '{"step": 1, "ts": NaN}', '{"ts": 1}']
    )
    assert [record["step"] for record in records] == [1]
    assert unreadable == 5


@pytest.mark.parametrize(
    "change",
    [
        *({"loss": "x"}, {"val_loss": []}, {"tokens_per_s": "1"}, {"load_max": True}, {"mfu": {}}),
        *({"step": True}, {"step": -1}, {"step": 10**30}, {"step": 1.0}, {"ts": "x"}, {"ts": math.inf}),
    ],
)
def test_what_is_no_number_is_not_drawn(change: dict[str, Any]) -> None:
    """Of text a picture would make the names of places on an axis."""
    good = line(1, 1.0)
    assert read_lines([json.dumps(good), json.dumps(good | change)]) == ([good], 1)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def report(*argv: object) -> int:
    return cli.main(["report", *map(str, argv)])


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_picture_beside_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began_ts = json.loads((RECORDED / "events.jsonl").read_text().partition("\n")[0])["ts"]
    metrics = written(tmp_path / "metrics.jsonl", broken_run(began_ts))
    picture = tmp_path / "run.png"
    assert report(RECORDED, "--picture", picture, "--metrics", metrics) == 0
    assert f"{picture} shows the training" in capsys.readouterr().out
    assert png_size(picture) == (1600, 1350)


@pytest.mark.parametrize("records", [broken_run()[:1], [line(3, 1.0, loss=None, load_max=None, load_min=None)]])
def test_a_picture_of_little(records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without events, and with the file found where the job left it; an old line without the newer fields."""
    records = [{name: value for name, value in record.items() if name not in ("load", "mfu")} for record in records]
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "metrics.jsonl", records)
    assert report("--picture", "run.png") == 0
    assert png_size(tmp_path / "run.png") == (1600, 1050)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--picture", "run.jpg"), r"--picture run.jpg: the name must end with .png, .svg, .pdf"),
        (("--picture", "run.png"), "no metrics.jsonl in or beside ."),
        (("--picture", "run.png", "--metrics", "none.jsonl"), "none.jsonl: No such file or directory"),
        (("--picture", "run.png", "--metrics", "empty.jsonl"), "there is no step in empty.jsonl"),
        (("--picture", "no/run.png", "--metrics", "good.jsonl"), "--picture no/run.png: No such file or directory"),
        (("--picture", "run.png", "--metrics", "two.jsonl"), "lines of models with 2 and 3 experts: give those of one"),
        (("--picture", "run.png", "--metrics", "odd.jsonl"), "its lines are not as this version of elastic-moe writes"),
        (("--metrics", "good.jsonl"), "--metrics is for --picture"),
        ((), "give LOG_DIR, what `run` had as --log-dir"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    argv: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "job" / "logs"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").touch()
    written(folder / "good.jsonl", broken_run())
    written(folder / "odd.jsonl", [line(1, 1.0, load=5)])
    written(folder / "two.jsonl", [line(1, 1.0, load=[[1, 2]]), line(2, 2.0, load=[[1, 2, 3]])])
    assert report(*argv) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("elastic_moe.cli.picture.find_spec", lambda name: None)
    assert report("--picture", tmp_path / "run.png") == 2
    assert "pip install matplotlib, or install elastic-moe with its extra demo" in capsys.readouterr().err


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    """A picture, or a calibration: on a full disk, and where what is named is no file."""

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    link, path = tmp_path / "link.png", tmp_path / "run.png"
    link.symlink_to(path)
    for before in ("", "as it was"):
        with pytest.raises(OSError, match="No space"):
            write_whole(path, fails)
        assert (path.read_text() if path.exists() else "") == before
        write_whole(link, lambda file: file.write_text("as it was"))
    assert sorted(tmp_path.iterdir()) == [link, path]
    write_whole(Path(os.devnull), lambda file: file.write_text("x"))
    assert Path(os.devnull).is_char_device()
