"""Commands that several ranks run together (mpirun): what they agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptc.engine.world import World


def agreed_model(world: World, model: str | None) -> str | None:
    """The model that rank 0 finds by `model`, so that all ranks open the same."""
    if world.size == 1:
        return model
    from gptc.checkpoint.facade import on_newest

    found = world.together(lambda: str(on_newest(model, lambda checkpoint: checkpoint).path))
    return str(world.gather_json(found)[0])


def agreed_threads(world: World, threads: int) -> int:
    """The threads of a rank, which has a part of its host's cores if `threads` is 0."""
    return threads or (world.share_of_cores() if world.size > 1 else 0)
