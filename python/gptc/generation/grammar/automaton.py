"""A pushdown automaton that matches text against a set of rules, byte by byte.

    rules = {"root": Choice((Concat((Chars(((40, 40),)), Name("root"))), Chars(((48, 57),))))}
    machine = Graph(rules, "grammar").machine("root")
    stacks = machine.start
    for byte in b"((7":
        stacks = machine.step(stacks, byte)  # empty: no matching text begins like this
    complete = None in stacks  # whether a match may end here

Each rule becomes nodes of one graph: match a byte, branch, or call a rule. A call pushes the node
after it on a stack; the end of a rule pops it. Text can often be parsed in several ways, so the
state is a set of stacks, each with a node on top that matches a byte. Characters outside ASCII are
matched as the bytes of their UTF-8, so that text may be cut anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from gptc.errors import DeadEnd, UsageError

MOST_NODES = 100_000  # of a graph
MOST_STACKS = 10_000  # parses of one text
LAST = 0x10FFFF  # the last code point
_BLOCK = 8  # repetitions that share nodes


def too_many_ways() -> DeadEnd:
    """The error for a regex or a grammar that is too ambiguous."""
    return DeadEnd(
        f"the text can be parsed in more than {MOST_STACKS:,} ways: let the alternatives begin "
        "with different characters"
    )


# ---- expressions ----

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # of code points: first and last


@dataclass(frozen=True)
class Chars:
    """One character from these ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Name:
    """A match of the rule of that name."""

    rule: str


@dataclass(frozen=True)
class Concat:
    """The items in sequence."""

    items: tuple[Expression, ...]


@dataclass(frozen=True)
class Choice:
    """One of the options."""

    options: tuple[Expression, ...]


@dataclass(frozen=True)
class Repeat:
    """The item `least` to `most` times; `most` None = unbounded."""

    item: Expression
    least: int
    most: int | None


Expression: TypeAlias = "Chars | Name | Concat | Choice | Repeat"


