"""The custom resources of deploy/ by their definitions (CRDs), where UNPERTURB_CRDS names a folder that has them.

The definitions are their operators' (KServe, KubeRay, KEDA, Prometheus's): megabytes, and not part of this project.
"""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.manifests import COMPONENTS, CUSTOM, Manifest, build, read, standing

FOLDER = os.environ.get("UNPERTURB_CRDS")


def strict(schema: Any) -> Any:
    """Return a definition's schema that refuses unknown fields; Kubernetes itself drops them without a word."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def definitions(folder: Path) -> dict[tuple[str, str], Any]:
    """Return the schemas by API version and kind; metadata is any object, as in the definitions."""
    found = {}
    for crd in (one for file in sorted(folder.glob("*.yaml")) for one in read(file)):
        for version in crd["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


@pytest.mark.skipif(FOLDER is None, reason="UNPERTURB_CRDS names no folder with CustomResourceDefinitions")
def test_custom_resources_are_valid_by_their_definitions(tmp_path: Path) -> None:
    schemas = definitions(Path(str(FOLDER)))
    resources: list[Manifest] = [*build("gpu", tmp_path, COMPONENTS), *standing()]
    custom = [one for one in resources if one["kind"] in CUSTOM]
    assert {one["kind"] for one in custom} == set(CUSTOM)
    for resource in custom:
        schema = schemas[resource["apiVersion"], resource["kind"]]  # not checked itself: some patterns are Go's alone
        jsonschema.Draft202012Validator(schema).validate(resource)


def test_strict_schema_refuses_an_unknown_field_and_takes_a_free_map() -> None:
    schema = {"properties": {"spec": {"properties": {"a": {}}}, "labels": {"additionalProperties": {"type": "string"}}}}
    jsonschema.validate({"spec": {"a": 1}, "labels": {"x": "y"}}, strict(schema))
    with pytest.raises(jsonschema.ValidationError, match="b"):
        jsonschema.validate({"spec": {"b": 1}}, strict(schema))
