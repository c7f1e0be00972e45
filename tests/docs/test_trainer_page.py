"""The trainer's page has every field of a job file, as the models say it."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_moe.reference import field_tables

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"


def test_the_page_has_every_field() -> None:
    """UPDATE_DOCS=1 writes them anew."""
    head, _, fields = PAGE.read_text().partition("## Fields\n\n")
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(f"{head}## Fields\n\n{field_tables()}")
        return
    assert fields == field_tables()
