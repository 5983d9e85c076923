"""The plan of several ranks: the memory of each, and the formula of their steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptc.engine.world import World
from gptc.training.cluster import (
    BUCKET,
    FEW_SUMS,
    LEAST_SUM,
    LINKS,
    Cluster,
    Gradients,
    Method,
    _gradients,
    _methods,
    described,
    exchange_s,
    exposed_s,
    least_sum,
)
from gptc.training.diloco import MOST_NUMBERS, Diloco
from gptc.training.progress import SilentProgress
from gptc.training.report import planned_bytes
from gptc.training.resolve import new_options
from gptc.training.setup import set_up

MB = 1_000_000


def test_a_sum_costs_what_its_messages_cost() -> None:
    """Of 4 ranks, each sends three quarters of 400 MB, twice, and waits for a latency each time."""
    n = 100 * MB
    sent = 2 * 0.75 * 4 * n / LINKS["1G"]
    assert exchange_s(n, 4, LINKS["1G"], 0) == pytest.approx(sent)
    assert sent == pytest.approx(4.8 * 1514 / 1448)  # with the headers of frames
    assert exchange_s(n, 4, LINKS["1G"], 0.02) == pytest.approx(sent + 0.02 * 2)
    assert exchange_s(n, 4, LINKS["1G"], 0.02, n_calls=3) == pytest.approx(sent + 0.02 * 6)
    assert exchange_s(n, 4, LINKS["1G"], 0, 2) == pytest.approx(sent / 2)
    assert exchange_s(n, 1, LINKS["1G"], 0.02) == 0
    slow = 2 * 0.75 * 4 * n / (2**23 / 0.5)  # 8 MiB in half a second
    assert exchange_s(n, 4, LINKS["1G"], 0.5) == pytest.approx(slow + 0.5 * 2)


def test_backward_hides_sums_but_the_last() -> None:
    """Sums of 3 numbers, of which one takes a second: 6 in products, a head of 2, and a norm."""
    gradients = Gradients(6, 2, 1)

    def exposed(backward_s: float) -> float:
        return exposed_s(gradients, 3, backward_s, float)

    assert exposed(80) == 3 + 3  # the second sum begins when backward ends
    assert exposed(8) == 5 + 3 + 3 - 8 + 3  # the first begins after 5 seconds
    assert exposed(0) == 9
    assert exposed_s(gradients, 9, 80, float) == 9  # one sum, of all
    assert exposed_s(Gradients(9, 0, 0), 3, 90, float) == 3


def test_a_small_model_has_some_sums() -> None:
    assert [least_sum(n) for n in (1000, 400_000, 1 << 30)] == [1 << 16, 100_000, 1 << 21]


def test_gradients_are_told_apart_by_when_they_are_complete() -> None:
    shapes = {"wte.weight": (7, 4), "wpe.weight": (3, 4), "h.0.mlp.fc.weight": (8, 4), "n": (4,)}
    trained = [(name, shape, True) for name, shape in shapes.items()]
    for tied, want in {True: Gradients(32, 28, 16), False: Gradients(32, 0, 44)}.items():
        model = SimpleNamespace(trained=trained, config=SimpleNamespace(tied=tied))
        assert _gradients(SimpleNamespace(model=model)) == want  # type: ignore[arg-type]


def _steps(n_numbers: int, optimizer: str, latency_s: float) -> dict[str, float]:
    """Seconds of a step of two ranks by method."""
    options = SimpleNamespace(
        grad_accum=1, batch_size=4, sync_every=0, wire="fp32", optimizer=optimizer
    )
    model = SimpleNamespace(
        trained=[("w", (n_numbers,), True)],
        config=SimpleNamespace(tied=False),
        options=SimpleNamespace(device="cpu"),
    )
    setup, costs = SimpleNamespace(options=options, model=model), SimpleNamespace
    link = "100G" if n_numbers < 10_000 else "100M"
    found = _methods(setup, costs(pass_s=0.06, update_s=0.01), 2, link, latency_s)  # type: ignore[arg-type]
    return {method.name: method.step_s for method in found}


def test_a_step_waits_for_latencies() -> None:
    """Of a small model: for its gradients, for the loss and for signals."""
    steps = {latency_s: _steps(1000, "adamw", latency_s) for latency_s in (0.0, 0.02)}
    waits = {name: steps[0.02][name] - steps[0.0][name] for name in steps[0.0]}
    assert waits["data parallel"] == pytest.approx(0.04 + 0.06, rel=1e-3)
    assert waits["ZeRO-1"] == pytest.approx(0.02 + 0.02 + 0.02 + 0.06, rel=1e-3)
    assert waits["DiLoCo"] == pytest.approx(0.06 / 50, rel=1e-3)
    assert steps[0.0]["data parallel"] == pytest.approx(0.04, rel=1e-3)


def test_large_models_wait_for_each_sum() -> None:
    """DiLoCo adds groups of 2^21 numbers, ZeRO-1 with Muon all matrices at once."""
    n_numbers = 2 * MOST_NUMBERS + 1
    without, slow = (_steps(n_numbers, "muon", latency_s) for latency_s in (0.0, 0.02))
    assert slow["DiLoCo"] - without["DiLoCo"] == pytest.approx((3 * 0.04 + 0.02) / 50, rel=1e-3)
    assert slow["ZeRO-1"] - without["ZeRO-1"] == pytest.approx(0.02 + 0.02 + 0.02 + 0.06, rel=1e-3)


def test_the_plan_of_ranks(
    gptc: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    given = {**options, "n_embd": 64, "batch_size": 4, "device": "cpu", "out": tmp_path / "r"}
    arguments = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
    ran = gptc("plan", *arguments, "--ranks", 2, "--link", "1G", "--latency", 100, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["cluster"]
    assert 0 < found["sharded_optimizer_bytes"] < 0.7 * found["optimizer_bytes"]
    saved = found["optimizer_bytes"] - found["sharded_optimizer_bytes"]
    assert found["engine_bytes"] - found["sharded_engine_bytes"] == saved
    plain, sharded, apart = found["methods"]
    assert [m["name"] for m in found["methods"]] == ["data parallel", "ZeRO-1", "DiLoCo"]
    assert apart["step_s"] < plain["step_s"]
    assert all(
        0 < m["efficiency"] < 1.01 and 1 <= m["best_ranks"] <= 4 for m in (plain, sharded, apart)
    )


def test_shorter_gradients_need_memory_for_what_rounding_leaves_out(
    gptc: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """The plan's bytes are those of the model that a rank makes."""
    given = {**options, "batch_size": 4, "device": "cpu", "out": tmp_path / "r"}
    arguments = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
    found = {}
    for wire in ("fp32", "int8"):
        ran = gptc("plan", *arguments, "--ranks", 2, "--wire", wire, "--json")
        assert ran.code == 0, ran.err
        found[wire] = json.loads(ran.out)
    before, after = (found[wire]["cluster"]["engine_bytes"] for wire in ("fp32", "int8"))
    assert after - before == pytest.approx(4 * found["fp32"]["n_params"], rel=0.01)


