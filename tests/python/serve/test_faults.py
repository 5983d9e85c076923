"""The hostile clients of tools/attack/clients.py, a few of each, next to readers of streams."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def clients(attack_module: Callable[[str], Any]) -> Any:
    return attack_module("clients")


def test_hostile_clients_change_and_stall_nothing(
    clients: Any, own_server: Callable[..., Any]
) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    with own_server() as server:
        attack = clients.Attack(server.url, seed=5, slow_s=0.05)
        before = clients.n_sockets(os.getpid())
        found = asyncio.run(attack.run(150, at_once=8, readers=2))
        assert found.problems == []
        assert asyncio.run(attack.idle())
        assert {kind.__name__ for _, kind in attack._hostile} == set(found.kinds)
        assert found.n_streams >= 2
        end = time.monotonic() + 30
        while clients.n_sockets(os.getpid()) > before and time.monotonic() < end:
            time.sleep(0.05)
        assert clients.n_sockets(os.getpid()) <= before


def test_the_attack_finds_errors_and_changed_streams(
    clients: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.serve import completions

    attack = clients.Attack(server.url)
    original, n_asked = completions.prepare, 0

    def prepare(service: Any, fields: Any) -> Any:
        nonlocal n_asked
        n_asked += 1
        if n_asked > 12:  # those of the readers alone
            fields["seed"] += 1
        return original(service, {**fields, "stream": fields["stream"]})

    monkeypatch.setattr(completions, "prepare", prepare)
    monkeypatch.setattr(attack, "_hostile", ((1, attack.well_behaved),))
    found = asyncio.run(attack.run(8, at_once=1, readers=1))
    assert any("status 500" in problem for problem in found.problems)
    assert any("alone" in problem for problem in found.problems)
