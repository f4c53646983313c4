"""What `cluster/` holds, against the schemas of its readers and against what it promises; nothing is applied."""

import copy
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import tyro
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.util.accelerators import accelerators

from segray.label import Label
from segray.train import Train

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
DATA = Path(os.environ.get("SEGRAY_TEST_DATA", ROOT / "../shared/data")).resolve()
SCHEMAS = DATA.parent / "schemas/kuberay-1.7"
RAY = dict(re.findall(r"^(ray)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))["ray"]
KUBERNETES = "1.34"
JOBS = {"label": Label, "train": Train}
MANIFESTS = ["raycluster", "rayjob-label", "rayjob-train", "nightly", "nightly-raycronjob"]
MANIFESTS += ["serviceaccount", "networkpolicy"]
LAUNCHERS = ["aws", "gcp"]
FILES = ["Dockerfile", *(f"{name}.yaml" for name in LAUNCHERS), *(f"kuberay/{name}.yaml" for name in MANIFESTS)]

# What Kubernetes' schemas leave to the server: words of which only these are known.
WORDS = {
    "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"", "Memory", "HugePages"},
    "operator": {"Equal", "Exists", "In", "NotIn", "DoesNotExist", "Gt", "Lt"},
    "policyTypes": {"Ingress", "Egress"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
}

Document = dict[str, Any]


def text_of(file: str) -> str:
    return (CLUSTER / file).read_text()


def documents(text: str) -> list[Document]:
    """A file's objects, each without YAML's shared references, so that one may be changed alone."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(text)]


def everything(text: str) -> list[Document]:
    """A file's objects, and those that a ConfigMap among them holds as text."""
    found = documents(text)
    for document in found[:]:
        if document["kind"] == "ConfigMap":
            found += [inner for value in document["data"].values() for inner in documents(value)]
    return found


def parts(node: Any, key: str) -> Iterator[Any]:
    """All values of a key, however deep."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts(child, key)


def one(kind: str, name: str) -> Document:
    [document] = [d for d in everything(text_of(f"kuberay/{name}.yaml")) if d["kind"] == kind]
    return document


# The Ray cluster's specification in each file that has one.
CLUSTERS: dict[str, Callable[[], Document]] = {
    "raycluster": lambda: one("RayCluster", "raycluster")["spec"],
    "rayjob-label": lambda: one("RayJob", "rayjob-label")["spec"]["rayClusterSpec"],
    "rayjob-train": lambda: one("RayJob", "rayjob-train")["spec"]["rayClusterSpec"],
    "nightly": lambda: one("RayJob", "nightly")["spec"]["rayClusterSpec"],
    "nightly-raycronjob": lambda: one("RayCronJob", "nightly-raycronjob")["spec"]["jobTemplate"]["rayClusterSpec"],
}


def groups(cluster: Document) -> list[Document]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates(text: str) -> list[Document]:
    """Every template of a pod in a file."""
    return [
        template
        for document in everything(text)
        for key in ("template", "submitterPodTemplate")
        for template in parts(document, key)
        if "containers" in template.get("spec", {})
    ]


# Validation


@functools.cache
def crd(kind: str) -> Document:
    """KubeRay's schema of v1, closed against what it does not name."""
    if not SCHEMAS.is_dir():
        pytest.skip(f"no CustomResourceDefinitions at {SCHEMAS}; SEGRAY_TEST_DATA names the folder beside `schemas`")
    text = (SCHEMAS / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: Document = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, and checked by its schema
    return schema


def closed(schema: Any) -> Any:
    """OpenAPI as JSON schema that forbids unknown properties, as the server would drop them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        # `properties` maps names to schemas; a property of such a name is no keyword.
        key: {name: closed(inner) for name, inner in value.items()} if key == "properties" else closed(value)
        for key, value in schema.items()
        if key not in ("default", "enum", "required")
    }
    result |= {key: schema[key] for key in ("default", "enum", "required") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not is_open:
        result["additionalProperties"] = False
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


def with_defaults(value: Any, schema: Any) -> Any:
    """What the server would store."""
    if isinstance(value, dict) and isinstance(schema, dict):
        properties = schema.get("properties", {})
        value = {
            name: copy.deepcopy(inner["default"]) for name, inner in properties.items() if "default" in inner
        } | value
        others = schema.get("additionalProperties")
        return {name: with_defaults(inner, properties.get(name, others)) for name, inner in value.items()}
    if isinstance(value, list) and isinstance(schema, dict):
        return [with_defaults(item, schema.get("items")) for item in value]
    return value


def check_words(node: Any) -> None:
    for key, words in WORDS.items():
        for value in parts(node, key):
            for word in value if isinstance(value, list) else [value]:
                if word not in words:
                    raise jsonschema.ValidationError(f"{key}: {word!r} is none of {sorted(words)}")


def check_manifest(text: str) -> None:
    """Raises what is wrong with a file of Kubernetes objects, with those inside others too."""
    for document in everything(text):
        check_words(document)
        if document["apiVersion"] == "ray.io/v1":
            schema = crd(document["kind"])
            jsonschema.Draft202012Validator(schema).validate(with_defaults(document, schema))
            shell = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
            kubernetes_validate.validate(shell, KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for template in pod_templates(text):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def check_launcher(text: str) -> None:
    """Raises what Ray would, before it asks the cloud, and what it does not look at."""
    config = yaml.safe_load(text)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))


def check_dockerfile(text: str) -> None:
    hadolint = subprocess.run(["hadolint", "-"], input=text, capture_output=True, text=True)
    if hadolint.returncode:
        raise ValueError(hadolint.stdout + hadolint.stderr)


def check(file: str, text: str) -> None:
    if file.startswith("kuberay/"):
        check_manifest(text)
    elif file == "Dockerfile":
        check_dockerfile(text)
    else:
        check_launcher(text)


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_what_its_reader_takes(file: str) -> None:
    check(file, text_of(file))


def test_no_file_is_left_out_of_these_tests() -> None:
    others = {"README.md", "runtime_env.yaml", "grafana-dashboard.json", "Dockerfile.dockerignore"}
    found = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file()}
    assert found - others == set(FILES)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("kuberay/raycluster.yaml", "rayStartParams:", "rayStartParam:"),
        ("kuberay/raycluster.yaml", "mode: token", "mode: tokens"),
        ("kuberay/raycluster.yaml", "minReplicas: 1", "minReplicas: one"),
        ("kuberay/raycluster.yaml", "memory: 10Gi", "memory: 10 GB"),
        ("kuberay/raycluster.yaml", "operator: Exists", "operator: Exits"),
        ("kuberay/raycluster.yaml", "runAsNonRoot", "runAsNotRoot"),
        ("kuberay/rayjob-label.yaml", "backoffLimit: 2", "backofLimit: 2"),
        ("kuberay/rayjob-label.yaml", "submissionMode: K8sJobMode", "submissionMode: KubeMode"),
        ("kuberay/rayjob-label.yaml", "namespace: segray", "namespaces: segray"),
        ("kuberay/rayjob-train.yaml", "restartPolicy: Never", "restartPolicy: Somtimes"),
        ("kuberay/nightly.yaml", "concurrencyPolicy: Forbid", "concurencyPolicy: Forbid"),
        ("kuberay/nightly.yaml", "concurrencyPolicy: Forbid", "concurrencyPolicy: Forbidden"),
        ("kuberay/nightly.yaml", "resourceNames:", "resourceName:"),
        ("kuberay/nightly.yaml", "      activeDeadlineSeconds: 32400", "      activeDeadline: 32400"),
        ("kuberay/nightly-raycronjob.yaml", "timeZone:", "timezone:"),
        ("kuberay/nightly-raycronjob.yaml", "shutdownAfterJobFinishes", "shutdownAfterJobFinished"),
        ("kuberay/serviceaccount.yaml", "annotations:", "annotation:"),
        ("kuberay/networkpolicy.yaml", "podSelector:", "podSelecter:"),
        ("kuberay/networkpolicy.yaml", "policyTypes: [Ingress]", "policyTypes: [Ingres]"),
        ("aws.yaml", "max_workers: 16", "max_wrokers: 16"),
        ("aws.yaml", "resources: {CPU: 16}", "resource: {CPU: 16}"),
        ("aws.yaml", "min_workers: 1", "min_workers: 17"),
        ("gcp.yaml", "head_node_type: head", "head_node_type: heads"),
        ("gcp.yaml", "idle_timeout_minutes: 5", "idle_timeout_minutes: five"),
        ("Dockerfile", "FROM rayproject/ray:2.60.0-py311", "FROM rayproject/ray"),
        ("Dockerfile", "USER 1000", "USER root"),
        ("Dockerfile", "--no-cache-dir", ""),
    ],
)
def test_a_slip_is_found(file: str, right: str, wrong: str) -> None:
    text = text_of(file)
    assert right in text
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError)):
        check(file, text.replace(right, wrong))


# Agreement


@pytest.mark.parametrize("file", FILES)
def test_every_file_means_the_same_version_of_ray(file: str) -> None:
    text = text_of(file)
    versions = re.findall(r"rayVersion: \"(.+)\"|segray:\S+-ray([\d.]+\d)|rayproject/ray:([\d.]+\d)-", text)
    assert {version for found in versions for version in found if version} <= {RAY}
    assert versions or file.removeprefix("kuberay/") in ("serviceaccount.yaml", "networkpolicy.yaml")


@pytest.mark.parametrize("file", [file for file in FILES if file != "Dockerfile"])
def test_every_image_is_segrays_of_this_version_or_pinned(file: str) -> None:
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    images = {image for document in yaml.safe_load_all(text_of(file)) for image in parts(document, "image")}
    images |= {image for d in everything(text_of(file)) for image in parts(d, "image")} if "/" in file else set()
    assert images <= {f"registry.example.com/segray:{version}-ray{RAY}", "registry.k8s.io/kubectl:v1.34.3"}


@pytest.mark.parametrize("name", ["rayjob-label", "rayjob-train", "nightly", "nightly-raycronjob"])
def test_a_job_runs_on_the_cluster_of_raycluster_yaml(name: str) -> None:
    assert CLUSTERS[name]() == CLUSTERS["raycluster"]()


def test_a_night_is_the_labelling_job_but_for_what_a_night_needs() -> None:
    job, night = one("RayJob", "rayjob-label")["spec"], one("RayJob", "nightly")["spec"]
    assert night == job | {
        "entrypoint": f"{job['entrypoint']} --deadline 06:00",
        "backoffLimit": 0,
        "activeDeadlineSeconds": 9 * 3600,
    }
    cron, raycron = one("CronJob", "nightly")["spec"], one("RayCronJob", "nightly-raycronjob")["spec"]
    assert raycron == {"schedule": cron["schedule"], "timeZone": cron["timeZone"], "jobTemplate": night}


def test_the_nights_clock_is_the_images() -> None:
    [zone] = re.findall(r"\bTZ=(\S+)", text_of("Dockerfile"))
    assert one("CronJob", "nightly")["spec"]["timeZone"] == zone


def test_two_nights_never_meet_and_a_night_that_failed_is_a_job_that_failed() -> None:
    cron = one("CronJob", "nightly")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    job = cron["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0), "a second pod would begin the night again"
    name = one("RayJob", "nightly")["metadata"]["name"]
    steps = [step["command"] for step in [*pod["initContainers"], *pod["containers"]]]
    assert [step[:3] for step in steps] == [
        ["/bin/kubectl", "delete", f"rayjob/{name}"],
        ["/bin/kubectl", "create", "--filename=/manifests/rayjob.yaml"],
        ["/bin/kubectl", "wait", f"rayjob/{name}"],
        ["/bin/kubectl", "wait", f"rayjob/{name}"],
    ]
    assert "--for=jsonpath={.status.endTime}" in steps[2]
    assert "--for=jsonpath={.status.jobStatus}=SUCCEEDED" in steps[3]
    units = {"s": 1, "m": 60, "h": 3600}
    times = [re.findall(r"--timeout=(\d+)([smh])", " ".join(step)) for step in steps]
    seconds = [sum(int(number) * units[unit] for number, unit in time) for time in times]
    assert one("RayJob", "nightly")["spec"]["activeDeadlineSeconds"] < seconds[2], "the pod outlasts its RayJob"
    assert sum(seconds) < job["activeDeadlineSeconds"] < 24 * 3600 - cron["startingDeadlineSeconds"]
    assert one("ConfigMap", "nightly")["data"].keys() == {"rayjob.yaml"}
    [volume] = pod["volumes"]
    assert volume["configMap"]["name"] == one("ConfigMap", "nightly")["metadata"]["name"]


def test_the_nights_pod_may_do_what_it_does_and_no_more() -> None:
    name = one("RayJob", "nightly")["metadata"]["name"]
    assert one("Role", "nightly")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]},
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayjobs"],
            "resourceNames": [name],
            "verbs": ["get", "list", "watch", "delete"],
        },
    ]
    account, binding = one("ServiceAccount", "nightly")["metadata"], one("RoleBinding", "nightly")
    assert binding["roleRef"]["name"] == one("Role", "nightly")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert (
        one("CronJob", "nightly")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
        == (account["name"])
    )


@pytest.mark.parametrize("name", MANIFESTS)
def test_all_lives_in_one_namespace_with_accounts_that_are_there(name: str) -> None:
    text = text_of(f"kuberay/{name}.yaml")
    namespaces = {d["metadata"]["namespace"] for d in everything(text) if d["kind"] != "Namespace"}
    assert namespaces == {one("Namespace", "serviceaccount")["metadata"]["name"]}
    accounts = {
        d["metadata"]["name"]
        for d in everything(text_of("kuberay/serviceaccount.yaml") + "---\n" + text)
        if d["kind"] == "ServiceAccount"
    }
    used = {account for template in pod_templates(text) for account in parts(template, "serviceAccountName")}
    assert used <= accounts


def commands(text: str) -> list[list[str]]:
    """The words of each command of segray, those in comments too."""
    if "kind: " in text:
        found = [entrypoint for document in everything(text) for entrypoint in parts(document, "entrypoint")]
    else:
        found = []
    comments = re.sub(r"^# *", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found += re.findall(r"^ray job submit .* -- +(.+)$", re.sub(r"RAY_AUTH_MODE=token ", "", comments), re.MULTILINE)
    return [shlex.split(command) for command in found]


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".yaml")])
def test_a_command_of_segray_is_one_that_it_takes(file: str) -> None:
    found = commands(text_of(file))
    for program, job, *arguments in found:
        assert program == "segray"
        tyro.cli(JOBS[job], args=arguments)
    assert found or file in ("kuberay/serviceaccount.yaml", "kuberay/networkpolicy.yaml")


def test_an_option_that_segray_does_not_have_is_found() -> None:
    text = text_of("kuberay/rayjob-label.yaml").replace("--device cuda", "--devise cuda")
    [[_, _, *arguments]] = commands(text)
    with pytest.raises(SystemExit):
        tyro.cli(Label, args=arguments)


# What is promised


def quantity(text: str) -> float:
    """A number of Kubernetes': 500m, 10Gi, "2"."""
    units = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    match = re.fullmatch(r"(\d+)(m|Ki|Mi|Gi|)", str(text))
    assert match, text
    return int(match[1]) * units[match[2]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_whoever_talks_to_a_cluster_needs_its_token(name: str) -> None:
    assert CLUSTERS[name]()["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_runs_no_tasks_and_not_on_spot(name: str) -> None:
    head = CLUSTERS[name]()["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    [expressions] = parts(head, "matchExpressions")
    assert {expression["operator"] for expression in expressions} == {"NotIn"}
    assert "nodeSelector" not in head["template"]["spec"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_groups_memory_holds_its_object_store_and_its_heap(name: str) -> None:
    for group in groups(CLUSTERS[name]()):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        [memory] = [v["emptyDir"] for v in spec["volumes"] if v["name"] == "shared-memory"]
        assert memory["medium"] == "Memory"
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        store = int(group["rayStartParams"]["object-store-memory"])
        requested = quantity(container["resources"]["requests"]["memory"])
        assert store < quantity(memory["sizeLimit"]), "Ray takes no more than is free"
        assert quantity(memory["sizeLimit"]) + 4 * 2**30 <= requested, "what is left is the processes'"


@pytest.mark.parametrize("name", ["raycluster", "rayjob-label", "rayjob-train", "nightly", "nightly-raycronjob"])
def test_requests_are_within_limits_and_fit_the_nodes_that_they_are_for(name: str) -> None:
    nodes = {"ray-head": (4, 16), "cpu": (16, 64), "gpu": (8, 32)}
    containers = [c for t in pod_templates(text_of(f"kuberay/{name}.yaml")) for c in t["spec"]["containers"]]
    containers += [{"resources": CLUSTERS[name]()["autoscalerOptions"]["resources"]}]
    for resources in (container["resources"] for container in containers):
        for key, limit in resources["limits"].items():
            assert quantity(resources["requests"][key]) <= quantity(limit)
    for group in groups(CLUSTERS[name]()):
        cpus, memory = nodes[group.get("groupName", "ray-head")]
        requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        # A node keeps some for itself and what runs on all of them.
        assert quantity(requests["cpu"]) <= cpus - 0.75
        assert quantity(requests["memory"]) <= memory * 2**30 * 0.85


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpus_are_asked_for_and_their_nodes_tolerated_by_the_gpu_group_alone(name: str) -> None:
    for group in groups(CLUSTERS[name]()):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        keys = {toleration["key"] for toleration in spec.get("tolerations", [])}
        if group.get("groupName") == "gpu":
            assert "nvidia.com/gpu" in keys
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
            assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
            assert group["labels"]["ray.io/accelerator-type"] in vars(accelerators).values()
            assert group["minReplicas"] == group["replicas"] == 0
        else:
            assert not keys
            assert "nvidia.com/gpu" not in container["resources"]["limits"]
            assert group["rayStartParams"]["num-gpus"] == "0"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_grows_and_shrinks_by_itself(name: str) -> None:
    cluster = CLUSTERS[name]()
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


def test_rays_autoscaler_reads_of_a_cluster_what_was_meant() -> None:
    resource = {"metadata": {"name": "segray", "namespace": "segray"}, "spec": CLUSTERS["raycluster"]()}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    seen = {
        name: (kind["resources"]["CPU"], kind["resources"].get("GPU"), kind["min_workers"], kind["max_workers"])
        for name, kind in types.items()
    }
    assert seen == {"headgroup": (0, 0, 0, 0), "cpu": (15, 0, 1, 8), "gpu": (0, 1, 0, 8)}
    assert types["gpu"]["labels"] == {"ray.io/accelerator-type": "L4", "ray.io/market-type": "spot"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_ray_container_tells_of_its_health_and_gives_a_stopped_job_its_time(name: str) -> None:
    for group in groups(CLUSTERS[name]()):
        [container] = group["template"]["spec"]["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment == {"RAY_idle_worker_killing_time_threshold_ms": "60000", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        for probe in ("readinessProbe", "livenessProbe"):
            # The port is Ray's default for its agent, and the path one of those that ask for no token.
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    head = CLUSTERS[name]()["headGroupSpec"]["template"]["spec"]
    assert head["terminationGracePeriodSeconds"] > 60


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_is_one_that_a_restricted_namespace_takes(name: str) -> None:
    text = text_of(f"kuberay/{name}.yaml")
    for template in pod_templates(text):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] != 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        for volume in spec.get("volumes", []):
            assert volume.keys() - {"name"} <= {"emptyDir", "configMap"}
    for document in everything(text):
        for options in parts(document, "autoscalerOptions"):
            assert options["securityContext"]["allowPrivilegeEscalation"] is False
            assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_only_the_head_holds_a_token_of_kubernetes(name: str) -> None:
    cluster = CLUSTERS[name]()
    assert all(g["template"]["spec"]["automountServiceAccountToken"] is False for g in cluster["workerGroupSpecs"])
    jobs = [d for d in everything(text_of(f"kuberay/{name}.yaml")) if d["kind"] != "RayCluster"]
    for submitter in parts(jobs, "submitterPodTemplate"):
        assert submitter["spec"]["automountServiceAccountToken"] is False


def admits(rule: Mapping[str, Any], port: int) -> bool:
    return "ports" not in rule or port in {allowed["port"] for allowed in rule["ports"]}


@pytest.mark.parametrize("port", [8265, 10001, 6379, 8080, 52365])
def test_nobody_from_outside_reaches_a_ray_pod_but_the_operator_and_prometheus(port: int) -> None:
    policy = one("NetworkPolicy", "networkpolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    ours = policy["podSelector"]["matchLabels"]
    callers = [caller for rule in policy["ingress"] if admits(rule, port) for caller in rule["from"]]
    assert all(rule["from"] for rule in policy["ingress"]), "no `from` means everyone"
    submitter = {"app.kubernetes.io/part-of": "segray", "app.kubernetes.io/component": "submitter"}
    within = [{"podSelector": {"matchLabels": ours}}]
    expected = {
        8265: [
            {"podSelector": {"matchLabels": submitter}},
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-operator"}}},
        ],
        8080: [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    }
    assert callers == within + expected.get(port, [])


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_network_policy_covers_every_ray_pod_and_knows_the_submitter(name: str) -> None:
    policy = one("NetworkPolicy", "networkpolicy")["spec"]
    # The operator's own label comes to ours.
    ours = {k: v for k, v in policy["podSelector"]["matchLabels"].items() if k != "ray.io/is-ray-node"}
    for group in groups(CLUSTERS[name]()):
        assert ours.items() <= group["template"]["metadata"]["labels"].items()
    submitter = policy["ingress"][1]["from"][0]["podSelector"]["matchLabels"]
    for document in everything(text_of(f"kuberay/{name}.yaml")):
        for template in parts(document, "submitterPodTemplate"):
            assert template["metadata"]["labels"] == submitter


@pytest.mark.parametrize("file", FILES)
def test_there_is_no_key_and_no_door_to_the_world(file: str) -> None:
    text = text_of(file)
    assert "0.0.0.0/0" not in text
    assert "::/0" not in text
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|[A-Za-z0-9+/]{40}={0,2}$", text, re.MULTILINE)
    assert not re.search(r"(?i)(secret_?access_?key|access_?key_?id|password|credentials|hf_token)\s*[:=]", text)
    assert not re.search(r"(?i)(type: (LoadBalancer|NodePort)|hostNetwork|hostPort|enableIngress|kind: Secret)", text)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launched_cluster_has_a_token_no_address_outside_and_ends_what_idles(name: str) -> None:
    config = yaml.safe_load(text_of(f"{name}.yaml"))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert config["provider"]["use_internal_ips"] is True
    assert config["provider"]["cache_stopped_nodes"] is False
    assert config["auth"]["ssh_proxy_use_node_id"] is True
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    head, cpu, gpu = (config["available_node_types"][kind] for kind in ("head", "cpu", "gpu"))
    assert head["resources"]["CPU"] == 0
    assert cpu["min_workers"] == 1
    assert gpu["min_workers"] == 0
    assert gpu["resources"]["GPU"] == 1
    assert gpu["labels"]["ray.io/accelerator-type"] in vars(accelerators).values()


def test_aws_nodes_are_in_groups_and_subnets_of_ones_own_with_roles_for_keys() -> None:
    types = yaml.safe_load(text_of("aws.yaml"))["available_node_types"]
    for kind, node in types.items():
        # Without a group of its own Ray makes one that lets SSH in from anywhere.
        assert node["node_config"]["SecurityGroupIds"]
        assert node["node_config"]["SubnetIds"]
        assert node["node_config"]["IamInstanceProfile"] == {
            "Name": "segray-head" if kind == "head" else "segray-worker"
        }
        assert ("InstanceMarketOptions" in node["node_config"]) == (kind == "gpu")
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_gcp_nodes_have_no_address_outside_and_workers_an_account_for_keys() -> None:
    types = yaml.safe_load(text_of("gcp.yaml"))["available_node_types"]
    for kind, node in types.items():
        # Without an interface of its own Ray takes the first subnetwork that it finds, with an address outside.
        [interface] = node["node_config"]["networkInterfaces"]
        assert interface.keys() == {"subnetwork"}
        assert ("serviceAccounts" in node["node_config"]) == (kind != "head"), "Ray gives the head one of its own"
        assert ("scheduling" in node["node_config"]) == (kind == "gpu")
    assert types["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


def test_the_image_is_built_from_what_the_allow_list_names() -> None:
    ignore = text_of("Dockerfile.dockerignore").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {
        word
        for line in re.findall(r"^COPY (.+)$", text_of("Dockerfile"), re.MULTILINE)
        for word in line.split()[:-1]
        if not word.startswith("--")
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_has_what_images_scenes_and_onnx_models_need() -> None:
    text = text_of("Dockerfile")
    [code] = re.findall(r'python -c "(.+)"', text)
    code = code.replace("/tmp/segray", str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [onnxruntime] = re.findall(r"^ARG ONNXRUNTIME=(.+)$", text, re.MULTILINE)
    assert '"$ONNXRUNTIME"' in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert done.stdout.split() == [*project["dependencies"], *extras["geo"]]
    names = [
        re.split(r"[\[>=]", requirement)[0] for requirement in (*done.stdout.split(), onnxruntime, *extras["onnx"])
    ]
    assert names[-2] == names[-1] == "onnxruntime"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert set(names) <= pinned


def test_lines_to_change_are_few() -> None:
    for name in ("rayjob-label", "rayjob-train", "nightly"):
        marked = text_of(f"kuberay/{name}.yaml").count("change:")
        assert 2 <= marked <= 6
