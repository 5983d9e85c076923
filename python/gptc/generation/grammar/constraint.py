"""The tokens that a regex or a grammar allows after a text.

    constraint = make_constraint(tokenizer, tokenizer.vocab_size, regex="[0-9]+")
    place = constraint.start
    while not place.ended:
        place = place.after(one_of(place.allowed))

A machine reads the bytes of tokens (automaton.py). The vocabulary is a trie by bytes, and the
machine walks it level by level, along the branches that the rules allow. The result depends on the
machine's stack, but a token seldom reads beyond the top of it. So a walk starts with the top node
alone, and stops at trie nodes that complete it; from there a second walk continues with the node
below, and so on. Each walk is cached, and shared by all stacks with the same upper nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.errors import DeadEnd, UsageError
from gptc.generation.grammar.automaton import MOST_STACKS, Machine, Stack, Stacks, too_many_ways
from gptc.generation.grammar.parser import parse_grammar, parse_regex
from gptc.tokenizer.base import Tokenizer

Ints: TypeAlias = npt.NDArray[np.integer[Any]]
MOST_BYTES = 32 << 20  # of cached walks for one constraint
_MOST_STATES = 4096  # states of walks, each a row of the table
_MOST_LISTED = 8  # characters in a message


class _Tree:
    """A trie of the tokens' bytes, in arrays. Numbering by level makes children adjacent."""

    def __init__(self, pieces: list[bytes]) -> None:
        """Empty pieces are left out."""
        order = sorted((i for i in range(len(pieces)) if pieces[i]), key=pieces.__getitem__)
        data = np.frombuffer(b"".join([pieces[i] for i in order]), np.uint8)
        lengths = np.array([len(pieces[i]) for i in order], np.int64)
        begins = np.cumsum(lengths) - lengths
        node = np.zeros(len(order), np.int64)  # of each token so far
        parents, labels, n_nodes = [np.array([-1])], [np.array([0], np.uint8)], 1
        for level in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > level)
            parent, label = node[longer], data[begins[longer] + level]
            fresh = np.ones(len(longer), bool)  # pieces are sorted: equal prefixes are adjacent
            fresh[1:] = (parent[1:] != parent[:-1]) | (label[1:] != label[:-1])
            node[longer] = n_nodes - 1 + np.cumsum(fresh)
            parents.append(parent[fresh])
            labels.append(label[fresh])
            n_nodes += int(fresh.sum())
        self.label = np.concatenate(labels)
        """The byte on the edge to a node."""
        self.n_children = np.bincount(np.concatenate(parents)[1:], minlength=n_nodes)
        self.first_child = 1 + np.cumsum(self.n_children) - self.n_children
        self.n_tokens = np.bincount(node, minlength=n_nodes)
        """Above 1 if several tokens have the same bytes."""
        self.first_token = np.cumsum(self.n_tokens) - self.n_tokens
        self.tokens = np.array(order, np.int32)[np.argsort(node, kind="stable")]


def _spans(first: Ints, n: Ints) -> Ints:
    """The concatenation of arange(first[i], first[i] + n[i]) for all i."""
    ends = np.cumsum(n)
    return np.arange(ends[-1] if len(n) else 0) + np.repeat(first - ends + n, n)


@dataclass(eq=False)
class _Reach:
    """The cached walk for the upper nodes of a stack."""

    tokens: Ints  # allowed by these nodes alone
    ends: Ints  # trie nodes at which these nodes are complete
    below: dict[frozenset[int], _Reach] = field(default_factory=dict)  # by the next nodes below


class Place(NamedTuple):
    """The grammar state of a text, an immutable value."""

    constraint: Constraint
    stacks: Stacks
    allowed: Ints
    """Ids of the tokens that may follow, sorted; with end tokens if the text is complete."""
    ended: bool
    """Whether the text is complete and no token can follow."""

    def after(self, token: int) -> Place:
        """The place after one more token. DeadEnd if there are too many parses."""
        stacks = self.stacks
        for byte in self.constraint.pieces[token]:
            stacks = self.constraint.machine.step(stacks, byte)
        return self.constraint.place(stacks)

    def dead_end(self, text: str) -> DeadEnd:
        """The error for an incomplete `text` that no token continues."""
        coming = self.constraint.machine.coming(self.stacks)
        listed = ", ".join(coming[:_MOST_LISTED])
        more = ", …" if len(coming) > _MOST_LISTED else ""
        begun = f"no token fits after {text[-60:]!r}" if text else "no token can begin the text"
        return DeadEnd(f"{begun}: the rules allow {listed}{more}; use a different tokenizer")


