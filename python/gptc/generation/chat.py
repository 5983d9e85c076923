"""Conversations: answers to messages, by a model that was taught a chat template.

conversation = Conversation(model, tokenizer, system="Be brief.")
for piece in conversation.ask("What is the capital of France?"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptc.errors import python_names
from gptc.generation.decoder import Decoder, start
from gptc.generation.drafts import Draft
from gptc.generation.options import ANSWER_STOP, ANSWER_TOKENS, Sampling
from gptc.generation.request import Request, Sample, check_loaded, make_request, split_options
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.chat import chat_prompt, check_messages

if TYPE_CHECKING:
    from gptc.engine.model import Model

_LEAST_CTX = 1024  # tokens of a cache, which grows with the conversation


def chat(
    model: Model,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    draft: Draft | None = None,
    **options: Any,
) -> str:
    """The model's answer to a conversation.

    `messages` to `variables` are those of `chat_prompt`, `options` those of `stream`. An answer has
    at most 2,048 tokens unless `max_tokens` says another number.
    """
    with python_names():
        check_loaded(model, tokenizer)
        prompt = chat_prompt(
            tokenizer,
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            variables=variables,
        )
        defaults = {"max_tokens": ANSWER_TOKENS, "stop": ANSWER_STOP}
        request = make_request(model, tokenizer, prompt, **split_options(defaults | options))
    (sample, *_), pieces = start(model, tokenizer, request, draft)
    for _ in pieces:
        pass
    return answer_text(sample, tokenizer)


def answer_text(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text of an answer, without a space that the tokenizer begins a text with."""
    return sample.text.removeprefix(" ") if tokenizer.strips_space else sample.text


class Conversation:
    """Messages, and a cache of what the model has read of them.

    When the context is full, the oldest turns are left out of the prompt, but not of `messages`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        draft: Draft | None = None,
        **options: Any,
    ) -> None:
        """`options` are those of `make_request`."""
        self._model, self._tokenizer, self._draft = model, tokenizer, draft
        self._template, self._tools = chat_template, tools
        self._options = {"sampling": Sampling(), **options}
        self._decoder: Decoder | None = None
        self._n_ctx = 0  # of its cache
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = [*self._system]
        self.messages += check_messages(messages) if messages else []
        self.last: Sample | None = None
        """The last answer: its `finish` is the reason for its end."""
        self.n_forgotten = 0
        """The number of messages that the context has no room for."""

    def ask(self, text: str) -> Generator[str, None, None]:
        """Adds a message, and yields the answer in pieces. Those yielded become a message.

        An answer that is stopped before it begins leaves no message, and so does a GptcError.
        """
        n_before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self.answer()
        finally:
            del self.messages[n_before : n_before + (len(self.messages) == n_before + 1)]

    def answer(self) -> Generator[str, None, None]:
        """Yields the answer to the messages, which becomes one of them."""
        request = self._request()
        decoder = self._sized(request.n_ctx(self._model.config.block_size))
        (sample,) = request.samples(self._tokenizer)
        self.last, begun, strips = sample, False, self._tokenizer.strips_space
        try:
            for _, piece in decoder.run([sample]):
                if sample.error:
                    raise sample.error
                yield piece if begun or not strips else piece.removeprefix(" ")
                begun = begun or bool(piece)
        finally:
            sampling = self._options["sampling"]
            self._options["sampling"] = replace(sampling, seed=(sampling.seed + 1) % 2**63)
            content = answer_text(sample, self._tokenizer)
            if content or sample.finish == "stop":
                self.messages.append({"role": "assistant", "content": content})

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages, self.n_forgotten = [*self._system], 0

    def close(self) -> None:
        """Frees the cache; twice is harmless."""
        if self._decoder:
            self._decoder.close()
        self._decoder = None

    def _sized(self, n_ctx: int) -> Decoder:
        """The decoder, or a new one with twice the cache that it lacks."""
        if self._decoder is None or self._n_ctx < n_ctx:
            self.close()
            self._n_ctx = min(self._model.config.block_size, max(2 * n_ctx, _LEAST_CTX))
            self._decoder = Decoder(
                self._model, self._tokenizer, 1, self._n_ctx, self._draft, keep=True
            )
        return self._decoder

    def _request(self) -> Request:
        """The request for the next answer, of as many newer turns as the context holds."""
        size = self._model.config.block_size
        room = min(self._options.get("max_tokens", ANSWER_TOKENS), size // 4)
        prompt = self._prompt()
        while len(prompt) > size - room and self._forget(len(prompt) - size // 2):
            prompt = self._prompt()
        return make_request(self._model, self._tokenizer, prompt, **self._options)

    def _prompt(self) -> list[int]:
        n_first = self._n_system
        kept = self.messages[:n_first] + self.messages[n_first + self.n_forgotten :]
        return chat_prompt(self._tokenizer, kept, tools=self._tools, chat_template=self._template)

    @property
    def seed(self) -> int:
        """The random seed of the next answer, each of which has another."""
        seed: int = self._options["sampling"].seed
        return seed

    @property
    def _n_system(self) -> int:
        roles = (message["role"] for message in self.messages)
        return next((i for i, role in enumerate(roles) if role != "system"), len(self.messages))

    def _forget(self, n_tokens: int) -> bool:
        """Leaves out the oldest turns, of about so many tokens. False if only one turn is left."""
        at = self._n_system + self.n_forgotten
        turns = [i for i in range(at + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
        for turn in turns:
            texts = (str(message.get("content", "")) for message in self.messages[at:turn])
            n_tokens -= sum(len(self._tokenizer.encode(text)) for text in texts)
            self.n_forgotten = turn - self._n_system
            if n_tokens <= 0:
                break
        return bool(turns)
