"""A conversation's answers are those of its whole prompt, and the cache is computed once.

The class of fault: a cache whose tokens are not those of the prompt (after an interrupt, a draft,
or turns that are left out), and a history that an interrupt or an error leaves half-written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import gptc
from chat_templates import message
from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.engine.session import Session
from gptc.errors import GptcError, UsageError
from gptc.generation.chat import Conversation, chat
from gptc.generation.drafts import NgramDraft, Wanted
from gptc.generation.options import Sampling
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.chat import chat_prompt
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.registry import make_tokenizer
from small_models import varied
from vocabularies import llama_like

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)

NO_OTHER = tuple((i, -1e9) for i in range(128, 256))  # bytes than those of ASCII


@pytest.fixture
def talker(config: Callable[..., GPTConfig]) -> Iterator[Model]:
    """A small model with a context of 256 tokens that writes varied text."""
    with varied(config(block_size=256)) as model:
        yield model


@pytest.fixture
def taught() -> Tokenizer:
    tokenizer = make_tokenizer("bytes")
    tokenizer.marks = Marks(chat_template=TEMPLATE)
    return tokenizer


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each step."""
    counts: list[int] = []
    sample = Session.sample

    def counted(self: Session, tokens: Any, *rest: Any, **more: Any) -> None:
        counts.append(len(tokens))
        sample(self, tokens, *rest, **more)

    monkeypatch.setattr(Session, "sample", counted)
    return counts


class Wrong(NgramDraft):
    """Its guesses stay in the cache, in the place of tokens that were drawn."""

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [[7, 7][: each.most] for each in wanted]


def conversation(model: Model, tokenizer: Tokenizer, **options: Any) -> Conversation:
    sampling = Sampling(seed=options.pop("seed", 3))
    return Conversation(model, tokenizer, **{"max_tokens": 9, "sampling": sampling, **options})


def test_chat_answers_a_conversation(talker: Model, taught: Tokenizer) -> None:
    messages = [message("system", "Be brief."), message("user", "On")]
    answer = gptc.chat(talker, taught, messages, max_tokens=9, seed=3)
    prompt = chat_prompt(taught, messages)
    assert bytes(prompt) == b"s:Be brief.\nu:On\na:"
    assert [answer] == gptc.generate(talker, taught, prompt, max_tokens=9, seed=3, stop=())
    assert "".join(gptc.stream(talker, taught, prompt, max_tokens=9, seed=3, stop=())) == answer
    taught.marks = Marks(ends=(ord("x"),), chat_template=TEMPLATE)
    bias = ((ord("x"), 1e6),)
    assert gptc.chat(talker, taught, messages, bias=bias) == ""
    with pytest.raises(UsageError, match="unknown option 'max_token'"):
        chat(talker, taught, messages, max_token=9)
    with pytest.raises(
        UsageError, match=r"give one with chat_template, or let it continue a text$"
    ):
        chat(talker, make_tokenizer("bytes"), messages)


@pytest.mark.parametrize("draft", [None, NgramDraft, Wrong])
def test_each_answer_is_that_of_the_whole_prompt(
    talker: Model, taught: Tokenizer, fed: list[int], draft: Any
) -> None:
    talk = conversation(talker, taught, draft=draft and draft())
    # Only bytes that are text: an answer is the same when it is read again.
    talk._options["sampling"] = Sampling(seed=3, bias=NO_OTHER)
    for i, text in enumerate(("One, two", "three", "four: one, two, three")):
        before = len(talk.messages)
        answer = "".join(talk.ask(text))
        assert talk.messages[before:] == [message("user", text), message("assistant", answer)]
        earlier = talk.messages[:-1]
        whole = chat(talker, taught, earlier, max_tokens=9, seed=3 + i, bias=NO_OTHER)
        assert answer == whole
    talk.close()
    assert fed[0] == len(b"u:One, two\na:")


