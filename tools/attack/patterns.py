"""Grammars, regexes and JSON schemas that are made to take long, each drawn from and bounded.

    python tools/attack/patterns.py --cases 3000

A pattern is nested repetitions, huge counts, alternatives that begin alike, left recursion, long
classes, or a schema with cycles, deep combinations and many names, or several of them. As `infer`
and the server do, a process compiles it and draws up to 24 tokens. A failure is another exception
than a GptcError, an error of more than one line, 10 CPU seconds, or more than 500 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gptc.generation.constraint as constraints
from gptc.errors import GptcError
from gptc.tokenizer.native import ByteTokenizer

SECONDS, MOST_BYTES = 10, 500_000_000
_TOKENS = 24
_SLOW = 2.0  # seconds, which are reported


# ---- regexes ----


def regex(draw: Random, depth: int = 0) -> str:
    """A regex of nested parts."""
    if depth > 6 or draw.random() < 0.15:
        return draw.choice(
            ["a", "(a|a)", ".", "[^a]", r"\w", r"\d", r"\s", r"\pL", "[a-zA-Z0-9_]", "é", "(a|ab)",
             "[" + "".join(chr(0x4E00 + 2 * i) for i in range(draw.choice([3, 300, 3000]))) + "]"]
        )  # fmt: skip
    part = regex(draw, depth + 1)
    kind = draw.randrange(7)
    if kind == 0:
        return f"({part}){counts(draw)}"
    if kind == 1:
        return f"({part}){draw.choice(['*', '+', '?', '*?', '+?'])}"
    if kind == 2:
        return f"({part}|{regex(draw, depth + 1)})"
    if kind == 3:
        return part + regex(draw, depth + 1)
    if kind == 4:
        return f"({'|'.join(part for _ in range(draw.choice([2, 50])))})"[:20_000]
    if kind == 5:
        return f"(.*{part}.*)&(.*{regex(draw, depth + 1)})" if draw.random() < 0.3 else f".*{part}"
    return "(" * (n := draw.choice([1, 10, 1000])) + part + ")*" * n


def counts(draw: Random) -> str:
    """A repetition with counts."""
    n = draw.choice([0, 1, 2, 7, 64, 1000, 10**4, 10**5, 10**6, 10**9, 2**31, 2**32, 2**64])
    m = n + draw.choice([0, 1, 1000, 10**6])
    return draw.choice([f"{{{n}}}", f"{{{n},}}", f"{{{n},{m}}}", f"{{0,{m}}}"])


# ---- grammars ----


def grammar(draw: Random) -> str:
    """A grammar of a few rules that use each other in any way, recursive ones included."""
    names = ["root", *(f"r{i}" for i in range(draw.choice([0, 1, 3, 10, 200])))]
    lines = [f"{name} ::= {words(draw, names)}" for name in names]
    if draw.random() < 0.2:  # doubles with each rule
        n = draw.choice([10, 30, 100, 1000])
        lines = ["root ::= d0", *(f"d{i} ::= d{i + 1} d{i + 1}" for i in range(n))]
        lines.append(f"d{n} ::= {draw.choice(['[a-z]', chr(34) + 'a' + chr(34), 'd0 | [a]', ''])}")
    return "\n".join(lines) + "\n"


def words(draw: Random, names: list[str], depth: int = 0) -> str:
    """The right side of a rule."""
    found = []
    for _ in range(draw.choice([1, 2, 4])):
        kind = draw.randrange(7)
        if kind <= 1:
            word = draw.choice(names)
        elif kind == 2:
            word = draw.choice(['"a"', '"ab"', '""', ".", "[a-z]", "[^a]", '"é"', r'"\u00e9"'])
        elif kind == 3:
            n = draw.choice([5, 500, 5000])
            word = "[" + "".join(chr(0x4E00 + 2 * i) for i in range(n)) + "]"
        elif kind == 4:
            word = '"' + "a" * draw.choice([10, 1000, 50_000]) + '"'
        elif depth < 6:
            word = f"({words(draw, names, depth + 1)})"
        else:
            word = '"b"'
        if draw.random() < 0.4:
            word += draw.choice(["*", "+", "?", counts(draw)])
        found.append(word)
    return draw.choice([" ", " | "]).join(found)


# ---- schemas ----


def schema(draw: Random) -> Any:
    """A JSON schema with definitions that use each other."""
    n = draw.choice([1, 2, 5, 50])
    names = [f"d{i}" for i in range(n)]
    found = part(draw, names)
    if isinstance(found, dict):
        found["$defs"] = {name: part(draw, names) for name in names}
    return found


def part(draw: Random, names: list[str], depth: int = 0) -> Any:
    """A part of a schema."""
    if depth > 5:
        return draw.choice([True, {}, {"type": "string"}, {"const": "x"}, {"type": "integer"}])
    more = lambda: part(draw, names, depth + 1)  # noqa: E731
    wide = draw.choice([1, 2, 3, 20])
    big = draw.choice([0, 1, 50, 1000, 10**5, 10**7, 2**31, 2**63, 10**30, 1e308])
    makers: list[Callable[[], Any]] = [
        lambda: {"$ref": f"#/$defs/{draw.choice(names)}"},
        lambda: {"$ref": draw.choice(["#", "#/", "#/x", "http://a/b", "#/$defs/d0/allOf/0"])},
        lambda: {draw.choice(["allOf", "anyOf", "oneOf"]): [more() for _ in range(wide)]},
        lambda: {"type": "object", "properties": {f"k{i}": more() for i in range(wide)},
                 "required": [f"k{i}" for i in range(draw.randrange(wide + 1))],
                 "additionalProperties": draw.choice([False, True, more()])},
        lambda: {"type": "object", "minProperties": big, "patternProperties": {"^a.*b": more()}},
        lambda: {"type": "array", "items": more(), "minItems": big, "maxItems": big},
        lambda: {"type": "array", "prefixItems": [more() for _ in range(wide)], "minItems": big},
        lambda: {"type": "string", "minLength": big, "maxLength": big},
        lambda: {"type": "string", "pattern": regex(draw), "maxLength": big},
        lambda: {"type": "string", "format": draw.choice(["date-time", "email", "uuid", "x"])},
        lambda: {"type": draw.choice(["integer", "number"]), "minimum": -big, "maximum": big},
        lambda: {"type": "number", "multipleOf": draw.choice([0.01, 3, 7e-7, 1e-300, 65521, big])},
        lambda: {"enum": [draw.choice(["x", i, None, [i], {"a": i}]) for i in range(wide * 100)]},
        lambda: {"not": more()},
        lambda: {"if": more(), "then": more(), "else": more()},
        lambda: {"type": ["object", "array", "string", "number", "null"], "items": more()},
        lambda: nested(draw.choice([3, 30, 300]), more()),
        lambda: {**more(), **more()} if draw.random() < 0.5 else more(),
    ]  # fmt: skip
    found = draw.choice(makers)()
    return found if isinstance(found, dict) or depth else {"anyOf": [found]}


def nested(n: int, inner: Any) -> Any:
    """Combinations of one part in each other."""
    for _ in range(n):
        inner = {"allOf": [inner]}
    return inner


# ---- attack ----


def pattern(seed: int, case: int) -> tuple[str, str]:
    """The kind and the text of a case."""
    draw = Random(f"{seed}-{case}")
    kind = draw.choice(["regex", "grammar", "json_schema"])
    try:
        made = {"regex": regex, "grammar": grammar, "json_schema": schema}[kind](draw)
    except TypeError:  # two parts that are not both objects
        made = {}
    if isinstance(made, str):
        return kind, made
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)  # of the text only
    try:
        return kind, json.dumps(made)
    finally:
        sys.setrecursionlimit(usual)


def use(kind: str, text: str, seed: int) -> None:
    """Compiles a pattern and draws tokens that it allows."""
    tokenizer, draw = ByteTokenizer(), Random(seed)
    state = constraints.make_constraint(tokenizer, 256, **{kind: text}).begin()
    for _ in range(_TOKENS):
        allowed = state.allowed
        if state.ended:
            return
        if not len(allowed):
            raise state.dead_end()
        state.take(int(draw.choice(allowed)))


def attempt(kind: str, text: str, seed: int) -> tuple[str, float, int]:
    """The outcome of a pattern in a fork, its CPU seconds and bytes of memory."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        _child(kind, text, seed, write)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    seconds, n_bytes = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
    if code:
        said = said or f"ends with {code}"
    elif seconds > SECONDS:
        said = f"takes {seconds:.1f} s"
    elif n_bytes > MOST_BYTES:
        said = f"takes {n_bytes >> 20} MiB"
    return said, seconds, n_bytes


