"""The longest beginning of a prompt that a session's sequences hold already."""

from __future__ import annotations

from collections.abc import Sequence


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens at the beginning of two lists that are the same in both."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is much faster than a loop over tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def n_reusable(held: Sequence[int], prompt: Sequence[int], block: int = 1) -> int:
    """The number of tokens of a prompt that need not be read, since a cache holds them.

    The last token is always read, for its logits. With a `block`, only whole blocks count.
    """
    n = min(n_common(held, prompt), len(prompt) - 1)
    return n - n % block
