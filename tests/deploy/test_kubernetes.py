"""The manifests: by the schemas of the Kubernetes API, offline, and by what a schema cannot say."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from elastic_moe.cli.main import build_parser
from elastic_moe.config import JobConfig
from launcher.rounds.records import identity_of
from tests.deploy.test_docker import etcd_knows, instructions
from tests.deploy.tools import DEPLOY, documented_exit_codes, most_nodes, parse_run

FOLDER = DEPLOY / "kubernetes"
VERSIONS = ["1.31", "1.34", "1.37"]
"""The oldest that knows every field used, and newer ones."""

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


ALL = [document for path in sorted(FOLDER.glob("*.yaml")) for document in documents(path)]


def of(kind: str, name: str) -> Manifest:
    (found,) = [d for d in ALL if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def pods() -> Iterator[tuple[Manifest, Manifest]]:
    """The objects that make pods, with their pods' specification."""
    for document in ALL:
        if "template" in document["spec"] if "spec" in document else False:
            yield document, document["spec"]["template"]["spec"]


JOB = of("Job", "moe")
POD = JOB["spec"]["template"]["spec"]
(AGENT,) = POD["containers"]
ETCD = of("StatefulSet", "etcd")


def environment(pod: str = "moe-2-x7k2p", index: str = "2") -> dict[str, str]:
    """The agent's environment, with what Kubernetes fills in for a pod of that name; values use those before."""
    given = {
        "metadata.name": pod,
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": index,
        "metadata.labels['batch.kubernetes.io/controller-uid']": "f00d",
        "status.podIP": "10.0.0.1",
    }
    made: dict[str, str] = {}
    for variable in AGENT["env"]:
        text = variable["value"] if "value" in variable else given[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        made[variable["name"]] = expanded(text, made)
    return made


def expanded(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)


def called(**pod: str) -> Any:
    """The agent's command line and environment, as a pod gets them."""
    variables = environment(**pod)
    return parse_run([expanded(word, variables) for word in AGENT["args"]], variables)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", ALL, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_the_schema_holds(document: Manifest, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_would_tell() -> None:
    wrong = copy.deepcopy(JOB)
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 300
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("pod", [spec for _, spec in pods()], ids=[d["metadata"]["name"] for d, _ in pods()])
def test_pods_have_no_privileges(pod: Manifest) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert ":" in container["image"].rpartition("/")[2]
        declared = {port["name"] for port in container.get("ports", [])}
        for probe in ("readinessProbe", "livenessProbe"):
            assert container.get(probe, {}).get("httpGet", {}).get("port", "") in {*declared, ""}


def test_names_lead_to_what_they_name() -> None:
    for document, pod in pods():
        labels = document["spec"]["template"]["metadata"]["labels"]
        service = of("Service", document["spec"].get("serviceName") or pod["subdomain"])
        assert service["spec"]["clusterIP"] == "None"
        budget = of("PodDisruptionBudget", document["metadata"]["name"])
        policy = of("NetworkPolicy", document["metadata"]["name"])
        selectors = [budget["spec"]["selector"]["matchLabels"], policy["spec"]["podSelector"]["matchLabels"]]
        for selector in (service["spec"]["selector"], *selectors):
            assert selector.items() <= labels.items(), document["kind"]
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        claimed = {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        assert mounts == {volume["name"] for volume in pod.get("volumes", [])} | claimed
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                of("ConfigMap", volume["configMap"]["name"])
        for container in pod["containers"]:
            names = {variable["name"] for variable in container["env"]}
            text = " ".join([*container.get("args", []), *container.get("command", [])])
            assert {part.partition(")")[0] for part in text.split("$(")[1:]} <= names


def test_the_agent_is_started_as_it_should_be() -> None:
    given = called()
    assert most_nodes(given) == JOB["spec"]["parallelism"] == JOB["spec"]["completions"]
    assert given.drain_grace < POD["terminationGracePeriodSeconds"]
    assert given.rdzv_backend == "etcd3"
    assert given.local_addr == "10.0.0.1"
    assert given.rdzv_id == "f00d"
    (user,) = [i.words.split(":")[0] for i in instructions() if i.name == "USER"]
    assert POD["securityContext"]["runAsUser"] == int(user), "the image's folders belong to this one"
    shm = next(volume for volume in POD["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in AGENT["volumeMounts"]


def test_a_replaced_pod_is_the_same_node() -> None:
    """Strikes, departures and exclusion go by the node's name, and `drain` too: no part of it may be a pod's own."""
    names = {called(pod=f"moe-2-{suffix}", index="2").node_name for suffix in ("x7k2p", "q9w4z")}
    assert names == {"moe-2"}, "the name that Kubernetes gives the pod as a hostname, too"
    assert called(index="3").node_name == "moe-3"
    assert identity_of("moe-2-0123abcd") == "moe-2", "what remains when an agent's own suffix goes"


def test_what_pods_need_is_made_before_them() -> None:
    """A pod's environment is made when it starts: a secret that comes later would never reach it."""
    page = (FOLDER / "README.md").read_text()
    commands = re.findall(r"^\$ kubectl (.*?)\s*(?:#.*)?$", page.split("```console")[1].split("```")[0], re.MULTILINE)
    job = commands.index("apply --filename job.yaml")
    assert commands.index("apply --filename etcd.yaml") < job
    for source in AGENT["envFrom"]:
        (made,) = [
            i for i, c in enumerate(commands) if c.startswith(f"create secret generic {source['secretRef']['name']} ")
        ]
        assert made < job
    of_job = [(d["kind"], d["metadata"]["name"]) for d in documents(FOLDER / "job.yaml")]
    for volume in POD["volumes"]:
        if "configMap" in volume:
            assert of_job.index(("ConfigMap", volume["configMap"]["name"])) < of_job.index(("Job", "moe"))
    assert of_job.index(("Service", POD["subdomain"])) < of_job.index(("Job", "moe"))


def test_the_jobs_file_is_one() -> None:
    given = called()
    assert given.mesh == given.training_script_args[-1] == "/job/job.toml"
    job = JobConfig.model_validate(tomllib.loads(of("ConfigMap", "moe")["data"]["job.toml"]))
    assert str(job.checkpoint.url).startswith("s3://"), "pods share no folder"


def test_the_hook_drains_its_own_node() -> None:
    shell, option, script = AGENT["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("sh", "-c")
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: environment()[match[1]], script))
    assert words[:2] == ["exec", "elastic-moe"]
    hook = build_parser().parse_args(words[2:])
    assert (hook.verb, hook.nodes) == ("drain", [called().node_name])
    assert hook.timeout < POD["terminationGracePeriodSeconds"]
    assert {"PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT", "PET_RDZV_ID"} <= {v["name"] for v in AGENT["env"]}


def test_pods_are_replaced_until_there_is_no_point() -> None:
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert POD["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    disrupted, asked, hopeless, misused = JOB["spec"]["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (asked["action"], asked["onExitCodes"]["values"]) == ("Ignore", [75, 128 + 15])
    assert (hopeless["action"], hopeless["onExitCodes"]["values"]) == ("FailJob", [70])
    assert (misused["action"], misused["onExitCodes"]["values"]) == ("FailIndex", [2])
    assert JOB["spec"]["backoffLimitPerIndex"] > 0, "FailIndex asks for it"
    for rule in (asked, hopeless, misused):
        assert rule["onExitCodes"]["containerName"] == AGENT["name"]
        assert set(rule["onExitCodes"]["values"]) <= documented_exit_codes() | {128 + 15}


def test_one_node_at_a_time_is_disrupted() -> None:
    budget = of("PodDisruptionBudget", "moe")["spec"]
    assert budget["minAvailable"] == JOB["spec"]["parallelism"] - 1
    assert "maxUnavailable" not in budget, "Kubernetes does not count it for pods of a Job"
    assert of("PodDisruptionBudget", "etcd")["spec"]["maxUnavailable"] <= (ETCD["spec"]["replicas"] - 1) // 2


def test_etcd_has_a_quorum_that_all_agree_on() -> None:
    (container,) = ETCD["spec"]["template"]["spec"]["containers"]
    etcd_knows(container["command"])
    options = dict(word.removeprefix("--").split("=", 1) for word in container["command"][1:])
    members = [f"etcd-{index}" for index in range(ETCD["spec"]["replicas"])]
    assert len(members) % 2 == 1
    assert [pair.split("=")[0] for pair in options["initial-cluster"].split(",")] == members
    assert (
        options["initial-cluster"]
        .split(",")[0]
        .endswith(options["initial-advertise-peer-urls"].replace("$(POD_NAME)", "etcd-0").removeprefix("http:"))
    )
    assert called().rdzv_endpoint.split(",") == [f"{member}.etcd:2379" for member in members]
