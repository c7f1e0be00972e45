"""A full disk, or a full /dev/shm: an event and the next source or step, never a wrong byte, and nobody hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage import disk_cases as cases

STAGED, COMMITTED, FAILED = "checkpoint_staged", "checkpoint_committed", "checkpoint_failed"
ALL = [STAGED, COMMITTED, STAGED, FAILED, STAGED, COMMITTED, STAGED, COMMITTED]


@pytest.mark.parametrize("case", [cases.saves_to_a_full_disk, cases.saves_to_a_full_disk_by_the_service])
def test_a_save_without_room_fails_and_the_next_has_it(case: object, tmp_path: Path) -> None:
    assert cases.run(case, tmp_path / "disk") == ALL  # type: ignore[arg-type]


def test_a_save_without_room_leaves_none_of_its_objects_to_take_that_of_the_next(tmp_path: Path) -> None:
    told = cases.run(cases.saves_too_much_in_many_objects, tmp_path / "disk")
    assert told == [STAGED, FAILED, STAGED, FAILED, STAGED, COMMITTED]


def test_what_cannot_be_written_down_costs_no_save(tmp_path: Path) -> None:
    lines = cases.run(cases.notes_on_a_full_disk, tmp_path / "disk")
    assert [line for line in lines if "cannot be noted down" in line and "No space left" in line]
    assert [line for line in lines if "events.jsonl" in line]


def test_where_memfds_are_forbidden_memory_of_dev_shm_does_instead(tmp_path: Path) -> None:
    told = cases.run(cases.saves_without_memfds, tmp_path / "disk")
    assert told == [STAGED, COMMITTED, "restored"]


def test_where_there_is_not_enough_of_that_the_reason_is_told(tmp_path: Path) -> None:
    reason = cases.run(cases.saves_without_any_memory_to_share, tmp_path / "disk")
    assert "no room to stage 8 MiB of the state: memfd_create is forbidden here, and only " in reason
    assert reason.endswith(" MiB are free in /dev/shm")


def test_a_full_dev_shm_does_not_matter(tmp_path: Path) -> None:
    assert cases.run(cases.saves_with_a_full_dev_shm, tmp_path / "disk") == [STAGED, COMMITTED]
