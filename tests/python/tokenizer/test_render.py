"""One walk through a conversation gives the texts of a run of the template for each of its ends."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

import chat_templates
from gptc.tokenizer import render

EVERY = {name: text for name, text in chat_templates.PUBLISHED.items() if isinstance(text, str)}
LOOP = "{% for message in messages %}"
REST = LOOP.replace("messages", "rest")
SAY = "{{ message.role }}: {{ message.content }}\n"
END = "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
WALKED = {
    "plain": LOOP + SAY + END,
    "first and index": LOOP + "{% if loop.first %}>{% endif %}{{ loop.index }} " + SAY + END,
    "the one before": LOOP + "{{ loop.previtem.role if loop.previtem }} " + SAY + END,
    "a prompt in the loop": LOOP + "{{ add_generation_prompt }}" + SAY + "{% endfor %}",
    "a sum": "{% set ns = namespace(n=0) %}"
    + LOOP
    + "{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    + SAY
    + END,
    "the second one": "{{ messages[1].content }}" + LOOP + SAY + END,
    "without the first": "{% set rest = messages[1:] %}" + REST + SAY + END,
    "without some": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}" + REST + SAY + END
    ),
    "without the first, twice": (
        "{% set messages = messages[1:] %}" * 2 + "{{ messages[1] is defined }}" + LOOP + SAY + END
    ),
    "a list by the name of a variable": (
        "{% if messages[0].role == 'system' %}{% set tools = messages %}{% endif %}"
        + REST.replace("rest", "tools")
        + SAY
        + END
    ),
    "an inner loop": LOOP
    + "{% for c in message.content %}{{ c }}{{ loop.last }}{% endfor %}"
    + END,
    "one character": LOOP + "a" + "{% endfor %}{{ 'a' if add_generation_prompt }}",
    "white space": LOOP.replace("%}", "-%}") + " \n" + SAY + "{%- endfor -%} \n x",
    "a generation": LOOP + "{% generation %}" + SAY + "{% endgeneration %}" + END,
}
RUN = {
    "the last": LOOP + "{{ loop.last }}" + SAY + END,
    "the number": LOOP + "{{ loop.length }}" + SAY + END,
    "the number of messages": "{{ messages | length }}" + LOOP + SAY + END,
    "the one after": LOOP + "{{ loop.nextitem.role if loop.nextitem }} " + SAY + END,
    "the loop as a value": LOOP + "{% set l = loop %}{{ l.last }}" + SAY + END,
    "a method as a text": LOOP + "{{ loop.cycle | string }}" + SAY + END,
    "the loop in an inner loop that hides its own": LOOP + (
        "{{ loop.index }}{% for c in 'ab' %}{% macro f(loop) %}{% endmacro %}{{ loop.last }}"
        "{% endfor %}"
    ) + SAY + END,
    "the loop by a name": LOOP + "{{ loop['last'] }}" + SAY + END,
    "the last by its place": "{{ messages[-1].content }}" + LOOP + SAY + END,
    "a place that is computed": LOOP + "{{ messages[loop.index0 - 1].content }}" + SAY + END,
    "without the last": "{% set rest = messages[:-1] %}" + REST + SAY + END,
    "all but some": LOOP + "{% if loop.index == 2 %}{% continue %}{% endif %}" + SAY + END,
    "until one": LOOP + "{% if loop.index == 3 %}{% break %}{% endif %}" + SAY + END,
    "some of them": LOOP.replace(" %}", " if message.role == 'user' %}") + SAY + END,
    "backwards": LOOP.replace("messages", "messages | reverse") + SAY + END,
    "twice": LOOP + SAY + "{% endfor %}" + LOOP + SAY + END,
    "a loop in a loop": LOOP + "{% for m in messages %}{{ m.role }}{% endfor %}" + SAY + END,
    "a sum at the end": (
        "{% set ns = namespace(n=0) %}"
        + LOOP + "{% set ns.n = ns.n + 1 %}" + SAY + END + "{{ ns.n }}"
    ),
    "a macro at the end": (
        "{% set ns = namespace(n=0) %}{% macro f() %}{{ ns.n }}{% endmacro %}"
        + LOOP + "{% set ns.n = ns.n + 1 %}" + SAY + END + "{{ f() }}"
    ),
    "other messages": "{% set messages = [messages[0]] %}" + LOOP + SAY + END,
    "other messages at times": (
        "{% set rest = messages %}{% if true %}{% set rest = 'ab' %}{% endif %}"
        + REST + "{{ message }}" + END
    ),
    "a loop over lists": (
        "{% for messages in [messages[0].content] %}{{ messages }}{% endfor %}" + LOOP + SAY + END
    ),
    "under a condition": "{% if true %}" + LOOP + SAY + END + "{% endif %}",
    "a block": "{% block all %}" + LOOP + SAY + END + "{% endblock %}",
    "for none": LOOP + SAY + "{% else %}none" + END,
}  # fmt: skip


def conversation(case: int) -> tuple[dict[str, Any], list[tuple[int, bool]]]:
    draw = random.Random(case)
    n = draw.randrange(1, 12)
    roles = ["system"] * draw.randrange(2) + ["user", "assistant"] * n
    words = ("a", "aa", "", "Hello", "assistant:", "x\n")
    messages = [{"role": role, "content": draw.choice(words)} for role in roles[:n]]
    ends = [(i + more, not more) for i in range(n) for more in (0, 1) if roles[i] == "assistant"]
    if case % 4 == 0:
        ends = [(draw.randrange(n + 1), draw.random() < 0.5) for _ in range(6)]
    variables: dict[str, Any] = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>"}
    if case % 3 == 0:
        variables["tools"] = [{"role": "tool", "content": str(i)} for i in range(case % 2 + 2)]
    return variables, sorted(ends) if case % 8 else ends


def answer(template: render._Template, requests: list[Any], most: int = 1 << 30) -> Any:
    several = [{"variables": variables, "ends": ends} for variables, ends in requests]
    request = {"mark": "\0", "longest": 1 << 20, "most": most, "several": several}
    return json.loads(render.answer(template, json.dumps(request).encode()))


@pytest.mark.parametrize("name", [*EVERY, *WALKED, *RUN])
def test_a_walk_gives_what_runs_give(name: str) -> None:
    text = (EVERY | WALKED | RUN)[name]
    walked, run = render.prepare(text.encode()), render.prepare(text.encode())
    run.first_walked = 0
    assert (walked.first_walked > 0) >= (name in WALKED)
    assert (walked.first_walked > 0) <= (name not in RUN)
    requests = [conversation(case) for case in range(24)]
    found = answer(walked, requests)
    assert found == answer(run, requests)
    assert any("texts" in one for one in found["several"])
    for most in (0, 300):
        assert answer(walked, requests, most) == answer(run, requests, most)


def test_thousands_of_messages_are_rendered_soon() -> None:
    template = render.prepare(EVERY["Llama 2"].encode())
    roles = ("user", "assistant") * 2000
    messages = [{"role": role, "content": "x" * 80} for role in roles]
    ends = [(i + more, not more) for i in range(1, len(roles), 2) for more in (0, 1)]
    begin_s = time.process_time()
    (found,) = answer(template, [({"messages": messages, "bos_token": "", "eos_token": ""}, ends)])[
        "several"
    ]
    assert time.process_time() - begin_s < 2
    assert len(found["texts"]) == 4000
