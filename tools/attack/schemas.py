"""JSON schemas with every keyword, made to do harm, through a server that has other streams.

    gptc serve -m runs/tiny --port 8124 --chat-template chat.jinja &
    python tools/attack/schemas.py http://127.0.0.1:8124 --pid $!

References and circles, deep or doubled combinations, enums of 10^6 values, patterns that explode,
numbers such as 1e400, values of wrong types. Each is the form of an answer and the parameters of a
tool, whole and streamed, and a text of up to 120 tokens is drawn. A failure is a status of 500 or
more, 10 CPU seconds of the server, an error of several lines, another stream that changes, 2 CPU
seconds of the server between two of its tokens, or 500 MB more memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clients import PATHS, Attack, http

SECONDS, GAP_S, MOST_MIB = 10.0, 2.0, 500
_TOKENS = 120


def chain(n: int, key: str) -> str:
    """Combinations in each other, as a text: Python does not write what is so deep."""
    return f'{{"{key}": [' * n + '{"type": "string"}' + "]}" * n


def doubled(n: int, key: str) -> dict[str, Any]:
    """Definitions that each use the next one twice."""
    names = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(n)]
    if key == "properties":
        found: Any = {f"d{i}": {"type": "object", "required": ["a", "b"], key: {"a": x, "b": x}}
                      for i, x in enumerate(names)}  # fmt: skip
    else:
        found = {f"d{i}": {key: [x, x]} for i, x in enumerate(names)}
    return {"$ref": "#/$defs/d0", "$defs": found | {f"d{n}": {"type": "string"}}}


def either(n: int, is_object: bool) -> dict[str, Any]:
    """n alternatives n times, all of which must hold."""

    def one(i: int, j: int) -> dict[str, Any]:
        if is_object:
            return {"properties": {f"p{i}_{j}": {"const": j}}, "required": [f"p{i}_{j}"]}
        return {"type": "string", "pattern": f"^.*{chr(97 + i)}.*{j}.*$"}

    return {"allOf": [{"anyOf": [one(i, j) for j in range(n)]} for i in range(n)]}


def wide(n: int) -> dict[str, Any]:
    """An object with n properties."""
    return {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(n)}}


def _references() -> Iterator[Any]:
    for found in (
        "#",
        "#/",
        "#/x",
        "http://a/b",
        "#/$defs/%61",
        5,
        None,
        [],
        "\ud800",
        "#/$defs/a",
    ):
        yield {"$ref": found, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    for key in ("allOf", "anyOf", "oneOf"):
        circle = {key: [{"$ref": "#/$defs/a"}, {"type": "object"}]}
        yield {"$ref": "#/$defs/a", "$defs": {"a": circle}}
        for n in (12, 30, 300):
            yield doubled(n, key)
        for n in (20, 300, 2000):
            yield chain(n, key)
    for n in (30, 300):
        yield doubled(n, "properties")
    tree = {"type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}}
    yield tree
    yield {**tree, "required": ["l"]}
    names = [f"d{i}" for i in range(40)]
    refs = [{"$ref": f"#/$defs/{name}"} for name in names]
    yield {"$ref": "#/$defs/d0", "$defs": {name: {"anyOf": [*refs, {}]} for name in names}}
    yield {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)},
    }
    yield {"$dynamicRef": "#a", "$id": "x", "$anchor": "a"}


def _combinations() -> Iterator[Any]:
    for n in (3, 8, 20):
        yield either(n, False)
        yield either(n, True)
    yield {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(12)]}
    yield {"allOf": [{"type": "string"}, {"type": "integer"}]}
    yield {"allOf": [wide(100) for _ in range(20)]}
    yield {"oneOf": [{"type": "object", "properties": {f"p{i}": {"const": i}}} for i in range(900)]}
    yield {"if": {"type": "string"}, "then": {"minLength": 3}, "else": {"not": {}}}
    yield {"anyOf": []}
    for n in (1000, 3000, 40_000):
        yield wide(n)
        yield {**wide(n), "required": list(wide(n)["properties"])}


def _values() -> Iterator[Any]:
    for n in (1000, 20_000, 1_000_000):
        yield {"enum": list(range(n))}
    yield {"enum": [{"a": i, "b": [i]} for i in range(3000)]}
    yield {"enum": ["x" * i for i in range(400)]}
    yield {"const": "x" * 100_000}
    yield {"enum": {"a": 1}}
    yield {"enum": []}
    yield '{"const": ' + "[" * 700 + "]" * 700 + "}"
    for number in ("1e400", "-1e400", "1e-320", "9" * 4000, "9" * 5000, "0." + "1" * 3000, "NaN"):
        yield f'{{"type": "number", "minimum": {number}}}'
        yield f'{{"type": "integer", "maximum": {number}}}'
        yield f'{{"type": "number", "multipleOf": {number}}}'
        yield f'{{"const": {number}}}'
        yield f'{{"type": "array", "minItems": {number}}}'
        yield f'{{"type": "string", "maxLength": {number}}}'


def _texts() -> Iterator[Any]:
    patterns = (
        "^(a+)+b$", "^((a{1,100}){1,100}){1,100}$", "^(?=a)(?!b)a$", r"^(a)\1$", "x.{1000}y",
        "(a|b|c|d){1,4000}(x{1,4000}){1,4000}", r"^(\p{L}|\p{N}){1,5000}$", "(", "[",
        "a{9999999999}", "|".join(f"w{i}" for i in range(9000)), "(a?){2000}a{2000}",
        "(.|..|...){500}", "\0", "\ud800", "(.*a.*){30}", ".*" * 300,
        "(([a-z]+)*[0-9])+", "^" * 5000,
    )  # fmt: skip
    for pattern in patterns:
        yield {"type": "string", "pattern": pattern}
        yield {"type": "object", "patternProperties": {pattern: {}, "^.*b": {"type": "integer"}}}
    yield {"type": "string", "pattern": "^.*(ab|ba).*$", "minLength": 500, "maxLength": 100_000}
    for length in (10**5, 10**9, -1, 1.5, "1"):
        yield {"type": "string", "minLength": length}
        yield {"type": "string", "maxLength": length}
        yield {"type": "array", "minItems": length, "items": {"type": "object"}}
        yield {"type": "object", "minProperties": length}
    for name in ("date-time", "email", "uri", "ipv6", "regex", "x", 5):
        yield {"type": "string", "format": name}
    items = {"type": "array", "maxItems": 100}
    yield {**items, "items": {**items, "items": {**items, "items": items}}}


def _odd() -> Iterator[Any]:
    yield {"type": ["a", 5, None]}
    for key in ("type", "properties", "required", "items", "anyOf", "allOf", "additionalProperties",
                "pattern", "prefixItems", "$defs", "patternProperties", "not"):  # fmt: skip
        for value in (5, None, [1], {"a": 5}, "x", True, [[]], -1.5):
            yield {key: value}
    for value in ("(.*)*", "", 5, "(a|b){1,4000}", "\n"):
        layout = {"whitespace_pattern": value, "item_separator": value, "key_separator": value}
        yield {"x-guidance": layout, "type": "object"}
    yield {"x-guidance": [1]}
    yield {"x-guidance": {"coerce_one_of": True, "lenient": True}, "oneOf": [{"not": {}}, {}]}
    yield {"type": "object", "properties": {"\ud800": {}, "\0": {"const": "\0"}}}
    yield {"description": "x" * 120_000}
    yield '{"title": ' + "[" * 3000 + "]" * 3000 + "}"


def schemas() -> Iterator[str]:
    """The schemas as JSON."""
    for made in (_references, _combinations, _values, _texts, _odd):
        for found in made():
            yield found if isinstance(found, str) else json.dumps(found)


def bodies(schema: str) -> Iterator[tuple[str, bytes]]:
    """Path and body of the requests with a schema."""
    text = '"messages": [{"role": "user", "content": "a"}], "seed": 1, "temperature": 1.5'
    form = f'"response_format": {{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}'
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}'
    for rest in (
        f'"max_tokens": {_TOKENS}, {form}',
        f'"max_tokens": 30, {form}, "stream": true, "n": 3',
        f'"max_tokens": 30, "tools": [{tool}], "tool_choice": "required"',
        f'"max_tokens": 5, "tools": [{tool}]',
    ):
        yield PATHS[1], f"{{{text}, {rest}}}".encode()
    yield PATHS[0], f'{{"prompt": "a", "max_tokens": 30, {form}}}'.encode()


class Schemas(Attack):
    """An attack whose clients send a schema each."""

    def __init__(self, url: str, pid: int, every: int = 1) -> None:
        super().__init__(url)
        self.clock = partial(cpu_s, pid)
        chosen = list(schemas())[::every]
        self.n, self._left = len(chosen), iter(chosen)
        self.slowest: list[tuple[float, str]] = []
        self._hostile = ((1, self.ask),)

    async def ask(self) -> None:
        """Sends the next schema in each place, one after another."""
        schema = next(self._left)
        for path, body in bodies(schema):
            begin_s = self.clock()
            status, said = await self._send(http(body, path))
            seconds, shown = self.clock() - begin_s, schema[:200]
            self.slowest = sorted([*self.slowest, (seconds, shown)], reverse=True)[:5]
            if seconds > SECONDS:
                self.found.problems.append(f"{seconds:.1f} CPU s for {shown!r}")
            if status not in (200, 400, 413, 429):
                self.found.problems.append(f"status {status} for {shown!r}")
            if status == 400 and not _is_plain(said):
                self.found.problems.append(f"{said[:500]!r} for {shown!r}")


def _is_plain(said: bytes) -> bool:
    """Whether an error is one short line."""
    message = json.loads(said)["error"]["message"]
    return 0 < len(message) < 1000 and "\n" not in message


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has taken."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> int:
    """The resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) >> 10


def main() -> int:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th schema")
    parser.add_argument("--at-once", type=int, default=2)
    given = parser.parse_args()
    first, most, ended = resident_mib(given.pid), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], resident_mib(given.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    attack = Schemas(given.url, given.pid, given.every)
    n = attack.n
    try:
        found = asyncio.run(attack.run(n, at_once=given.at_once, readers=2))
    finally:
        ended.set()
        watching.join()
    if most[0] - first > MOST_MIB:
        found.problems.append(f"the memory grew by {most[0] - first} MiB")
    gap_s = max(found.gaps_s, default=0.0)
    if gap_s > GAP_S:
        found.problems.append(f"a stream waited for {gap_s:.1f} CPU s")
    for seconds, shown in attack.slowest:
        print(f"{seconds:.1f} CPU s: {shown!r}")
    print(f"statuses {dict(found.statuses)}; memory {first} MiB, at most {most[0]}")
    for problem in found.problems[:20]:
        print(problem)
    print(
        f"{n:,} schemas (in {5 * n:,} requests, next to {found.n_streams:,} streams): "
        f"{len(found.problems):,} failures, at most {most[0]} MiB, {gap_s:.2f} CPU s between tokens"
    )
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
