"""Gradients that ranks send in a shorter form, with error feedback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gptc import GptcError, Model, UsageError
from gptc.engine.world import World
from gptc.training.options import TrainOptions
from gptc.training.parallel import without_effect
from gptc.training.residual import Residuals
from gptc.training.resolve import new_options
from mpi_jobs import job, needs_mpi, world_of
from ranks import N_CALLS, N_CODED, coded_numbers
from small_models import make_config

BLOCK = 256  # numbers that share a scale


def rounded_to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def rounded_to_int8(x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for first in range(0, x.size, BLOCK):
        block = x[first : first + BLOCK]
        largest = np.abs(block).max()
        numbers = np.rint(block * (np.float32(127) / largest))
        out[first : first + BLOCK] = (largest / np.float32(127)) * numbers
    return out


ROUNDED = {"bf16": rounded_to_bf16, "int8": rounded_to_int8}


def by_hand(wire: str, slices: list[slice]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The sums of each call, and the residuals of both ranks after them."""
    rounded, sums = ROUNDED[wire], []
    residuals = [np.zeros(N_CODED, np.float32) for _ in slices]
    for call in range(N_CALLS):
        total = np.empty(N_CODED, np.float32)
        for owner, own in enumerate(slices):
            parts = []
            for rank, residual in enumerate(residuals):
                numbers = coded_numbers(rank, call)[own]
                if rank != owner:
                    wanted = numbers + residual[own]
                    numbers = rounded(wanted)
                    residual[own] = wanted - numbers
                parts.append(numbers)
            wanted = parts[0] + parts[1] + residuals[owner][own]
            total[own] = rounded(wanted)
            residuals[owner][own] = wanted - total[own]
        sums.append(total)
    return sums, residuals


@needs_mpi
def test_rounded_sums_are_those_of_numpy(tmp_path: Path) -> None:
    ran = job(tmp_path, {}, "coded")
    assert ran.returncode == 0, ran.stderr
    middle = N_CODED // 16 // 2 * 16
    found = [np.load(tmp_path / f"rank{rank}.npz") for rank in (0, 1)]
    for wire in ROUNDED:
        sums, residuals = by_hand(wire, [slice(0, middle), slice(middle, N_CODED)])
        for rank, of_rank in enumerate(found):
            for call, wanted in enumerate(sums):
                np.testing.assert_allclose(of_rank[f"{wire}{call}"], wanted, rtol=1e-6)
            scale = np.abs(residuals[rank]).max()
            np.testing.assert_allclose(of_rank[wire], residuals[rank], atol=1e-5 * scale)


class Fixed:
    """A checkpoint of so many ranks, whose residuals are numbers of the rank."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def trainer(self) -> dict[str, int]:
        return {"ranks": self.ranks}

    @property
    def n_states(self) -> int:
        return 5 * len(make_config().parameters())

    def state(self, stored: str, shape: tuple[int, ...]) -> np.ndarray | None:
        rank = int(stored[4]) if stored.startswith("rank") else 0
        return np.full(shape, 10**rank, np.float32)


class Few(Fixed):
    """A checkpoint without residuals, which claims to be of many ranks."""

    def state(self, stored: str, shape: tuple[int, ...]) -> np.ndarray | None:
        return None


def test_a_number_of_ranks_without_residuals_ends() -> None:
    found: dict[str, np.ndarray] = {}
    Residuals(Writes(found), world_of(2)).restore(Few(2**61))  # type: ignore[arg-type]
    assert not any(map(np.any, found.values()))


@pytest.mark.parametrize(
    ("n_ranks", "before", "wanted"),
    [(2, 2, [1, 10]), (2, 5, [10101, 1010]), (3, 2, [1, 10, 0]), (3, 3, [1, 10, 100])],
)
def test_another_number_of_ranks_shares_residuals(
    n_ranks: int, before: int, wanted: list[int]
) -> None:
    world = world_of(n_ranks)
    for rank in range(n_ranks):
        world.rank, found = rank, {}
        Residuals(Writes(found), world).restore(Fixed(before))  # type: ignore[arg-type]
        assert {float(values.max()) for values in found.values()} == {wanted[rank]}
        assert len(found) == len(make_config().parameters())


def test_a_model_that_sends_all_has_no_residual() -> None:
    model = Model.create(make_config(), device="cpu", threads=1)
    with model, pytest.raises(GptcError, match="all gradients are sent"):
        model.read("wte.weight", "residual")


class Writes:
    """The model that a residual is given."""

    def __init__(self, found: dict[str, np.ndarray]) -> None:
        self.trained, self._found = make_config().parameters(), found

    def write(self, name: str, tensor: str, values: np.ndarray) -> None:
        assert tensor == "residual"
        self._found[name] = values


def test_options_of_wires() -> None:
    (note,) = without_effect(TrainOptions(wire="int8"), 1)
    assert "--wire int8 has no effect in one process" in note
    assert not list(without_effect(TrainOptions(wire="int8"), 2))
    with pytest.raises(UsageError, match="--sync-every 5 excludes --wire bf16"):
        new_options({"sync_every": 5, "eval_every": 10, "wire": "bf16"})
    world, values = World(), np.ones(3, np.float32)
    world.add_coded(values, np.zeros(3, np.float32), "int8")  # one rank alone
    assert world.spans() == []
    np.testing.assert_array_equal(values, [1, 1, 1])
