"""Calls of functions in a model's answer, as Hermes and Qwen write them.

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

BEGIN = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def parse_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text outside calls, and the calls in OpenAI's shape. What is not a call stays text."""
    calls = []

    def take(found: re.Match[str]) -> str:
        call = _as_call(found[1])
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    return rest.strip() if calls else text, calls


def bare_call(text: str) -> list[dict[str, Any]]:
    """The call that an answer is, when a schema made it one; [] for one that was cut off."""
    call = _as_call(text)
    return [] if call is None else [call]


def _as_call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {
            "name": found["name"],
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
        },
    }


def call_schema(tools: Sequence[Mapping[str, Any]], name: str | None) -> dict[str, Any]:
    """A JSON schema of a call of one of the tools, or of the one that is named."""
    functions = [tool["function"] for tool in tools]
    arms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
        if name in (None, function["name"])
    ]
    return arms[0] if len(arms) == 1 else {"anyOf": arms}
