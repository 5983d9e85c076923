"""Valid small files of conversations: messages, a chat template, and Mistral's tokenizer."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mutate
from gptc.cli.chat import read_messages
from gptc.tokenizer.chat import render
from gptc.tokenizer.folder import read_template
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target

_TEMPLATE = """{%- set ns = namespace(n=0, seen=[]) %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- for m in messages %}
{%- if m.role not in ["system", "user", "assistant"] %}
{{- raise_exception("role " ~ m.role) }}{% endif %}
{{- '<' + m.role + '>' + m.content | trim + eos_token }}
{%- set ns.n = ns.n + m.content | length %}{% if loop.last %}{% break %}{% endif %}
{%- endfor %}
{%- macro line(text, n=2) %}{{ text * n }}{% endmacro %}
{{- line("-") }}{{ dict(a=ns.n).items() | list }}{{ strftime_now("%Y") | int + 1 }}
{%- if add_generation_prompt %}{% generation %}assistant{% endgeneration %}{% endif %}
"""


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    messages = folder / "messages.json"
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    messages.write_text(json.dumps({"messages": said, "tools": [{"name": "x"}]}))
    template = folder / "chat_template.jinja"
    template.write_text(_TEMPLATE)
    values = {"eos_token": "</s>", "tools": [{"name": "x"}], "add_generation_prompt": True}
    tekken = folder / "tekken.json"
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    config = {"pattern": ".", "default_vocab_size": 260, "default_num_special_tokens": 4}
    tekken.write_text(json.dumps({"config": config, "vocab": vocab}))
    return {
        "messages": Target(messages, lambda: read_messages(str(messages)), mutate.json_value),
        "chat-template": Target(
            template,
            lambda: render(read_template(template), {**values, "messages": said}),
            mutate.lines,
        ),
        "tekken.json": Target(
            tekken, lambda: make_tokenizer(str(tekken)).pieces, mutate.json_value
        ),
    }
