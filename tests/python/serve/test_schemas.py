"""The schemas of tools/attack/schemas.py, some of them, next to readers of streams."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def schemas(attack_module: Callable[[str], Any]) -> Any:
    return attack_module("schemas")


def test_schemas_with_every_keyword_are_answered_and_stall_nobody(
    schemas: Any, own_server: Callable[..., Any]
) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    with own_server() as server:
        attack = schemas.Schemas(server.url, os.getpid(), every=23)
        found = asyncio.run(attack.run(attack.n, at_once=2, readers=1))
        assert found.problems == []
        assert found.statuses[200]
        assert found.statuses[400]
        assert max(found.gaps_s) < schemas.GAP_S
        assert asyncio.run(attack.idle())


def test_the_attack_finds_a_status_of_500(
    schemas: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.serve import service

    monkeypatch.setattr(service, "secrets", None)
    attack = schemas.Schemas(server.url, os.getpid())
    monkeypatch.setattr(schemas, "bodies", lambda schema: [("/v1/completions", b'{"prompt":"a"}')])
    asyncio.run(attack.ask())
    assert any("status 500" in problem for problem in attack.found.problems)
