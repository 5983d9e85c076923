"""Measures the time to compute the allowed tokens of GPT-2's vocabulary, for several patterns.

    python tools/measure/grammar.py

Prints for each pattern the milliseconds until the first token, then per token (mean and longest) in
a first pass over a text and in a second one, with the cache filled. The text is random allowed
tokens, or for JSON a given one.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from gptc.generation.grammar.constraint import make_constraint
from gptc.tokenizer.registry import make_tokenizer

PERSON = {
    "name": "Alan Turing",
    "born": 1912,
    "papers": [
        {"title": "On computable numbers, with an application", "year": 1936, "tags": ["a", "é"]},
        {"title": "Intelligent machinery", "year": 1948.5, "printed": False},
    ],
    "more": None,
    "nested": [[[[{"a": [1, 2, 3, {"b": -1.5e3}]}]]]],
}
PATTERNS = {
    "JSON": {"grammar": (Path(__file__).parents[2] / "docs" / "json.gbnf").read_text()},
    "any text": {"regex": r"[\s\S]*"},
    "words": {"regex": r"([a-z]+ ){5,40}[.]"},
    "at most 500 letters": {"regex": r"[a-z ]{1,500}"},
    "at most 200 characters": {"regex": r".{0,200}"},
}


def main() -> None:
    """Prints a line for each pattern."""
    tokenizer, rng = make_tokenizer("gpt2"), random.Random(1)
    make_constraint(tokenizer, tokenizer.vocab_size, regex="a")  # the vocabulary's tree
    for name, rules in PATTERNS.items():
        begin = time.perf_counter()
        constraint = make_constraint(tokenizer, tokenizer.vocab_size, **rules)
        assert constraint
        first = time.perf_counter() - begin
        text = []
        if name == "JSON":
            text = tokenizer.encode(json.dumps(PERSON, ensure_ascii=False, indent=1)).tolist()
        took: list[list[float]] = []
        for _ in range(2):
            place, seconds = constraint.start, []
            for i in range(len(text) or 100):
                if place.ended:
                    break
                if i == len(text):
                    some = [token for token in place.allowed if token != tokenizer.end_of_text]
                    text.append(int(rng.choice(some)))
                begin = time.perf_counter()
                place = place.after(text[i])
                seconds.append(1e3 * (time.perf_counter() - begin))
            took.append(seconds)
        said = [f"{sum(some) / len(some):.2f} (at most {max(some):.1f})" for some in took]
        print(f"{name}: {1e3 * first:.1f} ms, then {len(text)} tokens: {said[0]}; again {said[1]}")


if __name__ == "__main__":
    main()
