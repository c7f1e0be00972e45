"""The launcher's page lists what there is: every key of --rdzv-conf with its default, every event."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.elastic.conf import RendezvousConf

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launcher.md").read_text()


@pytest.mark.parametrize("key", RendezvousConf.model_fields)
def test_every_key_is_there_with_its_default(key: str) -> None:
    (row,) = re.findall(rf"^\|[^|]*`{key}`[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    default = RendezvousConf.model_fields[key].default
    if isinstance(default, float):
        assert float(row.split(",")[0]) == default


def test_every_event_is_there() -> None:
    sources = "".join(p.read_text() for p in (ROOT / "launcher").rglob("*.py"))
    events = set(re.findall(r'emit\(\s*"(\w+)"', sources))
    assert {"node_joined", "workers_started", "finished"} <= events
    assert not [event for event in sorted(events) if f"`{event}`" not in PAGE]