class Constraint:
    """A machine applied to a vocabulary."""

    def __init__(self, machine: Machine, pieces: list[bytes], ends: list[int]) -> None:
        """`pieces` are the tokens' bytes, b"" for special ones; `ends` are the end tokens."""
        self.machine = machine
        self.pieces = pieces
        self._ends = ends
        self._tree = _tree(tuple(pieces))
        classes = machine.byte_classes
        self._class_of = np.array(classes)
        self._byte_of = [classes.index(i) for i in range(max(classes) + 1)]
        self._forget_walks()
        self._forget_reaches()
        self.start = self.place(machine.start)

    def place(self, stacks: Stacks) -> Place:
        """The place for a set of stacks."""
        mask = np.zeros(len(self.pieces), bool)
        todo = [(self._root, stacks)]
        while todo:
            upper, here = todo.pop()
            tops: dict[Stack | None, set[int]] = {}
            for stack in here:
                if stack is not None:
                    tops.setdefault(stack.below, set()).add(stack.node)
            if len(todo) + len(tops) > MOST_STACKS:
                raise too_many_ways()
            for below, nodes in tops.items():
                reach = self._reach(upper, frozenset(nodes))
                mask[reach.tokens] = True
                if below is not None and reach.ends.size:
                    todo.append((reach, self.machine.close([(below.node, below.below)])))
        complete = None in stacks
        ended = complete and not mask.any()
        if complete:
            mask[self._ends] = True
        return Place(self, stacks, np.flatnonzero(mask).astype(np.int32), ended)

    def _reach(self, upper: _Reach, nodes: frozenset[int]) -> _Reach:
        """The walk for `nodes` on the level below `upper`, cached."""
        found = upper.below.get(nodes)
        if found is None:
            if self._held > MOST_BYTES:
                self._forget_reaches()
            found = upper.below[nodes] = self._walk(upper.ends, nodes)
            self._held += found.tokens.nbytes + found.ends.nbytes + 8 * len(nodes) + 500
        return found

    def _forget_reaches(self) -> None:
        self._root = _Reach(np.zeros(0, np.int32), np.zeros(1, np.int64))
        self._held = 0

    def _walk(self, begins: Ints, nodes: frozenset[int]) -> _Reach:
        """Walks the trie from these trie nodes, with one stack for each machine node alone."""
        if len(self._states) > _MOST_STATES:
            self._forget_walks()
        start = self._state(self.machine.close([(node, None) for node in nodes]))
        at, states = begins, np.full(len(begins), start)
        reached, ends = [], []
        while at.size:
            n = self._tree.n_children[at]
            at, states = _spans(self._tree.first_child[at], n), np.repeat(states, n)
            states = self._next(states, self._class_of[self._tree.label[at]])
            alive = states > 0
            at, states = at[alive], states[alive]
            reached.append(at)
            ends.append(at[self._is_end[states]])
        found = np.concatenate([np.zeros(0, np.int64), *reached])
        spans = _spans(self._tree.first_token[found], self._tree.n_tokens[found])
        end = np.unique(np.concatenate([np.zeros(0, np.int64), *ends]))
        return _Reach(self._tree.tokens[spans], end[self._tree.n_children[end] > 0])

    def _forget_walks(self) -> None:
        """Clears the states. State 0 is the dead one, without stacks."""
        self._states: list[Stacks] = []
        self._numbers: dict[Stacks, int] = {}
        self._table = np.zeros((0, len(self._byte_of)), np.int32)  # -1: not known yet
        self._is_end = np.zeros(0, bool)
        self._state(frozenset())

    def _state(self, stacks: Stacks) -> int:
        """The number of a set of stacks."""
        if stacks not in self._numbers:
            number = self._numbers[stacks] = len(self._states)
            self._states.append(stacks)
            if number == len(self._table):
                more = np.full((64 + number, len(self._byte_of)), -1, np.int32)
                self._table = np.concatenate([self._table, more])
                self._is_end = np.concatenate([self._is_end, np.zeros(len(more), bool)])
            self._is_end[number] = None in stacks
        return self._numbers[stacks]

    def _next(self, states: Ints, classes: Ints) -> Ints:
        """The states after one more byte."""
        found: Ints = self._table[states, classes]
        unknown = found < 0
        if not unknown.any():
            return found
        width = len(self._byte_of)
        for pair in np.unique(states[unknown] * width + classes[unknown]).tolist():
            state, number = divmod(pair, width)
            after = self.machine.step(self._states[state], self._byte_of[number])
            self._table[state, number] = self._state(after)  # this may reallocate the table
        again: Ints = self._table[states, classes]
        return again


@lru_cache(maxsize=4)
def _tree(pieces: tuple[bytes, ...]) -> _Tree:
    return _Tree(list(pieces))


def make_constraint(
    tokenizer: Tokenizer, n_tokens: int, regex: str | None = None, grammar: str | None = None
) -> Constraint | None:
    """The constraint of a regex, or of the rule `root` of a grammar; None without either.

    Only the first `n_tokens` tokens can be drawn. UsageError if both are given or one is invalid.
    """
    if regex is not None and grammar is not None:
        raise UsageError("a regex and a grammar exclude each other: give one of them")
    for kind, text in (("regex", regex), ("grammar", grammar)):
        if text is not None:
            return _constraint(tokenizer, n_tokens, kind, text)
    return None


@lru_cache(maxsize=8)
def _constraint(tokenizer: Tokenizer, n_tokens: int, kind: str, text: str) -> Constraint:
    machine = parse_regex(text) if kind == "regex" else parse_grammar(text)
    pieces = list(tokenizer.pieces[:n_tokens])
    for token in tokenizer.specials:
        if token < n_tokens:
            pieces[token] = b""
    constraint = Constraint(machine, pieces, sorted(e for e in tokenizer.ends if e < n_tokens))
    if constraint.start.stacks == {None}:
        raise UsageError(f"only the empty text matches the {kind}: allow at least one character")
    if constraint.start.ended:
        raise constraint.start.dead_end("")
    return constraint
