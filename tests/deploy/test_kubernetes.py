"""The manifests of deploy/: built by kustomize, valid by the schemas of Kubernetes, and safe by what they say."""

import os
import re

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from tests.support.manifests import (
    COMPONENTS,
    CUSTOM,
    DEPLOY,
    OVERLAYS,
    ROOT,
    Manifest,
    build,
    environment,
    pod_specs,
    read,
    standing,
    the,
)
from unperturb.service.keys import new_key
from unperturb.service.settings import Settings

VERSIONS = ("1.30", kubernetes_validate.latest_version())
WARM_UP_S = 300  # compiled steps, on the shipped checkpoint three minutes


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """Each overlay alone, and with every component."""
    made = {}
    for overlay in OVERLAYS:
        made[overlay] = build(overlay, tmp_path_factory.mktemp(overlay))
        made[f"{overlay} with all"] = build(overlay, tmp_path_factory.mktemp(f"{overlay}-all"), COMPONENTS)
    return made


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*OVERLAYS, *(f"{overlay} with all" for overlay in OVERLAYS)])
def test_overlay_is_valid(name: str, version: str, built: dict[str, list[Manifest]]) -> None:
    known = [one for one in built[name] if one["kind"] not in CUSTOM]
    assert {one["kind"] for one in known} >= {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    for manifest in known:
        kubernetes_validate.validate(manifest, version, strict=True)
        assert manifest["metadata"]["namespace"] == "unperturb"
    added = {"PersistentVolumeClaim", "ConfigMap", "ServiceMonitor", "PrometheusRule", "ScaledObject"}
    assert {one["kind"] for one in built[name]} & added == (added if name.endswith("all") else set())


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_without_kustomize_are_valid_and_so_are_pods_within_custom_resources(version: str) -> None:
    pods = 0
    for manifest in standing():
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
        for spec in pod_specs(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, version, strict=True)
            pods += 1
    assert pods == 3  # KServe's, and Ray's head and workers


def test_a_field_that_does_not_exist_is_found(built: dict[str, list[Manifest]]) -> None:
    wrong = {**the("Deployment", built["cpu"])}
    wrong["spec"] = {**wrong["spec"], "replica": 2}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_every_pod_meets_the_restricted_standard(built: dict[str, list[Manifest]]) -> None:
    specs = [spec for one in [*built["cpu with all"], *built["gpu"], *standing()] for spec in pod_specs(one)]
    assert len(specs) == 5
    for spec in specs:
        of_pod = spec.get("securityContext", {})
        for container in spec["containers"]:
            own = container["securityContext"]
            said = {**of_pod, **own}
            assert said["runAsNonRoot"] is True
            assert said["runAsUser"] == 10001
            assert said["seccompProfile"] == {"type": "RuntimeDefault"}
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert writable == {"/tmp"}
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_the_user_is_that_of_the_image() -> None:
    assert "useradd --system --uid 10001" in (ROOT / "Dockerfile").read_text()


def test_service_links_are_off_since_they_would_set_the_port(built: dict[str, list[Manifest]]) -> None:
    predictor = the("InferenceService", standing(), "cifar10-half")["spec"]["predictor"]
    specs = [spec for one in [*built["cpu"], *standing()] for spec in pod_specs(one) if one["kind"] != "ServingRuntime"]
    assert len(specs) == 3
    assert all(spec["enableServiceLinks"] is False for spec in (*specs, predictor))


@pytest.mark.parametrize("kind", ["Deployment", "ServingRuntime"])
def test_probes_wait_for_the_warm_up_and_ask_for_what_exists(kind: str, built: dict[str, list[Manifest]]) -> None:
    (spec,) = pod_specs(the(kind, [*built["cpu"], *standing()]))
    container = spec["containers"][0]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 2 * WARM_UP_S
    ready, live = startup["httpGet"]["path"], container["livenessProbe"]["httpGet"]["path"]
    assert container["readinessProbe"]["httpGet"]["path"] == ready
    assert (ready, live) in {("/readyz", "/healthz"), ("/v2/health/ready", "/v2/health/live")}


def test_a_pod_has_the_time_to_drain_and_a_rollout_that_to_warm_up(built: dict[str, list[Manifest]]) -> None:
    spec = the("Deployment", built["cpu"])["spec"]
    pod = spec["template"]["spec"]
    predictor = the("InferenceService", standing(), "cifar10-half")["spec"]["predictor"]
    (runtime,) = pod_specs(the("ServingRuntime", standing()))
    for one, ends_s in (
        (pod, pod["terminationGracePeriodSeconds"]),
        (runtime, predictor["terminationGracePeriodSeconds"]),
    ):
        settings = environment(one["containers"][0])
        drain_s, grace_s = float(settings["UNPERTURB_DRAIN_S"]), float(settings["UNPERTURB_GRACE_S"])
        assert drain_s + Settings.model_fields["timeout_s"].default <= grace_s <= ends_s - 10
    startup = pod["containers"][0]["startupProbe"]
    assert spec["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_every_setting_is_one_of_the_service() -> None:
    text = "\n".join(file.read_text() for file in sorted(DEPLOY.rglob("*.yaml")) if file.name != "alerts.yaml")
    named = set(re.findall(r"name: (UNPERTURB_\w+)|^  (UNPERTURB_\w+):", text, re.MULTILINE))
    names = {a or b for a, b in named} - {"UNPERTURB_REPLICAS"}  # service/ray_app.py reads that one
    assert "UNPERTURB_METRICS_PORT" in names
    assert names <= {f"UNPERTURB_{name}".upper() for name in Settings.model_fields}


def test_threads_and_decoders_are_by_the_containers_share_not_by_the_nodes_cores(
    built: dict[str, list[Manifest]],
) -> None:
    specs = [spec for one in [*built["cpu"], *built["gpu"], *standing()] for spec in pod_specs(one)]
    serving = [spec["containers"][0] for spec in specs if spec["containers"][0]["name"] != "ray-head"]
    assert len(serving) == 4
    for container in serving:
        by_share = {
            one["name"]
            for one in container["env"]
            if one.get("valueFrom") == {"resourceFieldRef": {"resource": "requests.cpu"}}
        }
        assert by_share == {"UNPERTURB_THREADS", "UNPERTURB_DECODERS"}, container["name"]


def test_the_service_accepts_the_settings(built: dict[str, list[Manifest]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UNPERTURB_")]:
        monkeypatch.delenv(name)
    (pod,) = pod_specs(the("Deployment", built["cpu"]))
    for name, value in environment(pod["containers"][0]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNPERTURB_HOST", "0.0.0.0")
    with pytest.raises(ValidationError, match="UNPERTURB_API_KEYS"):
        Settings()  # the Secret is missing
    monkeypatch.setenv("UNPERTURB_API_KEYS", new_key("ann")[1])
    settings = Settings()
    assert settings.keys.required
    assert (settings.device, settings.threads, settings.decoders, settings.page) == ("cpu,cpu", 2, 2, False)


def test_the_example_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    (secret,) = read(DEPLOY / "keys.example.yaml")
    with pytest.raises(ValidationError, match="name:sha256"):
        Settings(host="0.0.0.0", api_keys=secret["stringData"]["UNPERTURB_API_KEYS"])


def test_no_overlay_has_the_secret(built: dict[str, list[Manifest]]) -> None:
    assert not [one for manifests in built.values() for one in manifests if one["kind"] in ("Secret", "Namespace")]
    (pod,) = pod_specs(the("Deployment", built["gpu with all"]))
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "unperturb-keys"}}]


def test_services_and_policies_point_at_ports_and_labels_of_the_pods(built: dict[str, list[Manifest]]) -> None:
    manifests = built["cpu with all"]
    template = the("Deployment", manifests)["spec"]["template"]
    labels, ports = template["metadata"]["labels"], {p["name"]: p for p in template["spec"]["containers"][0]["ports"]}
    for name in ("unperturb", "unperturb-metrics"):
        spec = the("Service", manifests, name)["spec"]
        assert spec["selector"].items() <= labels.items()
        assert spec["ports"][0]["targetPort"] in ports
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        spec = the(kind, manifests)["spec"]
        assert spec.get("podSelector", spec.get("selector"))["matchLabels"].items() <= labels.items()
    policy = the("NetworkPolicy", manifests)["spec"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports.keys()
    assert policy["egress"] == []
    monitor = the("ServiceMonitor", manifests)["spec"]
    metrics = the("Service", manifests, "unperturb-metrics")
    assert monitor["selector"]["matchLabels"].items() <= metrics["metadata"]["labels"].items()
    assert metrics["metadata"]["labels"][monitor["jobLabel"]] == "unperturb"
    assert not monitor["selector"]["matchLabels"].items() <= the("Service", manifests)["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == metrics["spec"]["ports"][0]["name"]
    environ = environment(template["spec"]["containers"][0])
    assert int(environ["UNPERTURB_METRICS_PORT"]) == ports["metrics"]["containerPort"]


def test_overlays_differ_as_they_should(built: dict[str, list[Manifest]]) -> None:
    (cpu,) = pod_specs(the("Deployment", built["cpu"]))
    (gpu,) = pod_specs(the("Deployment", built["gpu"]))
    assert environment(cpu["containers"][0])["UNPERTURB_DEVICE"] == "cpu,cpu"
    assert environment(gpu["containers"][0])["UNPERTURB_DEVICE"] == "cuda"
    assert "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cpu["containers"][0]["image"] == "registry.example.com/unperturb:0.1.0"


def test_components_change_the_deployment(built: dict[str, list[Manifest]]) -> None:
    spec = the("Deployment", built["gpu with all"])["spec"]
    container = spec["template"]["spec"]["containers"][0]
    assert the("Deployment", built["gpu"])["spec"]["replicas"] == 2
    assert "replicas" not in spec  # the autoscaler's
    assert the("ScaledObject", built["gpu with all"])["spec"]["scaleTargetRef"]["name"] == "unperturb"
    assert environment(container)["UNPERTURB_CHECKPOINT"].startswith("/checkpoints/")
    assert environment(container)["UNPERTURB_DEVICE"] == "cuda"
    assert {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]} == {
        "/tmp": False,
        "/checkpoints": True,
    }
    claim = the("PersistentVolumeClaim", built["gpu with all"], "unperturb-checkpoints")
    assert {
        "name": "checkpoints",
        "persistentVolumeClaim": {"claimName": claim["metadata"]["name"], "readOnly": True},
    } in (spec["template"]["spec"]["volumes"])


def test_kserve_asks_for_the_runtime_that_is_there() -> None:
    runtime = the("ServingRuntime", standing())
    predictor = the("InferenceService", standing(), "cifar10-half")["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    formats = [{k: one[k] for k in ("name", "version")} for one in runtime["spec"]["supportedModelFormats"]]
    assert predictor["model"]["modelFormat"] in formats
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert environment(container)["UNPERTURB_CHECKPOINT"] == "/mnt/models"
    assert len(container["ports"]) == 1


def test_kserves_pods_are_scraped_where_their_metrics_are_as_the_job_that_the_alerts_ask_for() -> None:
    (container,) = the("ServingRuntime", standing())["spec"]["containers"]
    monitor = the("PodMonitor", standing(), "unperturb-kserve")["spec"]
    policy = the("NetworkPolicy", standing(), "unperturb-kserve")["spec"]
    assert monitor["selector"] == policy["podSelector"]
    assert the("InferenceService", standing(), *monitor["selector"]["matchLabels"].values())
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == container["ports"][0]["name"]
    relabelled = {one["targetLabel"]: one["replacement"] for one in endpoint["relabelings"]}
    assert relabelled == {"job": "unperturb", "__address__": f"$1:{environment(container)['UNPERTURB_METRICS_PORT']}"}


def test_ray_serves_the_app_by_its_own_schema() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed: pip install 'unperturb[ray]'")
    spec = the("RayService", standing())["spec"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (app,) = config.applications
    module, name = app.import_path.split(":")
    source = (ROOT / module.replace("unperturb.", "").replace(".", "/")).with_suffix(".py").read_text()
    assert f"\n{name} = build()" in source
    assert [deployment.name for deployment in app.deployments] == re.findall(r'name="(\w+)"', source)
    cluster = spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    (group,) = cluster["workerGroupSpecs"]
    settings = environment(group["template"]["spec"]["containers"][0])
    assert settings["UNPERTURB_REPLICAS"] == f"{group['minReplicas']}-{group['maxReplicas']}"
