"""The pages name files, tests, headings and one another: what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*/README.md")]
)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for file, fragment in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page}: {file}"
        assert not fragment or fragment in anchors(target), f"{page}: {file}#{fragment}"


@pytest.mark.parametrize("page", PAGES)
def test_the_sources_that_a_page_names_exist(page: str) -> None:
    for named in re.findall(r"\b(?:elastic_moe|launcher|storage|tests|deploy)/[\w./]+\.\w+", (ROOT / page).read_text()):
        assert (ROOT / named).exists(), f"{page}: {named}"


def test_the_architecture_names_every_module() -> None:
    """Of the launcher and of storage; those of S3 are told of as one."""
    named = re.findall(r"([\w/]+\.py)\b", (ROOT / "docs" / "architecture.md").read_text())
    names = {Path(name).name for name in named}
    modules = [
        path
        for package in ("launcher", "storage")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "s3"
    ]
    assert not [str(path.relative_to(ROOT)) for path in modules if path.name not in names]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        name = f"({Path(page).name})" if page.startswith("docs/") else f"(../{page})"
        assert name in index or page == "docs/README.md", page


def test_every_test_the_failure_model_names_exists() -> None:
    text = (ROOT / "docs" / "failure-model.md").read_text()
    files = {path.name: path for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    named = re.findall(r"`((?:tests/\S+?/)?test_\w+\.py)(?:::(\w+(?:::\w+)?))?`", text)
    assert len(named) > 20
    for path, name in named:
        file = ROOT / path if path.startswith("tests/") else files[path]
        assert file.exists(), path
        for part in name.split("::") if name else ():
            assert re.search(rf"(def|class) {part}\b", file.read_text()), f"{path}::{name}"
