"""Checks JSON values against the part of JSON Schema that the tables of fields use.

The same tables make the OpenAPI document, so that it cannot promise something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from gptc.errors import half_a_pair
from gptc.files.elsewhere import meant
from gptc.files.values import is_finite
from gptc.serve.problems import BadRequest

Schema: TypeAlias = Mapping[str, Any]

_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}
_SHOWN = 60  # characters of a value in a message


def check(schema: Schema, value: Any, name: str) -> None:
    """Raises BadRequest, with the field's name and the values accepted, if `value` is not valid."""
    problem = _problem(schema, value, name)
    if problem:
        raise BadRequest(problem[1], param=problem[0])


def check_fields(fields: Mapping[str, Schema], body: Any) -> dict[str, Any]:
    """The fields of a body that are not null. BadRequest for one that is unknown or invalid."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {_shown(body)}; it must be an object")
    for name in body:
        if name not in fields:
            close = meant(name, fields)
            hint = f"; did you mean {close}?" if close else f"; known: {', '.join(fields)}"
            raise BadRequest(f"{name!r:.{_SHOWN}} is not a field{hint}", param=name[:_SHOWN])
    for name, schema in fields.items():
        if body.get(name) is not None:
            _check_text(body[name], name)
            check(schema, body[name], name)
        elif schema.get("required_field"):
            raise BadRequest(f"{name} is missing: give {accepted(schema)}", param=name)
    return {name: value for name, value in body.items() if value is not None}


def _check_text(value: Any, name: str) -> None:
    """Raises BadRequest for halves of surrogate pairs, which no tokenizer can encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} has {half_a_pair(error)}", param=name) from None
    except RecursionError:
        raise BadRequest(f"{name} is nested too deeply", param=name) from None


def accepted(schema: Schema) -> str:
    """The values that a schema accepts, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(accepted(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    words = _WORDS[schema["type"]]
    if schema["type"] == "array":
        return f"{words} with items that are each {accepted(schema['items'])}"
    if "maxLength" in schema:
        words += f" of at most {schema['maxLength']:,} characters"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{words} between {_number(low)} and {_number(high)}"
    if low is not None:
        return f"{words}, {_number(low)} or more"
    if "exclusiveMinimum" in schema:
        return f"{words} above {schema['exclusiveMinimum']:g}"
    return words


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _problem(schema: Schema, value: Any, name: str) -> tuple[str, str] | None:
    """The name of the field at fault, and what is wrong with it; None if it is valid."""
    if "anyOf" in schema:
        problems = [_problem(one, value, name) for one in schema["anyOf"]]
        if None in problems:
            return None
        wrong_type = {_must(one, value, name) for one in schema["anyOf"]}
        right = [p for p in problems if p and p[0] == name and p[1] not in wrong_type]
        deeper = [p for p in problems if p and p[0] != name]
        return (*right, *deeper, (name, _must(schema, value, name)))[0]
    if "type" not in schema:
        return None
    if not _has_type(schema["type"], value):
        return name, _must(schema, value, name)
    if "enum" in schema and value not in schema["enum"]:
        return name, _must(schema, value, name)
    if isinstance(value, int | float) and not isinstance(value, bool) and not _fits(schema, value):
        return name, _must(schema, value, name)
    if isinstance(value, str) and len(value) > schema.get("maxLength", math.inf):
        return name, f"{name} has {len(value):,} characters; it must be {accepted(schema)}"
    if isinstance(value, list):
        return _list_problem(schema, value, name)
    if isinstance(value, dict):
        return _object_problem(schema, value, name)
    return None


def _list_problem(schema: Schema, value: Sequence[Any], name: str) -> tuple[str, str] | None:
    least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    problems = (_problem(schema["items"], item, f"{name}[{i}]") for i, item in enumerate(value))
    if found := next(filter(None, problems), None):
        return found
    if not least <= len(value) <= most:
        bound = f"at least {least}" if len(value) < least else f"at most {most:,}"
        return name, f"{name} has {len(value):,} items; it must have {bound}"
    return None


def _object_problem(schema: Schema, value: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    known = schema.get("properties", {})
    for key in schema.get("required", ()):  # in order: a wrong type says more than a lack after it
        if value.get(key) is None:
            return f"{name}.{key}", f"{name}.{key} is missing: give {accepted(known[key])}"
        if found := _problem(known[key], value[key], f"{name}.{key}"):
            return found
    for key, item in value.items():
        inner = known.get(key, schema.get("additionalProperties"))
        absent = item is None and key in known  # as if it were not given
        found = None if absent or inner is None else _problem(inner, item, f"{name}.{key}")
        if found:
            return found
    if len(value) > schema.get("maxProperties", math.inf):
        return name, f"{name} has {len(value):,} entries; at most {schema['maxProperties']:,} fit"
    return None


def _has_type(kind: str, value: Any) -> bool:
    is_bool = isinstance(value, bool)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return {
        "string": isinstance(value, str),
        "integer": whole and not is_bool,
        "number": isinstance(value, int | float) and not is_bool,
        "boolean": is_bool,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }[kind]


def _fits(schema: Schema, value: float) -> bool:
    return (
        is_finite(value)
        and value >= schema.get("minimum", -math.inf)
        and value > schema.get("exclusiveMinimum", -math.inf)
        and value <= schema.get("maximum", math.inf)
    )


def _must(schema: Schema, value: Any, name: str) -> str:
    return f"{name} is {_shown(value)}; it must be {accepted(schema)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        return "a number that is too large"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
