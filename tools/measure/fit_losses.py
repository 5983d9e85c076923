"""The constants of E + A / N^a + B / D^b that fit losses by size N and tokens D.

    python tools/measure/fit_losses.py --floor 1.2 < losses.txt

A line has N, D and a loss. A and B are those of least squares of relative errors, for each a and b
of a grid; E is given, since short runs do not settle it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Fit(NamedTuple):
    """The constants, and the relative errors of all losses."""

    of_size: float
    size_power: float
    of_tokens: float
    tokens_power: float
    errors: npt.NDArray[np.float64]


def fitted(rows: Sequence[tuple[float, float, float]], floor: float) -> Fit:
    """The best fit of rows (N, D, loss). ValueError if no A and B above 0 are found."""
    sizes, tokens, losses = np.array(rows, float).T
    found: list[Fit] = []
    for a in np.arange(0.1, 1.2, 0.05):
        for b in np.arange(0.1, 1.6, 0.05):
            terms = np.stack([sizes**-a, tokens**-b], 1)
            solved = np.linalg.lstsq(terms / losses[:, None], 1 - floor / losses, rcond=None)[0]
            if (solved > 0).all():
                errors = (floor + terms @ solved) / losses - 1
                found.append(Fit(solved[0], a, solved[1], b, errors))
    if not found:
        raise ValueError(f"no fit has positive constants with the floor {floor:g}")
    return min(found, key=lambda fit: float((fit.errors**2).sum()))


def main() -> None:
    """Prints the constants and the errors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--floor", type=float, required=True, help="E")
    floor = parser.parse_args().floor
    rows = [tuple(float(word) for word in line.split()) for line in sys.stdin if line.strip()]
    fit = fitted(rows, floor)
    print(
        f"{len(rows)} losses: {floor:g} + {fit.of_size:.4g} / N^{fit.size_power:.2f} + "
        f"{fit.of_tokens:.4g} / D^{fit.tokens_power:.2f}; errors "
        f"{np.sqrt((fit.errors**2).mean()):.4f} "
        f"(root of the mean square), {np.abs(fit.errors).max():.4f} at most"
    )


if __name__ == "__main__":
    main()
