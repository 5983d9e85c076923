"""A Hugging Face config.json, whose values are checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gptc.errors import GptcError


def is_size(value: Any) -> bool:
    """Whether a value is a whole number above 0 that computations take, as floats too."""
    return type(value) is int and 0 < value < 1 << 62


class ConfigJson(NamedTuple):
    """A config.json, and the name of its file in errors."""

    data: Mapping[str, Any]
    where: str

    def need(self, key: str) -> Any:
        """A size that must be there. Some are computed with before GPTConfig checks them."""
        value = self.data.get(key)
        if value is None:
            raise GptcError(f"{self.where} lacks {key}")
        if not is_size(value):
            raise GptcError(f"{self.where}: {key} is {value!r:.40}, not a whole number above 0")
        return value

    def flag(self, key: str) -> bool:
        """A value that is true or false, and false if it is not there."""
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise GptcError(f"{self.where}: {key} is {value!r}, not true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """GptcError when a key is there with a value that gptc does not compute."""
        if key in self.data and self.data[key] not in allowed:
            raise GptcError(
                f"{self.where}: {key} {self.data[key]!r} is not supported, only {allowed[0]!r}"
            )

    def choice(self, given: bool | str) -> bool:
        """What a family has, or a key of the file decides."""
        return self.flag(given) if isinstance(given, str) else given