def test_the_cache_of_what_was_said_is_used_again(
    talker: Model, taught: Tokenizer, fed: list[int]
) -> None:
    talk = conversation(talker, taught)
    talk._options["sampling"] = Sampling(seed=3, bias=NO_OTHER)
    first = "".join(talk.ask("One"))
    fed.clear()
    "".join(talk.ask("Two"))
    # The last token of an answer was drawn, and not fed.
    assert fed[0] == len(first[-1:] + "\nu:Two\na:")
    fed.clear()
    talk.reset()
    "".join(talk.ask("Three"))
    assert fed[0] == len("Three\na:")
    talk.close()


def test_an_interrupted_answer_is_kept_as_far_as_it_was_seen(
    talker: Model, taught: Tokenizer, fed: list[int]
) -> None:
    talk = conversation(talker, taught, draft=Wrong(), max_tokens=40)
    talk._options["sampling"] = Sampling(seed=3, bias=NO_OTHER)
    pieces = talk.ask("One two one two one two")
    seen = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == message("assistant", talk.last.text if talk.last else "")
    assert talk.messages[-1]["content"].startswith(seen)
    answer = "".join(talk.ask("three"))
    earlier = talk.messages[:-1]
    assert answer == chat(talker, taught, earlier, max_tokens=40, seed=4, bias=NO_OTHER)
    pieces = talk.ask("stopped before it begins")
    n_before = len(talk.messages)
    pieces.close()
    assert len(talk.messages) == n_before
    talk.close()


def test_a_failing_message_leaves_no_trace(talker: Model, taught: Tokenizer) -> None:
    talk = conversation(talker, taught, system="Be brief.")
    with pytest.raises(GptcError, match=r"the prompt has 3,0.. tokens, more than the model's"):
        "".join(talk.ask("x" * 3000))
    assert talk.messages == [message("system", "Be brief.")]
    assert "".join(talk.ask("On"))


def test_the_oldest_turns_go_when_the_context_is_full(
    talker: Model, taught: Tokenizer, fed: list[int]
) -> None:
    talk = conversation(talker, taught, system="Be brief.")
    forgotten = []
    for i in range(12):
        "".join(talk.ask(f"This is message number {i}."))
        forgotten.append(talk.n_forgotten)
        n_prompt = len(talk.last.request.prompt) if talk.last else 0
        assert n_prompt <= 256 - 9
    assert forgotten[0] == 0
    assert forgotten == sorted(forgotten)
    assert forgotten[-1] > 0
    assert all(n % 2 == 0 for n in forgotten)  # whole turns
    # Half of the context is left free, so that the cache serves several turns again.
    assert len(set(forgotten)) < 5
    assert len(talk.messages) == 25
    prompt = bytes(talk.last.request.prompt) if talk.last else b""
    assert prompt.startswith(b"s:Be brief.\nu:This is message number")
    assert prompt.endswith(b"u:This is message number 11.\na:")
    talk.reset()
    assert (talk.messages, talk.n_forgotten) == ([message("system", "Be brief.")], 0)
    talk.close()


def test_the_cache_grows_with_the_conversation(
    talker: Model, taught: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptc.generation.chat._LEAST_CTX", 32)
    talk = conversation(talker, taught)
    sizes = []
    for text in ("a", "b" * 40, "c" * 40, "d" * 40):
        answer = "".join(talk.ask(text))
        assert answer == chat(talker, taught, talk.messages[:-1], max_tokens=9, seed=talk.seed - 1)
        sizes.append(talk._n_ctx)
    assert sizes[0] < sizes[1] < 256
    assert sizes[-1] == 256


def test_a_space_that_begins_a_text_is_not_part_of_an_answer(
    config: Callable[..., GPTConfig],
) -> None:
    tokenizer: Any = llama_like()
    tokenizer.marks = Marks(ends=(2,), chat_template=TEMPLATE)
    with varied(config("llama", vocab_size=tokenizer.vocab_size)) as model:
        bias = tuple((i, -1e9) for i in range(model.config.vocab_size) if i != 259)  # "▁"
        answer = chat(model, tokenizer, [message("user", "a")], bias=bias, max_tokens=3)
        assert answer == "  "
        talk = conversation(model, tokenizer, max_tokens=3)
        talk._options["sampling"] = Sampling(bias=bias)
        assert "".join(talk.ask("a")) == talk.messages[-1]["content"] == "  "
        talk.close()
