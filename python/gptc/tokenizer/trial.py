"""A program that tries a tokenizer and ends: `libraries` runs it before the tokenizer is used.

    python -I -S child.py trial.py … KIND < DEFINITION

It prints "fine", or the fault. It imports nothing of gptc, to start soon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

_MOST_IDS = 32  # a byte of text; text that multiplies fills the memory


def main() -> None:
    """Tries the tokenizer on standard input."""
    try:
        encode = _ENCODERS[sys.argv[1]](sys.stdin.buffer.read())
        for text in _texts():
            n_ids, most = len(encode(text)), _MOST_IDS * (len(text.encode()) + 1)
            if n_ids > most:
                raise ValueError(f"{n_ids:,} tokens for a text of {len(text):,} characters")
        print("fine")
    except MemoryError:
        print("out of memory")
    except BaseException as error:  # a panic is not an Exception
        print((str(error).strip() or type(error).__name__).splitlines()[0])


def _tokenizers(definition: bytes) -> Callable[[str], Any]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.encode("a")  # with what it adds to a text
    return lambda text: tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _tiktoken(pattern: bytes) -> Callable[[str], Any]:
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "trial", pat_str=pattern.decode(), mergeable_ranks=ranks, special_tokens={}
    )
    return encoding.encode_ordinary


def _sentencepiece(model: bytes) -> Callable[[str], Any]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    processor.id_to_piece(list(range(processor.vocab_size())))
    return processor.encode


_ENCODERS = {
    "tokenizers": _tokenizers,
    "tiktoken": _tiktoken,
    "sentencepiece": _sentencepiece,
}


def _texts() -> Iterator[str]:
    """All of ASCII and samples of other scripts; runs, on which a pattern may backtrack."""
    ascii_text = "".join(map(chr, range(1, 128)))
    yield ""
    yield from ascii_text
    yield ascii_text + "".join(map(chr, range(160, 0x3000, 7))) + "\ufb01\ufdfa\ufeff\U0001f600"
    yield "Hello world, it's 1234!\r\n\n  It is x.\t\u00e9\u00e8 \u65e5\u672c\u8a9e \u2581y\ue000"
    for unit in ("a", "A", " ", "0", "\n", ".", "ab", "a ", "a1", "x\u0301", "\u65e5", "=-"):
        for end in ("", "!", "\n", "b"):
            yield unit * 2000 + end


if __name__ == "__main__":
    main()
