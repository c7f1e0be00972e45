"""The launcher's page lists what there is: every key of --rdzv-conf with its default, every event."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elastic_moe.events import TrainerEvent
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.events import EventName
from storage import CheckpointEvent

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launcher.md").read_text()


@pytest.mark.parametrize("key", RendezvousConf.model_fields)
def test_every_key_is_there_with_its_default(key: str) -> None:
    (row,) = re.findall(rf"^\|[^|]*`{key}`[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    default = RendezvousConf.model_fields[key].default
    if isinstance(default, float):
        assert float(row.split(",")[0]) == default


def test_the_table_of_events_has_them_all_and_no_other() -> None:
    table = PAGE.partition("| event | from | fields |")[2].partition("\n\n")[0]
    documented: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        names = re.findall(r"`(\w+)`", row)
        documented |= {name if not name.startswith("_") else f"checkpoint{name}" for name in names}
    assert documented == {*EventName, *CheckpointEvent, *TrainerEvent}


def test_the_events_of_a_checkpointer_that_reports_count_are_its() -> None:
    ours = {name for name in EventName if name.startswith(("checkpoint_", "restored"))}
    assert ours and ours <= set(CheckpointEvent)


@pytest.mark.parametrize("name", [name.name for name in EventName])
def test_no_event_is_only_a_name(name: str) -> None:
    files = [p for p in (ROOT / "launcher").rglob("*.py") if p.name != "events.py"]
    assert any(f"EventName.{name}" in p.read_text() for p in [*files, *(ROOT / "elastic_moe").rglob("*.py")])
