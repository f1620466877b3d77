"""The deployment files: valid, with flags, mounts and metrics that exist."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from prometheus_client import REGISTRY

from vllm_steer.config import SteerConfig
from vllm_steer.serving.metrics.loads import load_metrics
from vllm_steer.serving.metrics.requests import request_metrics
from vllm_steer.serving.strength_reports import metrics as dynamic

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
YAML_FILES = sorted(DEPLOY.rglob("*.yaml"))
DASHBOARD = json.loads((DEPLOY / "grafana" / "vllm-steer.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
EXPRESSIONS = [
    *(pytest.param(rule["expr"], id=rule["alert"]) for rule in RULES),
    *(
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in PANELS
        for target in panel["targets"]
    ),
    *(
        pytest.param(variable["query"]["query"], id=f"variable {variable['name']}")
        for variable in DASHBOARD["templating"]["list"]
        if variable["type"] == "query"
    ),
]


def documents(name: str) -> dict[str, Any]:
    """The documents of a manifest, by kind (and name where a kind is there more than once)."""
    found: dict[str, Any] = {}
    for document in yaml.safe_load_all((DEPLOY / name).read_text("utf-8")):
        found[document["kind"]] = document
        found[f"{document['kind']} {document['metadata']['name']}"] = document
    return found


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
KUBERNETES = documents("kubernetes/vllm-steer.yaml")
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
COMMANDS = {
    "compose": COMPOSE["services"]["vllm"]["command"],
    "kubernetes": POD["containers"][0]["args"],
}
CONFIGS = {
    "compose": (DEPLOY / "steers.yaml").read_text("utf-8"),
    "kubernetes": KUBERNETES["ConfigMap"]["data"]["steers.yaml"],
}


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_yaml_file_can_be_read(path: Path) -> None:
    assert all(list(yaml.safe_load_all(path.read_text("utf-8"))))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_server_starts_with_flags_that_vllm_and_the_plugin_have(name: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_steer.serving.command_line import FLAG

    command = [str(argument) for argument in COMMANDS[name]]
    (config,) = (a for a in command if a.startswith(f"{FLAG}="))
    command.remove(config)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    assert args.model_tag == command[0]
    assert args.api_key is None  # in the environment, as the plugin's key
    assert args.port == 8000


@pytest.mark.parametrize("name", CONFIGS)
def test_the_steer_configs_can_be_served(name: str) -> None:
    data = yaml.safe_load(CONFIGS[name])
    config = SteerConfig.model_validate(data)
    assert all(entry.path.is_absolute() for entry in config.steers.values())


def test_the_image_is_of_a_supported_vllm_and_does_not_run_as_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    (tag,) = re.findall(r"^ARG VLLM_TAG=v(.+)$", text, re.M)
    assert Version("0.25.1") <= Version(tag) < Version("0.34")
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "steer"
    assert f"--uid {POD['securityContext']['runAsUser']} " in text
    assert "--no-cache-dir" in text
    assert f"${{VLLM_TAG:-v{tag}}}" in (DEPLOY / "compose.yaml").read_text("utf-8")


def test_the_build_gets_what_the_package_is_made_of() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert allowed == {
        *("pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels", "vllm_steer")
    }
    assert all((ROOT / name).exists() for name in allowed)


def test_ports_of_the_compose_file_are_on_loopback_and_secrets_come_from_outside() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for variable, value in service.get("environment", {}).items():
            is_secret = re.search("KEY|PASSWORD|TOKEN", variable)
            assert not is_secret or re.fullmatch(r"\$\{\w+(:[-?].*)?\}", value), variable


def test_what_the_compose_file_mounts_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), volume
    provider = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/vllm-steer.yaml").read_text("utf-8")
    )["providers"][0]
    folder = provider["options"]["path"]
    mounts = [volume.split(":") for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert ["./grafana/vllm-steer.json", f"{folder}/vllm-steer.json", "ro"] in mounts


def test_prometheus_scrapes_the_server_of_the_compose_file_under_the_rules_job() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["services"]
    assert f"--port={port}" in COMMANDS["compose"]
    monitor = documents("kubernetes/podmonitor.yaml")["PodMonitor"]["spec"]["podMetricsEndpoints"]
    jobs = {job["job_name"], monitor[0]["relabelings"][0]["replacement"]}
    assert jobs == {"vllm"}
    named = {job for rule in RULES for job in re.findall(r'job="(\w+)"', rule["expr"])}
    assert named == jobs


def test_parts_of_the_manifest_refer_to_each_other() -> None:
    labels = KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert KUBERNETES["Service"]["spec"]["selector"] == labels
    assert KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = POD["containers"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            assert f"PersistentVolumeClaim {claim['claimName']}" in KUBERNETES
    keys = KUBERNETES["Secret"]["stringData"]
    for variable in container["env"]:
        assert variable["valueFrom"]["secretKeyRef"]["key"] in keys
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    config = yaml.safe_load(CONFIGS["kubernetes"])
    for used in (*config["runtime"]["folders"], config["runtime"]["state"], "/etc/vllm-steer"):
        assert used in places
    limit = container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == limit


@cache
def our_metrics() -> frozenset[str]:
    """The names of all samples that this package's metrics have."""
    for metrics in (request_metrics(), load_metrics(), dynamic.metrics()):
        assert metrics
    names: set[str] = set()
    for metric in REGISTRY.collect():
        suffixes = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
            "gauge": ("",),
        }.get(metric.type, ())
        if metric.name.startswith("vllm_steer_"):
            names |= {metric.name + suffix for suffix in suffixes}
    return frozenset(names)


