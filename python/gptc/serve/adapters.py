"""The adapters of a server's model: a request chooses one by its field `model`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gptc.errors import GptcError

if TYPE_CHECKING:
    from gptc.checkpoint.merged import AdapterSet
    from gptc.engine.arrays import FloatArray
    from gptc.engine.model import Model


@dataclass(eq=False)
class Adapter:
    """The numbers of an adapter, as the model has them. Read again, it is another adapter."""

    name: str
    values: dict[str, FloatArray] = field(repr=False)


class Adapters:
    """The adapters that `read` gives, all in memory. The model must be in nobody else's use."""

    def __init__(self, model: Model, read: Callable[[], AdapterSet]) -> None:
        self._model, self._read = model, read
        self._used: Adapter | None = None
        self._none, self._named = self._load(read())

    def _load(self, files: AdapterSet) -> tuple[Adapter, dict[str, Adapter]]:
        def taken(name: str | None) -> Adapter:
            files.use(self._model, name)
            values = {p.name: self._model.get(p.name) for p in self._model.trained}
            return Adapter(name or "", values)

        named = {name: taken(name) for name in files.names}
        self._used = taken(None)
        return self._used, named

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._named)

    def find(self, name: str) -> Adapter | None:
        """The adapter of this name, which a request keeps until it ends; None = the base."""
        return self._named.get(name)

    def use(self, adapter: Hashable) -> None:
        """Lets the model compute with an adapter, or with none. For the engine's thread."""
        wanted = adapter if isinstance(adapter, Adapter) else self._none
        if wanted is not self._used:
            for name, values in wanted.values.items():
                self._model.set(name, values)
            self._used = wanted

    def reload(self, between: Callable[[Callable[[], None]], None]) -> None:
        """Reads all again, for requests that come from now on. GptcError: none has changed.

        `between` calls a function when no step is under way, and waits for it.
        """
        files = self._read()
        if files.lora != self._model.options.lora:
            raise GptcError(
                "the ranks or matrices of the adapters are others than at the start: start the "
                "server again"
            )

        def swap() -> None:
            try:
                self._none, self._named = self._load(files)
            finally:
                self._used = None  # whatever the model has, the next step gives it its own

        between(swap)


def parse_adapters(given: Sequence[str]) -> tuple[list[Path], list[str | None]]:
    """The paths and names of `NAME=PATH`, or of paths alone, which may have a = in them."""
    paths: list[Path] = []
    names: list[str | None] = []
    for text in given:
        name, sign, path = text.partition("=")
        named = bool(sign and name and path) and not Path(text).exists()
        paths.append(Path(path if named else text))
        names.append(name if named else None)
    return paths, names
