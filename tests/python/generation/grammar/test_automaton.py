"""The automaton of a grammar stays small for many rules and deep nesting."""

from __future__ import annotations

import pytest

from gptc.errors import DeadEnd, UsageError
from gptc.generation.grammar.parser import parse_grammar, parse_regex
from machines import after, matches


def test_thousands_of_rules() -> None:
    rules = [f'r{i} ::= "{i % 10}" r{i + 1}' for i in range(5000)]
    machine = parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr5000 ::= "."')
    assert matches(machine, "0123456789" * 500 + ".")
    rules[-1] = 'r4999 ::= r0 | "x"'
    assert parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr5000 ::= "."')
    rules = [f"r{i} ::= r{i + 1}" for i in range(5000)]
    with pytest.raises(UsageError, match="r0 begins with itself"):
        parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr5000 ::= r0 | "."')


def test_depth_costs_nothing_but_memory() -> None:
    machine = parse_grammar('root ::= "(" root ")" | "x"')
    stacks = after(machine, b"(" * 100_000)
    assert len(stacks) == 2
    for byte in b"x" + b")" * 100_000:
        stacks = machine.step(stacks, byte)
    assert stacks == {None}
    right = parse_grammar('root ::= "a" root | "b"')
    assert after(right, b"a" * 1000) == after(right, b"a")


def test_too_many_ways_are_refused() -> None:
    rules = [f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(20)]
    with pytest.raises(DeadEnd, match="parsed in more than 10,000 ways"):
        parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr20 ::= "a"')


def test_equal_stacks_are_one_object_and_go_with_the_last_text() -> None:
    machine = parse_grammar('root ::= "(" root ")" | "x"')
    before = len(machine._stacks)
    one, two = after(machine, b"((("), after(machine, b"(((")
    assert one == two
    assert len(machine._stacks) > before
    del one, two
    assert len(machine._stacks) == before


def test_a_byte_that_is_missing_is_named() -> None:
    machine = parse_regex("é")
    assert machine.coming(after(machine, b"\xc3")) == ["byte 0xA9"]