def test_diloco_needs_memory_for_what_ranks_have_in_common(
    gptc: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Two arrays for each parameter: those that a run makes."""
    given = {**options, "batch_size": 4, "device": "cpu", "out": str(tmp_path / "r")}
    given |= {"eval_every": 4, "save_every": 4}
    arguments = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
    ran = gptc("plan", *arguments, "--ranks", 2, "--json")
    setup = set_up(new_options(given | {"sync_every": 4}), None, SilentProgress())
    with setup.model:
        outer = Diloco(setup.model, World(), 4, 0.7, 0.9)
        n_bytes = sum(a.nbytes for arrays in (outer._weights, outer._momentum)
                      for a in arrays.values())  # fmt: skip
        assert json.loads(ran.out)["cluster"]["outer_bytes"] == n_bytes
        session = 10 * setup.plan.total_bytes  # more than what an outer step takes for a moment
        apart = planned_bytes(setup, session, 0)
        setup.options = replace(setup.options, sync_every=0)
        assert apart - planned_bytes(setup, session, 0) == n_bytes


def test_one_rank_pays_and_two_pay() -> None:
    methods = [Method("data parallel", 0.1, 0.5, n) for n in (1, 2)]
    lines = list(described(Cluster(2, 10, 5, 10, 5, 3, methods), "1G", 0))
    assert [line.rpartition("; ")[2] for line in lines[1:]] == [
        "at most 1 rank pays", "at most 2 ranks pay",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--link", "1G"], 2, "--link 1G is of several ranks: add --ranks 4"),
        (["--ranks", 3], 1, "3 ranks cannot share equally"),
        (["--ranks", 2, "--latency", 9], 2, "--latency 9 is of a network: add --link 10G"),
        (["--ranks", 2, "--link", "1G", "--latency", "nan"], 2, "--latency is nan; it must be 0"),
        (["--ranks", 2, "--link", "1G", "--latency", -1], 2, "--latency is -1; it must be 0"),
    ],
)
def test_plans_of_ranks_that_are_refused(
    gptc: Callable[..., Any], arguments: list[str], extra: list[Any], code: int, message: str
) -> None:
    ran = gptc("plan", *arguments, "--device", "cpu", *extra)
    assert (ran.code, len(ran.err.splitlines())) == (code, 1)
    assert message in ran.err


def test_the_sizes_of_sums_are_those_of_the_engine() -> None:
    csrc = Path(__file__).resolve().parents[3] / "csrc"
    assert f"COMM_BUCKET = 1 << {BUCKET.bit_length() - 1} " in (csrc / "comm/comm.h").read_text()
    found = re.search(r"parts = (\d+), least = 1 << (\d+),", (csrc / "api/reduce.c").read_text())
    assert found is not None
    assert (int(found[1]), 1 << int(found[2])) == (FEW_SUMS, LEAST_SUM)