@cache
def vllm_metrics_text() -> str:
    """The module in which vLLM makes its metrics."""
    import vllm

    return (Path(vllm.__path__[0]) / "v1" / "metrics" / "loggers.py").read_text("utf-8")


def metrics_in(expression: str) -> set[str]:
    """The names of metrics in an expression: what stands before a selector or is passed alone."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:vllm_steer_|vllm:|http_)\w+|\bup\b", bare))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_of_dashboard_and_rules_exists(expression: str) -> None:
    names = metrics_in(expression)
    assert names
    for name in names:
        if name.startswith("vllm_steer_"):
            assert name in our_metrics()
        elif name.startswith("vllm:"):
            base = re.sub("_(total|bucket|sum|count)$", "", name)
            assert re.search(f'"{base}(_total)?"', vllm_metrics_text()), name
        else:
            assert name in ("up", "http_requests_total"), "Prometheus's own, and FastAPI's"


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for entry in EXPRESSIONS for name in metrics_in(str(entry.values[0]))}
    suffix = re.compile("_(bucket|sum|count)$")
    families = {suffix.sub("", name) for name in our_metrics()}
    assert families <= {suffix.sub("", name) for name in shown}


LABELS = {"steer", "status", "outcome", "kind", "instance", "job", "le", "method", "engine"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_labels_are_those_that_the_metrics_have(expression: str) -> None:
    selectors = re.findall(r"(\w+)(?:=~|!=|=)\"", expression)
    grouped = [
        name.strip()
        for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
        for name in group.split(",")
    ]
    assert {*selectors, *grouped} <= LABELS


def test_panels_have_a_unit_a_description_and_a_place_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells and place["x"] + place["w"] <= 24, panel["title"]
        cells |= own
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_the_dashboard_asks_for_variables_that_it_has() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__all", "__rate_interval"}
    assert used == variables


def test_alerts_are_named_once_say_what_is_wrong_and_are_explained() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    text = (ROOT / "docs" / "operating.md").read_text("utf-8")
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert "instance" in rule["annotations"]["summary"] or "steer" in rule["expr"]
        assert f"`{rule['alert']}`" in text, rule["alert"]
