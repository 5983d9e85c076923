"""The memory of a server's sequences, with those of a draft."""

from __future__ import annotations

from typing import Any

import pytest

from gptc.engine.session import session_bytes
from gptc.errors import GptcError
from gptc.generation.drafts import DraftPlan, ModelDraft, NgramDraft
from gptc.serve.options import ServeOptions
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied


def test_half_of_the_memory_is_for_the_model_and_its_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn", reason="pip install '.[serve]'")
    from gptc.serve import server

    tokenizer, options = make_tokenizer("bytes"), ServeOptions(parallel=4)
    with (
        varied(make_config(block_size=1024)) as model,
        varied(make_config(block_size=512)) as small,
    ):
        draft = DraftPlan(small, tokenizer, 4)
        assert draft.session_bytes(1024) == session_bytes(small, 4, 512)
        free = 2.8 * session_bytes(model, 4, 1024)
        monkeypatch.setattr(server, "available_bytes", lambda: free)
        assert server.choose_context(model, options) == 1024
        assert server.choose_context(model, options, DraftPlan()) == 1024
        assert server.choose_context(model, options, draft) == 512
        made = draft.make(256)
        assert isinstance(made, ModelDraft)
        assert made._n_ctx == 256
        assert isinstance(DraftPlan().make(256), NgramDraft)

        def refused(*sizes: Any) -> Any:
            raise GptcError("out of memory")

        monkeypatch.setattr(small, "session", refused)
        with pytest.raises(GptcError, match=r"give less with --parallel or --context \(out of"):
            server.make_service(model, tokenizer, options, name="tiny", draft=draft)
