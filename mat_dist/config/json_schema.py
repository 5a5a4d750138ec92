"""The JSON schema of a configuration file, for editors. It allows the short forms that the loader expands."""

from __future__ import annotations

import json
from typing import Any

from mat_dist.config.fields import Section
from mat_dist.config.nodes import ALIASES, SHORTHANDS
from mat_dist.config.schema import MAX_PEERS, Config, DataConfig, PeerConfig

# 8, -0.5, 1e-3, 8/255
_NUMBER_TEXT = r"^\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?(\s*/\s*[0-9]+)?\s*$"


def _accept_fractions(schema: Any) -> Any:
    """`schema` with every number also as text."""
    if isinstance(schema, list):
        return [_accept_fractions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number":
        told = {key: schema[key] for key in ("title", "description", "default") if key in schema}
        number = {key: value for key, value in schema.items() if key not in told}
        return {**told, "anyOf": [number, {"type": "string", "pattern": _NUMBER_TEXT}]}
    return {key: _accept_fractions(value) for key, value in schema.items()}


def _accept_short_sections(properties: dict[str, Any], model: type[Section]) -> None:
    """Sections of `model` may be empty, and those with a short form may be text."""
    for name, field in model.model_fields.items():
        if "$ref" not in properties[name]:
            continue
        forms: list[dict[str, Any]] = [{"$ref": properties[name]["$ref"]}, {"type": "null"}]
        forms += [{"type": "string"}] if name in SHORTHANDS else []
        properties[name] = {"description": field.description, "anyOf": forms}


def schema_json() -> str:
    """The text of `configs/schema.json`."""
    schema = _accept_fractions(Config.model_json_schema())
    sections, top = schema["$defs"], schema["properties"]
    _accept_short_sections(top, Config)
    _accept_short_sections(sections["PeerConfig"]["properties"], PeerConfig)
    _accept_short_sections(sections["DataConfig"]["properties"], DataConfig)
    for alias in ALIASES:
        same = {**sections["ThreatConfig"]["properties"][alias], "description": f"another name for threat.{alias}"}
        sections["AttackConfig"]["properties"][alias] = same
    many = {"type": "array", "items": top["peers"]["items"], "minItems": 1, "maxItems": MAX_PEERS}
    top["peers"] = {"description": Config.model_fields["peers"].description,
                    "anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_PEERS}, many]}
    names = {"type": "string", "minLength": 1}
    top["defaults"] = {"description": "files that this one builds on",
                       "anyOf": [names, {"type": "array", "items": names}]}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mat_dist configuration"}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
