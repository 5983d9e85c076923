"""Which tokens keep a text one of those that a regex or a grammar describes.

    constraint = make_constraint(tokenizer, tokenizer.vocab_size, regex="[0-9]+")
    place = constraint.start
    while not place.ended:
        place = place.after(one_of(place.allowed))

A machine reads the bytes of tokens (automaton.py). The tokens of a vocabulary are a tree by their
bytes, which it walks from the root, a level at a time, for as long as a text of the rules begins
so. What it finds depends on the stack that it starts from, of which a token seldom reads more than
the top. So a walk starts with the top alone, and ends where that has been read to its end; only
from there on the node below is asked, and so on. Each of these parts is kept, and serves every
stack that begins with the same nodes, however deep it is.
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
MOST_BYTES = 32 << 20  # of what is kept for one constraint
_MOST_STATES = 4096  # of walks, each a row of the table
_MOST_LISTED = 8  # characters in a message


class _Tree:
    """Tokens by their bytes, in arrays: nodes are numbered by level, so that children adjoin."""

    def __init__(self, pieces: list[bytes]) -> None:
        """The empty ones are left out."""
        order = sorted((i for i in range(len(pieces)) if pieces[i]), key=pieces.__getitem__)
        data = np.frombuffer(b"".join([pieces[i] for i in order]), np.uint8)
        lengths = np.array([len(pieces[i]) for i in order], np.int64)
        begins = np.cumsum(lengths) - lengths
        node = np.zeros(len(order), np.int64)  # of each token so far
        parents, labels, n_nodes = [np.array([-1])], [np.array([0], np.uint8)], 1
        for level in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > level)
            parent, label = node[longer], data[begins[longer] + level]
            fresh = np.ones(len(longer), bool)  # in order, those that begin alike adjoin
            fresh[1:] = (parent[1:] != parent[:-1]) | (label[1:] != label[:-1])
            node[longer] = n_nodes - 1 + np.cumsum(fresh)
            parents.append(parent[fresh])
            labels.append(label[fresh])
            n_nodes += int(fresh.sum())
        self.label = np.concatenate(labels)
        """The byte by which a node is reached."""
        self.n_children = np.bincount(np.concatenate(parents)[1:], minlength=n_nodes)
        self.first_child = 1 + np.cumsum(self.n_children) - self.n_children
        self.n_tokens = np.bincount(node, minlength=n_nodes)
        """Several tokens may be the same bytes."""
        self.first_token = np.cumsum(self.n_tokens) - self.n_tokens
        self.tokens = np.array(order, np.int32)[np.argsort(node, kind="stable")]


def _spans(first: Ints, n: Ints) -> Ints:
    """first[0] and the numbers after it, n[0] in all, then the same of first[1], ..."""
    ends = np.cumsum(n)
    return np.arange(ends[-1] if len(n) else 0) + np.repeat(first - ends + n, n)


@dataclass(eq=False)
class _Reach:
    """What the upper nodes of a stack let pass, when those below are not known."""

    tokens: Ints
    ends: Ints  # nodes of the tree at which the nodes have been read to their end
    below: dict[frozenset[int], _Reach] = field(default_factory=dict)  # with the next nodes, too


class Place(NamedTuple):
    """Where a text stands. A value: it may be kept, and gone on from again."""

    constraint: Constraint
    stacks: Stacks
    allowed: Ints
    """The tokens that may follow, by id; those that end a text too, where it is complete."""
    ended: bool
    """Whether it is complete, and no token goes on."""

    def after(self, token: int) -> Place:
        """The place after one more token. DeadEnd where the text can be read in too many ways."""
        stacks = self.stacks
        for byte in self.constraint.pieces[token]:
            stacks = self.constraint.machine.step(stacks, byte)
        return self.constraint.place(stacks)

    def dead_end(self, text: str) -> DeadEnd:
        """The error for `text`, which is not complete and which no token continues."""
        coming = self.constraint.machine.coming(self.stacks)
        listed = ", ".join(coming[:_MOST_LISTED])
        more = ", …" if len(coming) > _MOST_LISTED else ""
        begun = f"no token goes on after {text[-60:]!r}" if text else "no token begins the text"
        return DeadEnd(f"{begun}: what may follow is {listed}{more}; use another tokenizer")


class Constraint:
    """A machine and a vocabulary."""

    def __init__(self, machine: Machine, pieces: list[bytes], ends: list[int]) -> None:
        """`pieces` are the bytes of each token, b"" of one that is no text; `ends` end a text."""
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
        """Where a text stands that can be read in these ways."""
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
        """What is let pass by one of the nodes, below the upper ones."""
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
        """Reads on from these places of the tree, with a stack of each node alone."""
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
        """State 0 is that no text begins so."""
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
            self._table[state, number] = self._state(after)  # which may make the table anew
        again: Ints = self._table[states, classes]
        return again


@lru_cache(maxsize=4)
def _tree(pieces: tuple[bytes, ...]) -> _Tree:
    return _Tree(list(pieces))


def make_constraint(
    tokenizer: Tokenizer, n_tokens: int, regex: str | None = None, grammar: str | None = None
) -> Constraint | None:
    """That a text matches the regex, or the rule `root` of the grammar; None without either.

    Only the first `n_tokens` tokens can be drawn. UsageError where both are given, or one is wrong.
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
    ends = {tokenizer.end_of_text, tokenizer.bos} & set(range(n_tokens))
    constraint = Constraint(machine, pieces, sorted(end for end in ends if end is not None))
    if constraint.start.stacks == {None}:
        raise UsageError(f"no text but the empty one matches the {kind}")
    if constraint.start.ended:
        raise constraint.start.dead_end("")
    return constraint
