"""The adapters of a server's model: a request chooses one by its field `model`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptc.engine.session import AdapterCopy
from gptc.errors import GptcError

if TYPE_CHECKING:
    from gptc.checkpoint.merged import AdapterSet
    from gptc.engine.model import Model
    from gptc.serve.scheduler import Scheduler


class Adapters:
    """The adapters that `read` gives, all in memory. The model must be in nobody else's use."""

    def __init__(self, model: Model, read: Callable[[], AdapterSet]) -> None:
        self._model, self._read = model, read
        self._none = AdapterCopy(model, none=True)
        self._named = self._load(read())

    def _load(self, files: AdapterSet) -> dict[str, AdapterCopy]:
        def taken(name: str) -> AdapterCopy:
            files.use(self._model, name)
            return AdapterCopy(self._model)

        return {name: taken(name) for name in files.names}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._named)

    def find(self, name: str) -> AdapterCopy:
        """The adapter of this name, which a request keeps until it ends; else that of none."""
        return self._named.get(name, self._none)

    def reload(self, scheduler: Scheduler) -> None:
        """Reads all again, for requests that come from now on. GptcError: none has changed."""
        files = self._read()
        if files.lora != self._model.options.lora:
            raise GptcError(
                "the ranks or matrices of the adapters are others than at the start: start the "
                "server again"
            )

        def swap() -> None:
            self._named = self._load(files)
            scheduler.keep_only([self._none, *self._named.values()])

        scheduler.between_steps(swap)


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
