"""The adapters of a server's model: a request chooses one by its field `model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gptc.engine.session import AdapterCopy
from gptc.errors import GptcError
from gptc.serve.problems import NotFound

if TYPE_CHECKING:
    from gptc.checkpoint.merged import AdapterSet
    from gptc.engine.model import Model
    from gptc.serve.scheduler import Scheduler


class Adapters:
    """The adapters that `read` gives, all in memory. The model must be in nobody else's use.

    Their names stay the same.
    """

    def __init__(self, model: Model, read: Callable[[], AdapterSet]) -> None:
        self._model, self._read = model, read
        self.none = AdapterCopy(model, none=True)
        """That of the model alone."""
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
        """The adapter of this name, which a request keeps until it ends. NotFound if none is."""
        if name not in self._named:
            raise NotFound(f"the adapter {name!r:.60} is not here", param="model")
        return self._named[name]

    def reload(self, scheduler: Scheduler) -> None:
        """Reads all again, for requests that come from now on. GptcError: none has changed."""
        files = self._read()
        if files.names != self.names:
            raise GptcError(
                f"the adapters are {', '.join(files.names)}, and were {', '.join(self.names)} at "
                "the start: start the server again"
            )
        if files.lora != self._model.options.lora:
            raise GptcError(
                "the ranks or matrices of the adapters are others than at the start: start the "
                "server again"
            )

        def swap() -> None:
            self._named = self._load(files)
            scheduler.keep_only([self.none, *self._named.values()])

        scheduler.between_steps(swap)
