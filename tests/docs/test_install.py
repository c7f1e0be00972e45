"""What is said about installing is so: the wheel, its extras, and what messages and pages tell people to install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PACKAGES = ("elastic_moe", "launcher", "storage")
ADVICE = re.compile(r"pip install ([a-z0-9 -]+), or install elastic-moe with its extra (\w+)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel` builds it, without asking an index for the build's own tool."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (found,) = folder.iterdir()
    return found


@pytest.fixture
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        told = archive.read(entries).decode()
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == sources
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "elastic-moe = elastic_moe.cli.main:main" in told
    handlers = told.partition("[torchrun.handlers]\n")[2].splitlines()
    assert {"bucket = launcher.plugin:bucket", "etcd3 = launcher.plugin:etcd3"} <= set(handlers)


def test_the_wheel_asks_for_what_the_project_says(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("elastic-moe", PROJECT["version"])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra") or []) == set(EXTRAS)
    required = [re.sub(r"\s", "", text) for text in metadata.get_all("Requires-Dist") or []]
    plain = {text for text in required if ";" not in text}
    assert {_name(text) for text in plain} == {_name(text) for text in PROJECT["dependencies"]}
    for extra, wanted in EXTRAS.items():
        if extra != "dev":
            found = {_name(text) for text in required if f"extra=='{extra}'" in text.replace('"', "'")}
            assert found == {_name(text) for text in wanted}


def test_the_wheel_installs_as_the_page_says_and_is_whole_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    """Without an index: all that it needs is here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(tmp_path / "site"), f"{wheel}[etcd,s3,frameworks,demo,dev]"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    code = "import elastic_moe.cli.main as m, storage, launcher; print(m.__file__, storage.__file__, launcher.__file__)"
    told = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert all(path.startswith(str(tmp_path / "site")) for path in told.stdout.split())


def _name(requirement: str) -> str:
    """Of a requirement, as indexes compare it."""
    (name,) = re.findall(r"^[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name).lower()


def _texts(*patterns: str) -> Iterator[tuple[Path, str]]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield path, path.read_text()


def test_messages_name_packages_that_indexes_have_and_the_extra_that_has_them() -> None:
    told: dict[str, str] = {}
    for path, text in _texts(*(f"{package}/**/*.py" for package in PACKAGES)):
        for names, extra in ADVICE.findall(re.sub(r'"\s*\n\s*f?"', "", text)):
            assert set(names.split()) == {_name(text) for text in EXTRAS[extra]}, path
            told[extra] = names
        assert text.count("pip install") == len(ADVICE.findall(re.sub(r'"\s*\n\s*f?"', "", text))), path
    assert set(told) == {"s3", "etcd", "demo", "huggingface", "parquet", "tensorboard", "wandb"}


def test_no_text_names_an_index_that_does_not_have_us() -> None:
    patterns = ["*.md", "docs/*.md", "deploy/**/*.md", "deploy/**/Dockerfile", "Makefile", "constraints.txt"]
    commands = 0
    for path, text in _texts(*patterns, *(f"{package}/**/*.py" for package in PACKAGES)):
        commands += text.count("pip install")
        assert not re.search(r"pip install[^\n]*[\s'\"]elastic[-_]moe(?:[\s'\"\[=<>]|$)(?!.*with its extra)", text), (
            path
        )
    assert commands > 5


def test_the_page_lists_every_extra_and_every_command_names_some_that_exist() -> None:
    page = (ROOT / "README.md").read_text()
    (section,) = re.findall(r"^## Install\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(EXTRAS)
    named = re.findall(r"pip install[^\n]*?(\S+)\[([\w,]+)\]'", section)
    assert len(named) == 3
    for _, extras in named:
        assert set(extras.split(",")) <= set(EXTRAS)
    assert f"dist/elastic_moe-{PROJECT['version']}-py3-none-any.whl" in section
    assert "constraints.txt" in section


def test_the_supported_torch_ends_with_what_ci_runs_and_begins_with_what_test_oldest_runs() -> None:
    """A newer one is admitted once the suite has run on it: constraints.txt, range and README move together."""
    (torch,) = (asked for text in PROJECT["dependencies"] if (asked := Requirement(text)).name == "torch")
    bounds = {bound.operator: Version(bound.version) for bound in torch.specifier}
    assert set(bounds) == {">=", "<"}
    (pinned,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    major, minor = Version(pinned).release[:2]
    assert bounds["<"] == Version(f"{major}.{minor + 1}"), "the ceiling is the release after the one that CI runs"
    assert f"if it is {bounds['>=']} to {major}.{minor}\n" in (ROOT / "README.md").read_text()
    assert torch.specifier.contains(Version(version("torch"))), "the suite runs on a torch that is not supported"
