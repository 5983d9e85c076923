"""A rank's GPU: which one it sees, and hosts that have too few."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptc.engine import launch, library
from gptc.engine.world import JobError, World


class Ranks(World):
    """This rank among others, with what they answer."""

    def __init__(self, rank: int, hosts: str, others: list[Any]) -> None:
        super().__init__()
        self.rank, self.size = rank, len(hosts)
        self._hosts, self._others = hosts, others

    def host(self, rank: int) -> str:
        return self._hosts[rank]

    def gather_json(self, value: Any) -> list[Any]:
        every = [[self.host(rank), other] for rank, other in enumerate(self._others)]
        every[self.rank] = value
        return every


@pytest.mark.parametrize(
    ("rank", "visible", "own"),
    [
        (0, [None] * 4, "0"),
        (1, [None] * 4, "1"),
        (3, [None] * 4, "1"),  # the second one on its host
        (1, ["4,7", "4,7", None, None], "7"),
        (1, ["5", "5", None, None], "-1"),
        (1, ["0", "1", None, None], "1"),  # the starter has given them
        (3, [None, None, "2,3", "2,3"], "3"),
    ],
)
def test_a_rank_sees_the_gpu_with_its_number_on_its_host(
    rank: int, visible: list[str | None], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = visible[rank]
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    Ranks(rank, "aabb", list(visible)).take_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gpu", lambda: SimpleNamespace(problem=None))
    with pytest.raises(JobError, match=r"^3 ranks on b, which has 2 GPUs, and each needs one: "):
        Ranks(1, "abbb", [True, True, True, False]).check_gpus("auto")
    Ranks(1, "abbb", [True] * 4).check_gpus("cuda")
    Ranks(1, "abb", [True, None, False]).check_gpus("cpu")  # refused later: devices differ
    Ranks(1, "abbb", [False, True, True, True]).check_gpus("cuda")  # another error
    monkeypatch.setattr(library, "gpu", lambda: SimpleNamespace(problem="none"))
    Ranks(1, "ab", [False, False]).check_gpus("auto")


def test_nccl_is_that_of_its_variable_or_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nccl" / "lib" / "libnccl.so.2"
    file.parent.mkdir(parents=True)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(launch, "find_spec", lambda name: found)
    monkeypatch.delenv("GPTC_NCCL", raising=False)
    assert launch.nccl_library() is None
    file.touch()
    assert launch.nccl_library() == str(file)
    monkeypatch.setenv("GPTC_NCCL", "/elsewhere/libnccl.so")
    assert launch.nccl_library() == "/elsewhere/libnccl.so"
