"""Measures the time to compute the allowed tokens of GPT-2's vocabulary, for several patterns.

    python tools/measure/grammar.py

Prints the seconds that the vocabulary takes once, then for each pattern the milliseconds until the
first token and the microseconds of a token (mean and longest): reading the last one, and the ids of
those that may follow. The text is random allowed tokens, or for JSON a given one. Times are CPU
seconds of the process.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from gptc.generation.constraint import make_constraint
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
    "JSON schema": {"json_schema": '{"type": "object"}'},
    "any text": {"regex": r"[\s\S]*"},
    "words": {"regex": r"([a-z]+ ){5,40}[.]"},
    "at most 500 letters": {"regex": r"[a-z ]{1,500}"},
    "at most 200 characters": {"regex": r".{0,200}"},
    "nested, by characters": {"grammar": 'root ::= "(" (root | [a-z] root?)* ")" " "*'},
}


def main() -> None:
    """Prints a line for each pattern."""
    tokenizer, rng = make_tokenizer("gpt2"), random.Random(1)
    begin = time.process_time()
    make_constraint(tokenizer, tokenizer.vocab_size, regex="a")
    print(f"the vocabulary: {time.process_time() - begin:.2f} s")
    for name, pattern in PATTERNS.items():
        begin = time.process_time()
        state = make_constraint(tokenizer, tokenizer.vocab_size, **pattern).begin()
        first = time.process_time() - begin
        text = []
        if name.startswith("JSON"):
            text = tokenizer.encode(json.dumps(PERSON, ensure_ascii=False, indent=1)).tolist()
        seconds: list[float] = []
        for i in range(len(text) or 100):
            if state.ended:
                break
            if i == len(text):
                some = [token for token in state.allowed if token != tokenizer.end_of_text]
                text.append(int(rng.choice(some)))
            begin = time.process_time()
            state.take(text[i])
            state.allowed  # noqa: B018
            seconds.append(1e6 * (time.process_time() - begin))
        mean, n = sum(seconds) / len(seconds), len(seconds)
        print(f"{name}: {1e3 * first:.1f} ms, then {n} tokens: {mean:.0f} µs ({max(seconds):.0f})")


if __name__ == "__main__":
    main()
