"""Where a template marks the assistant's text itself, gptc's masks are those of transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from chat_templates import message
from chat_tokenizers import SORTS, write_folder
from gptc.errors import GptcError
from gptc.tokenizer.conversations import SAID, encode_conversations
from gptc.tokenizer.registry import make_tokenizer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers"),
]

# ChatML and Llama 3 with the marks that transformers reads.
MARKED = {
    "ChatML": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "Llama 3": (
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|eot_id|>' }}"
        "{% endgeneration %}{% else %}{{ message.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
TURNS = [
    message("system", "Be brief."),
    message("user", "The hill, the hello?"),
    message("assistant", "Hello 'naïve' 東京."),
    message("user", "And\nnow?"),
    message("assistant", "It is."),
]


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("name", MARKED)
def test_masks_are_those_of_transformers(tmp_path: Path, sort: str, name: str) -> None:
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, sort)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TURNS,
        chat_template=MARKED[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = make_tokenizer(str(folder))
    (found,) = encode_conversations(ours, [{"messages": TURNS}], MARKED[name])
    assert not isinstance(found, GptcError)
    (sequence,) = found
    assert sequence.tokens.tolist() == list(theirs["input_ids"])
    assert (sequence.kinds & SAID).tolist() == list(theirs["assistant_masks"])
    assert 0 < sum(theirs["assistant_masks"]) < len(sequence.tokens)