def united(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The ranges sorted and merged, without surrogates, which are not characters."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        for low, high in ((first, min(last, 0xD7FF)), (max(first, 0xE000), last)):
            if low <= high and out and low <= out[-1][1] + 1:
                out[-1] = (out[-1][0], max(out[-1][1], high))
            elif low <= high:
                out.append((low, high))
    return tuple(out)


def others(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The complement: all other characters."""
    ranges = united(ranges)
    begins = [0, *(last + 1 for _, last in ranges)]
    ends = [*(first - 1 for first, _ in ranges), LAST]
    return united(zip(begins, ends, strict=True))


# ---- the graph ----


class Bytes(NamedTuple):
    """Matches one byte: byte b if bit b of `mask` is set."""

    mask: int
    next: int


class Fork(NamedTuple):
    """Continues at each of these nodes."""

    nexts: tuple[int, ...]


class Call(NamedTuple):
    """Continues at the rule's first node, and after the rule at `next`."""

    rule: int
    next: int


Node: TypeAlias = Bytes | Fork | Call
END = 0  # the node at which a rule ends


class Graph:
    """The nodes of all rules; each rule is built from its end to its beginning."""

    def __init__(self, rules: dict[str, Expression], what: str) -> None:
        """`what` names the input, such as "grammar", in the UsageError if it is too large."""
        self._what = what
        self._n_built = 0
        self.nodes: list[Node] = [Fork(())]
        self.begin = {name: self._add(Fork(())) for name in rules}
        for name, expression in rules.items():
            self.nodes[self.begin[name]] = Fork((self._build(expression, END),))

    def machine(self, root: str) -> Machine:
        """The machine that matches the rule of that name."""
        return Machine(self.nodes, self.begin[root])

    def _add(self, node: Node) -> int:
        self._count()
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _count(self) -> None:
        self._n_built += 1
        if self._n_built > MOST_NODES:
            raise UsageError(
                f"the {self._what} is more than {MOST_NODES:,} steps: lower the numbers in braces, "
                "which repeat the item before them"
            )

    def _build(self, item: Expression, next: int) -> int:
        """The first node of the item; `next` is the node after it."""
        self._count()
        if isinstance(item, Chars):
            found = (_utf8(first, last) for first, last in item.ranges)
            return self._build_bytes(frozenset(chain.from_iterable(found)), next)
        if isinstance(item, Name):
            return self._add(Call(self.begin[item.rule], next))
        if isinstance(item, Concat):
            for part in reversed(item.items):
                next = self._build(part, next)
            return next
        if isinstance(item, Choice):
            return self._add(Fork(tuple(self._build(part, next) for part in item.options)))
        return self._build_repeat(item.item, item.least, item.most, next)

    def _build_repeat(self, item: Expression, least: int, most: int | None, next: int) -> int:
        """Long repetitions call one shared block of _BLOCK repetitions."""
        block = 0
        if max(least, (most or 0) - least) >= 2 * _BLOCK:
            block = self._build_repeat(item, _BLOCK, _BLOCK, END)
        end = next
        if most is None:
            next = self._add(Fork(()))
            self.nodes[next] = Fork((self._build(item, next), end))
        else:  # x{0,2} is (x(x)?)?, which is unambiguous
            n_blocks, rest = divmod(most - least, _BLOCK) if block else (0, most - least)
            tail = next
            for i in range(max(rest, _BLOCK - 1 if n_blocks else 0)):
                tail = self._add(Fork((self._build(item, tail), end)))
                next = tail if i < rest else next
            for _ in range(n_blocks):
                next = self._add(Fork((self._add(Call(block, next)), tail)))
        n_blocks, rest = divmod(least, _BLOCK) if block else (0, least)
        for _ in range(rest):
            next = self._build(item, next)
        for _ in range(n_blocks):
            next = self._add(Call(block, next))
        return next

    def _build_bytes(self, sequences: frozenset[Sequences], next: int) -> int:
        """A tree by first bytes; bytes with the same continuations share a node."""
        after: defaultdict[int, set[Sequences]] = defaultdict(set)
        for (first, last), *rest in sequences:
            for byte in range(first, last + 1):
                after[byte].add(tuple(rest))
        masks: defaultdict[frozenset[Sequences], int] = defaultdict(int)
        for byte, rests in after.items():
            masks[frozenset(rests)] |= 1 << byte
        ways = tuple(
            self._add(Bytes(mask, next if () in rests else self._build_bytes(rests, next)))
            for rests, mask in masks.items()
        )
        return ways[0] if len(ways) == 1 else self._add(Fork(ways))

    def _finishing(self, bytes_too: bool) -> set[int]:
        """The nodes that can reach the end of their rule; without `bytes_too`, reading no byte."""
        waiting = defaultdict(list)
        for i, node in enumerate(self.nodes):
            if isinstance(node, Bytes):
                targets: tuple[int, ...] = (node.next,) if bytes_too else ()
            else:
                targets = node.nexts if isinstance(node, Fork) else node
            for target in targets:
                waiting[target].append(i)
        found, todo = {END}, [END]
        while todo:
            for i in waiting[todo.pop()]:
                node = self.nodes[i]
                if i not in found and (not isinstance(node, Call) or found.issuperset(node)):
                    found.add(i)
                    todo.append(i)
        return found

    def endless(self) -> str | None:
        """The name of a rule that no finite text matches, or None."""
        finishing = self._finishing(bytes_too=True)
        return next((name for name, node in self.begin.items() if node not in finishing), None)

    def left_recursion(self) -> list[str] | None:
        """A cycle of rules, each of which may begin with the next; first and last are the same."""
        empty = self._finishing(bytes_too=False)
        names = {node: name for name, node in self.begin.items()}
        first: dict[str, list[str]] = {}  # the rules that a rule may begin with
        for name, node in self.begin.items():
            seen, todo, called = {node}, [node], []
            while todo:
                here = self.nodes[todo.pop()]
                if isinstance(here, Bytes):
                    continue
                if isinstance(here, Fork):
                    targets = here.nexts
                else:
                    targets = (here.next,) if here.rule in empty else ()
                    if here.rule in names:
                        called.append(names[here.rule])
                    else:  # a block of repetitions in this rule
                        targets = (*targets, here.rule)
                todo += [target for target in targets if target not in seen]
                seen.update(targets)
            first[name] = called
        # Remove rules that begin with no remaining rule (Kahn 1962). The rest lead to a cycle.
        callers = defaultdict(list)
        for name, called in first.items():
            for other in called:
                callers[other].append(name)
        n_left = {name: len(called) for name, called in first.items()}
        done = [name for name, n in n_left.items() if n == 0]
        for name in done:
            for caller in callers[name]:
                n_left[caller] -= 1
                done += [caller] if n_left[caller] == 0 else []
        cycle = [name for name, n in n_left.items() if n][:1]
        while cycle and cycle.count(cycle[-1]) < 2:
            cycle.append(next(name for name in first[cycle[-1]] if n_left[name]))
        return cycle[cycle.index(cycle[-1]) :] if cycle else None


Sequences: TypeAlias = tuple[tuple[int, int], ...]  # a range of bytes, then one after it, ...


def _utf8(first: int, last: int) -> list[Sequences]:
    """The UTF-8 of the characters from first to last, as sequences of byte ranges."""
    for limit in (0x7F, 0x7FF, 0xFFFF):  # the last characters of 1, 2 and 3 bytes
        if first <= limit < last:
            return _utf8(first, limit) + _utf8(limit + 1, last)
    low, high = chr(first).encode(), chr(last).encode()
    for n in range(len(low) - 1, 0, -1):  # the last n bytes must cover their full range or none
        span = 1 << 6 * n
        if first // span != last // span:
            if first % span:
                middle = first - first % span + span
                return _utf8(first, middle - 1) + _utf8(middle, last)
            if (last + 1) % span:
                middle = last - last % span
                return _utf8(first, middle - 1) + _utf8(middle, last)
    return [tuple(zip(low, high, strict=True))]


# ---- the machine ----


class Stack:
    """A node, and the stack below it, which continues when the node's rule ends.

    Equal stacks are one object, so comparing and hashing take constant time at any depth.
    """

    __slots__ = ("__weakref__", "below", "node")

    def __init__(self, node: int, below: Stack | None) -> None:
        self.node = node
        self.below = below


Stacks: TypeAlias = frozenset["Stack | None"]  # None: the text is complete


class Machine:
    """Matches texts. Its states are immutable values, passed in and returned."""

    def __init__(self, nodes: list[Node], root: int) -> None:
        self.nodes = nodes
        self._stacks: WeakValueDictionary[tuple[int, Stack | None], Stack] = WeakValueDictionary()
        self.start = self.close([(root, None)])

    def step(self, stacks: Stacks, byte: int) -> Stacks:
        """The state after one more byte. DeadEnd if there are too many parses."""
        ready: list[tuple[int, Stack | None]] = []
        for stack in stacks:
            if stack is not None:
                node = self.nodes[stack.node]
                if isinstance(node, Bytes) and node.mask >> byte & 1:
                    ready.append((node.next, stack.below))
        return self.close(ready)

    def close(self, todo: list[tuple[int, Stack | None]]) -> Stacks:
        """The stacks with a Bytes node on top that these (node, stack below) pairs lead to."""
        seen = set(todo)
        out: set[Stack | None] = set()
        while todo:
            at, below = todo.pop()
            node = self.nodes[at]
            if isinstance(node, Bytes):
                out.add(self._stack(at, below))
                continue
            if at == END:
                if below is None:
                    out.add(None)
                    continue
                ways = [(below.node, below.below)]
            elif isinstance(node, Fork):
                ways = [(next, below) for next in node.nexts]
            else:  # tail call: the last call of a rule returns to the rule's caller
                last = node.next == END
                ways = [(node.rule, below if last else self._stack(node.next, below))]
            for way in ways:
                if way not in seen:
                    seen.add(way)
                    todo.append(way)
            if len(seen) > MOST_STACKS:
                raise too_many_ways()
        return frozenset(out)

    def _stack(self, node: int, below: Stack | None) -> Stack:
        found = self._stacks.get((node, below))
        if found is None:
            found = self._stacks[node, below] = Stack(node, below)
        return found

    @cached_property
    def byte_classes(self) -> list[int]:
        """A class number for each byte; bytes that no node distinguishes share one."""
        masks = {node.mask for node in self.nodes if isinstance(node, Bytes)}
        numbers = [0] * 256
        for mask in masks:
            pairs = [(number, mask >> byte & 1) for byte, number in enumerate(numbers)]
            fresh = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
            numbers = [fresh[pair] for pair in pairs]
        return numbers

    def coming(self, stacks: Stacks) -> list[str]:
        """Allowed next characters for a message: one for each first byte."""
        found = []
        for byte in range(256):
            text, here = bytes([byte]), self.step(stacks, byte)
            while here and byte >= 0xC0 and not _is_utf8(text):
                more = next(b for b in range(0x80, 0xC0) if self.step(here, b))
                text, here = text + bytes([more]), self.step(here, more)
            if here:  # a lone byte if the text ends within a character
                found.append(repr(text.decode()) if _is_utf8(text) else f"byte 0x{byte:02X}")
        return found


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
