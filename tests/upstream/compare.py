"""What the tests of torch said with stock's storage and with ours, and what of the difference is known. Pure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_ERROR = re.compile(r"(E\s+)?[\w.]*(Error|Exception|Exists|Corrupt|Value|URL|Exit)\b.*: ")

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


@dataclass(frozen=True)
class Outcome:
    """Of one test: PASSED, SKIPPED or FAILED, and the last line of why."""

    kind: str
    why: str = ""


@dataclass(frozen=True)
class Difference:
    """A test that passes with stock's storage and not with ours; `reason` is None for one that is not listed."""

    test: str
    why: str
    reason: str | None


def outcomes(junit: str) -> dict[str, Outcome]:
    """By `Class::test`, from pytest's JUnit file."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = Outcome(PASSED)
        for child in case:
            if child.tag == "skipped":
                found[name] = Outcome(SKIPPED, child.get("message") or "")
            elif child.tag in ("failure", "error"):
                found[name] = Outcome(FAILED, _why(f"{child.get('message') or ''}\n{child.text or ''}"))
    return found


def _why(text: str) -> str:
    """The last line that names an error."""
    lines = [line.removeprefix("E ").strip() for line in text.splitlines() if _ERROR.match(line)]
    return lines[-1][:300] if lines else text.strip().partition("\n")[0]


def differences(
    file: str, stock: Mapping[str, Outcome], ours: Mapping[str, Outcome], known: Mapping[str, str]
) -> list[Difference]:
    """Those of one file, in its order. `known`: reasons by a pattern of `file::Class::test`."""
    found = []
    for name, before in stock.items():
        now = ours.get(name, Outcome(FAILED, "it did not run"))
        if before.kind == PASSED and now.kind != PASSED:
            test = f"{file}::{name}"
            reasons = [reason for pattern, reason in known.items() if fnmatchcase(test, pattern)]
            found.append(Difference(test, now.why, reasons[0] if reasons else None))
    return found


def count(outcomes: Mapping[str, Outcome]) -> str:
    """In words."""
    kinds: Sequence[str] = [outcome.kind for outcome in outcomes.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in (PASSED, FAILED, SKIPPED))
