"""The manifests of deploy/: as kustomize builds them, and as they lie there."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("cpu", "gpu")
COMPONENTS = ("checkpoints", "monitoring", "scaling")
CUSTOM = (
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "ServingRuntime",
    "InferenceService",
    "RayService",
)

Manifest = dict[str, Any]


def read(file: Path) -> list[Manifest]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def build(overlay: str, scratch: Path, components: tuple[str, ...] = ()) -> list[Manifest]:
    """Return what `kubectl kustomize` makes of an overlay of a copy of deploy/, with these components added to it."""
    copy = scratch / "deploy"
    shutil.copytree(DEPLOY, copy)
    file = copy / "overlays" / overlay / "kustomization.yaml"
    (kustomization,) = read(file)
    kustomization["components"] = [f"../../{name}" for name in components]
    file.write_text(yaml.safe_dump(kustomization))
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(file.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # a warning: something deprecated
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def the(kind: str, manifests: list[Manifest], name: str = "unperturb") -> Manifest:
    """Return the one manifest of a kind and name."""
    (found,) = (one for one in manifests if one["kind"] == kind and one["metadata"]["name"] == name)
    return found


def standing() -> list[Manifest]:
    """Return the manifests that are applied as they lie there, without kustomize."""
    files = [DEPLOY / "namespace.yaml", DEPLOY / "keys.example.yaml"]
    return [
        one for file in (*files, *sorted(DEPLOY.glob("kserve/*")), *sorted(DEPLOY.glob("ray/*"))) for one in read(file)
    ]


def pod_specs(manifest: Manifest) -> Iterator[Manifest]:
    """Yield every pod's specification within a manifest: that of a Deployment, and those in custom resources."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Deployment":
        yield spec["template"]["spec"]
    elif manifest["kind"] == "ServingRuntime":
        yield {name: spec[name] for name in ("containers", "volumes")}
    elif manifest["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]["spec"]


def environment(container: Manifest) -> dict[str, str]:
    """Return the container's variables; 2 for what Kubernetes fills in, which is its share of CPU."""
    return {one["name"]: one.get("value", "2") for one in container["env"]}
