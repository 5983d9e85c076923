"""Held-out conversations of a run: prompts, and the model's answers before and after training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptc.data.chat_loader import ChatLoader
from gptc.data.kinds import REJECTED
from gptc.data.sequences import Sequences
from gptc.files.words import plural
from gptc.generation.decoder import Generation
from gptc.generation.options import ANSWER_STOP, Sampling
from gptc.tokenizer.conversations import SAID
from gptc.training.setup import Setup

N_PROMPTS = 3
ANSWER_TOKENS = 128
_LONGEST_SHOWN = 300  # characters of a prompt


def chat_notes(setup: Setup) -> Iterator[str]:
    """Notes on conversations that are cut or left out."""
    assert isinstance(setup.loader, ChatLoader)
    windows, longest = setup.loader.windows, setup.options.seq_len + 1
    train_on = "completion" if setup.options.dpo else setup.options.train_on
    if windows.n_long:
        done = "are cut" if setup.options.long_rows == "cut" else "are left out"
        yield (
            f"note: {plural(windows.n_long, windows.what)} of more than {longest} tokens {done}; "
            "a larger --seq-len takes more of them"
        )
    if windows.n_empty:
        yield (
            f"note: {plural(windows.n_empty, windows.what)} left out that have nothing to learn "
            f"(--train-on {train_on}) within {longest} tokens"
        )


class HeldOut:
    """Prompts of held-out conversations, and a model's answers before and after training."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        split = "val" if setup.dataset.n_tokens("val") else "train"
        sequences = Sequences(setup.dataset, split)
        room = setup.model.config.block_size - 1
        self._prompts: list[list[int]] = []
        for i in range(len(sequences)):
            begin = int(sequences.begins[i])
            kinds = sequences.kinds[begin : begin + int(sequences.sizes[i])]
            n = int(np.argmax((kinds & SAID) > 0))
            if kinds[0] & REJECTED or not 0 < n < room:
                continue  # the chosen answer has the same prompt
            prompt = sequences.tokens(i, n).tolist()
            if prompt not in self._prompts:
                self._prompts.append(prompt)
            if len(self._prompts) == N_PROMPTS:
                break
        self._before: list[str] = []

    @property
    def longest(self) -> int:
        """The largest number of tokens of a prompt with its answer."""
        return max(map(len, self._prompts), default=1) + ANSWER_TOKENS

    def remember(self) -> None:
        """Keeps the answers of the model as it is, to compare later ones with them."""
        self._before = [self._answer(prompt) for prompt in self._prompts]

    def text(self) -> str:
        """Each prompt with the answers that are remembered, and those of the model as it is."""
        lines: list[str] = []
        for i, prompt in enumerate(self._prompts):
            asked = " ".join(self._setup.tokenizer.decode(prompt).split())
            lines.append(f"prompt: {asked[-_LONGEST_SHOWN:]}")
            if self._before:
                lines.append(f"before: {self._before[i]}")
            lines.append(f"{'after' if self._before else 'answer'}: {self._answer(prompt)}")
        return "\n".join(lines)

    def _answer(self, prompt: list[int]) -> str:
        setup = self._setup
        room = setup.model.config.block_size - len(prompt)
        generation = Generation(
            setup.model,
            setup.tokenizer,
            prompt,
            max_tokens=min(ANSWER_TOKENS, room),
            sampling=Sampling(temperature=0),
            stop=ANSWER_STOP,
        )
        return "".join(piece for _, piece in generation).strip()
