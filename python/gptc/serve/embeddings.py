"""/v1/embeddings: a vector for each input, of the model's states."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptc.errors import GptcError, PromptTooLong, python_names
from gptc.generation.embedding import embedding, vector_of
from gptc.generation.request import Request, Sample
from gptc.serve.answers import Answers
from gptc.serve.problems import BadRequest
from gptc.serve.service import Service
from gptc.serve.streaming import Json

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response


PROMPT = "input"  # the field with it


def prepare(service: Service, fields: Mapping[str, Any]) -> list[Request]:
    """The requests of a body, one for each input."""
    service.model_of(fields)
    scheduler = service.scheduler
    size = scheduler.model.config.n_embd
    if int(fields.get("dimensions", size)) != size:
        raise BadRequest(
            f"dimensions is {fields['dimensions']}; this model's vectors have {size} numbers, and "
            "a part of one is not a vector of the text",
            param="dimensions",
        )
    found = []
    for given in _inputs(fields["input"]):
        if not given:
            raise BadRequest("input has an empty text; give at least a character", param="input")
        try:
            with python_names():
                pooling = fields.get("pooling", "mean")
                request = embedding(scheduler.model, scheduler.tokenizer, given, pooling)
                found.append(service.adapt(request, fields))
        except PromptTooLong as error:
            raise service.too_long(error, "input") from None
        except GptcError as error:
            raise BadRequest(str(error), param="input") from None
    return found


def _inputs(given: Any) -> list[str | Sequence[int]]:
    return list(given) if isinstance(given, list) and isinstance(given[0], str | list) else [given]


async def answer(
    service: Service, http: HttpRequest, fields: Mapping[str, Any], requests: list[Request]
) -> Response:
    """The vectors, as numbers or in base64."""
    encodes = fields.get("encoding_format") == "base64"
    async with Answers(service, http, requests, int(fields.get("priority", 0))) as answers:
        async for _ in answers:
            pass
        vectors = [_vector(choice.sample, encodes) for choice in answers.choices]
        n_tokens = answers.n_prompt
    data = [
        {"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return Json({"object": "list", "data": data, "model": service.model_of(fields), "usage": usage})


def _vector(sample: Sample, encodes: bool) -> str | list[float]:
    """The vector as numbers, or as base64 of little-endian float32."""
    vector = vector_of(sample)
    if encodes:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]
