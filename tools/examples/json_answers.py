"""Teaches a model to answer in JSON with fixed keys, and measures whether it does.

python tools/examples/json_answers.py write people.jsonl
gptc finetune -m MODEL --data people.jsonl --out runs/people
python tools/examples/json_answers.py measure MODEL runs/people

The rows are sentences about people; the answer has a name, an age and a city. `measure` asks about
people that are in no row, and prints two shares: answers that obey the format, and those that are
right too.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptc import Model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.generation.chat import chat
from gptc.tokenizer.conversations import with_template

N_ROWS, N_QUESTIONS = 500, 50
KEYS = {"name": str, "age": int, "city": str}
NAMES = (
    "Ada Amir Anna Ben Carla Chen Clara Dan David Diego Elena Emma Eva Felix Finn Grace Hana Ivan "
    "Jack Jana John Julia Karim Lara Leo Lily Lucas Maria Mark Maya Mia Nina Noah Olga Omar Paul "
    "Peter Rosa Ruth Sam Sara Sofia Tom Victor Zoe"
)
CITIES = (
    "Amsterdam Athens Berlin Boston Cairo Chicago Delhi Dublin Geneva Lima Lisbon London Madrid "
    "Milan Moscow Oslo Paris Prague Rome Seoul Tokyo Toronto Vienna Warsaw Zurich"
)
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "In {city} lives {name}, who is {age} years old.",
    "{name}, {age}, comes from {city}.",
    "My friend {name} moved to {city} at the age of {age}.",
    "Last week {name} from {city} turned {age}.",
)


def questions(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sentences and the facts in them, as a function of the seed; the same person never twice."""
    rng, seen = random.Random(seed), set()
    while True:
        name, city = rng.choice(NAMES.split()), rng.choice(CITIES.split())
        facts = {"name": name, "age": rng.randint(2, 99), "city": city}
        if tuple(facts.values()) not in seen:
            seen.add(tuple(facts.values()))
            yield rng.choice(SENTENCES).format(**facts), facts


def write(path: Path) -> None:
    """Writes the rows."""
    rows = zip(range(N_ROWS), questions(1), strict=False)
    lines = (json.dumps({"instruction": q, "output": json.dumps(a)}) for _, (q, a) in rows)
    path.write_text("".join(line + "\n" for line in lines))


def obeys(answer: str) -> dict[str, Any] | None:
    """The answer's object if it has the keys in order, with values of their types; else None."""
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(found, dict) or list(found) != list(KEYS):
        return None
    return found if all(type(found[key]) is kind for key, kind in KEYS.items()) else None


def measure(name: str) -> None:
    """Prints the shares of answers of a model, run or checkpoint."""
    path = Path(name)
    source = open_checkpoint(find_checkpoint(path) if path.is_dir() else name)
    tokenizer = source.tokenizer()
    with_template(tokenizer)
    rows = [facts for _, (_, facts) in zip(range(N_ROWS), questions(1), strict=False)]
    unseen = (pair for pair in questions(2) if pair[1] not in rows)
    n_obey = n_right = 0
    with Model.load(source.path, training=False) as model:
        for _, (question, facts) in zip(range(N_QUESTIONS), unseen, strict=False):
            asked = [{"role": "user", "content": question}]
            answer = obeys(chat(model, tokenizer, asked, max_tokens=64, temperature=0))
            n_obey += answer is not None
            n_right += answer == facts
    n = N_QUESTIONS
    print(f"{name}: {n_obey / n:.0%} of {n} answers obey, {n_right / n:.0%} are right")


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"] and len(sys.argv) == 3:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["measure"] and len(sys.argv) > 2:
        for given in sys.argv[2:]:
            measure(given)
    else:
        sys.exit(__doc__)
