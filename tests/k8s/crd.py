"""The reduced CRD as a strict schema, and a check that works as the API server does."""

import json
from pathlib import Path

import jsonschema

SCHEMA = Path(__file__).with_name("rayservice_crd.json")


def strict_schema():
    """The RayService schema with unknown fields forbidden wherever fields are named."""
    return _strict(json.loads(SCHEMA.read_text(encoding="utf-8")))


def check(document, schema):
    """Raises jsonschema's ValidationError; defaults are filled in before `required` is checked."""
    document = _with_defaults(document, schema)
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


def _strict(schema):
    if "properties" in schema:
        schema["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        _strict(schema["additionalProperties"])
    if "items" in schema:
        _strict(schema["items"])
    return schema


def _with_defaults(value, schema):
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        defaults = {k: v["default"] for k, v in properties.items() if "default" in v}
        return {k: _with_defaults(v, properties.get(k, {})) for k, v in (defaults | value).items()}
    if isinstance(value, list):
        return [_with_defaults(item, schema.get("items", {})) for item in value]
    return value
