"""The OpenAPI document of a server, from the tables that validate its requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gptc._version import __version__

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(endpoints: Iterable[Any], name: str) -> dict[str, Any]:
    """OpenAPI 3.1 of the endpoints, each with `method`, `path`, `help` and `fields`."""
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        operation: dict[str, Any] = {
            "summary": endpoint.help,
            "responses": {
                "200": {"description": "The answer."},
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": _ERROR}},
                },
            },
        }
        if endpoint.fields is not None:
            content = {"application/json": {"schema": _body(endpoint.fields)}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": f"gptc serve: {name}", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _body(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    properties = {
        name: {key: value for key, value in schema.items() if key != "required_field"}
        for name, schema in fields.items()
    }
    required = [name for name, schema in fields.items() if schema.get("required_field")]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