def _child(kind: str, text: str, seed: int, pipe: int) -> None:
    code, said = 0, "read"
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (3 * SECONDS, 3 * SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        use(kind, text, seed)
    except GptcError as error:
        said = "refused"
        if "\n" in str(error) or len(str(error)) > 2000:
            code, said = 1, f"says {str(error)[:300]!r}"
    except BaseException:
        code, said = 1, traceback.format_exc(limit=-2)
    os.write(pipe, said.encode("utf-8", "replace"))
    os._exit(code)


def attack(cases: range, seed: int, keep: Path | None) -> tuple[Counter[str], int]:
    """Outcomes by kind, and the number of failures, which are printed."""
    counts: Counter[str] = Counter()
    n_failed = 0
    for case in cases:
        kind, text = pattern(seed, case)
        said, seconds, n_bytes = attempt(kind, text, case)
        counts[f"{kind} {said if said in ('read', 'refused') else 'failed'}"] += 1
        if said not in ("read", "refused"):
            n_failed += 1
            print(f"case {case}, {kind} of {len(text):,}: {said}", file=sys.stderr, flush=True)
        elif seconds > _SLOW:
            print(f"case {case}: {kind} {said}, {seconds:.1f} s, {n_bytes >> 20} MiB", flush=True)
        if keep and (said not in ("read", "refused") or seconds > _SLOW):
            (keep / f"{case}.{kind}").write_text(text)
    return counts, n_failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for patterns that fail or are slow")
    options = parser.parse_args()
    use("regex", "a", 0)  # what each process needs is loaded once
    begin = time.monotonic()
    cases = range(options.first, options.first + options.cases)
    counts, n_failed = attack(cases, options.seed, options.keep)
    print(f"{time.monotonic() - begin:.0f} s, {dict(sorted(counts.items()))}", file=sys.stderr)
    print(f"{options.cases:,} patterns: {n_failed:,} failures")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
