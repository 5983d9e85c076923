"""The fields of each endpoint's body: JSON Schema that validates, and that /docs shows."""

from __future__ import annotations

from typing import Any

from gptc.generation.embedding import POOLING
from gptc.generation.options import Sampling
from gptc.serve.options import ServeOptions
from gptc.serve.schema import Schema
from gptc.settings import Declared, declared

MOST_TOP = 20  # alternatives of a token
MOST_STOPS = 16
MOST_BIASES = 1024
_TEXT = {"type": "string"}
_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
_OBJECT = {"type": "object"}
_KINDS = {int: "integer", float: "number"}


def _required(schema: Schema) -> dict[str, Any]:
    return {**schema, "required_field": True}


def _with_help(schema: Schema, help: str) -> dict[str, Any]:
    return {**schema, "description": help}


def _of_option(option: Declared, **changes: Any) -> dict[str, Any]:
    """The schema of an option's field, with its help and range."""
    found: dict[str, Any] = {"type": _KINDS[option.kind], "description": option.help}
    bounds = option.range
    if bounds.least is not None:
        found["minimum"] = bounds.least
    if bounds.above is not None:
        found["exclusiveMinimum"] = bounds.above
    if bounds.most is not None:
        found["maximum"] = bounds.most
    elif bounds.below is not None:
        found["maximum"] = bounds.below - 1
    return found | {"default": option.default} | changes


def sampling_fields() -> dict[str, Any]:
    """The fields of `Sampling`, with OpenAI's defaults and its name for biases."""
    options = declared(Sampling)
    fields = {name: _of_option(option) for name, option in options.items() if name != "bias"}
    fields["temperature"]["default"] = 1.0
    del fields["seed"]["default"]
    for name in ("presence_penalty", "frequency_penalty"):
        fields[name] |= {"minimum": -100, "maximum": 100}
    fields["logit_bias"] = {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MOST_BIASES,
        "description": "Number to add to the logit of each of these token ids.",
    }
    return fields


def _text_fields(options: ServeOptions) -> dict[str, Any]:
    stops = {"type": "array", "items": _TEXT, "maxItems": MOST_STOPS}
    return {
        "model": _with_help(_TEXT, "Name of the model."),
        "n": {
            "type": "integer", "minimum": 1, "maximum": options.max_n, "default": 1,
            "description": "Number of choices.",
        },
        "stop": {"anyOf": [_TEXT, stops], "description": "Strings that end a choice."},
        "stream": {"type": "boolean", "default": False, "description": "Answer in pieces (SSE)."},
        "stream_options": {
            "type": "object", "properties": {"include_usage": {"type": "boolean"}},
            "description": "include_usage: a last piece with the numbers of tokens.",
        },
        "grammar": _with_help(_TEXT, "GBNF grammar that the text must match."),
        "regex": _with_help(_TEXT, "Regular expression that the text must match."),
        "response_format": _FORMAT,
        "priority": {
            "type": "integer", "minimum": -100, "maximum": 100, "default": 0,
            "description": "Requests with a larger one begin first.",
        },
        "return_token_ids": {
            "type": "boolean", "default": False, "description": "Also the ids of the tokens.",
        },
        **sampling_fields(),
        # Accepted, as clients send them; they change nothing here.
        **{name: {"description": "Ignored."} for name in _IGNORED},
    }  # fmt: skip


def _prompts(options: ServeOptions) -> dict[str, Any]:
    several = {"type": "array", "minItems": 1, "maxItems": options.max_prompts}
    texts, ids = {**several, "items": _TEXT}, {**several, "items": _IDS}
    return {"anyOf": [_TEXT, texts, _IDS, ids]}


def completion_fields(options: ServeOptions) -> dict[str, Any]:
    """The fields of /v1/completions."""
    return {
        "prompt": _with_help(_prompts(options), "Text or token ids to continue, or several."),
        "max_tokens": {
            "type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": 16,
            "description": "Largest number of tokens to generate.",
        },
        "echo": {"type": "boolean", "default": False, "description": "Also the prompt."},
        "logprobs": {
            "type": "integer", "minimum": 0, "maximum": MOST_TOP,
            "description": "Log-probabilities of each token and of so many of the likeliest.",
        },
        "best_of": {
            "type": "integer", "minimum": 1, "maximum": options.max_n,
            "description": "Number of choices to generate, of which the likeliest are given.",
        },
        "suffix": _with_help(_TEXT, "Refused: models here continue a text."),
        **_text_fields(options),
    }  # fmt: skip


# llama.cpp's cache_prompt: a prompt that begins as another is always computed from there on.
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "cache_prompt",
)  # fmt: skip
_FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "required": ["schema"],
            "properties": {"name": _TEXT, "schema": _OBJECT, "strict": {"type": "boolean"}},
        },
    },
    "description": "Form of the answer.",
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": _TEXT, "description": _TEXT, "parameters": _OBJECT},
        },
    },
}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {
        "type": {"type": "string", "enum": ["text", "input_text", "output_text"]},
        "text": _TEXT,
    },
}
_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": _TEXT, "arguments": {"anyOf": [_TEXT, _OBJECT]}},
        }
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {
            "type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]
        },
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]},
        "tool_calls": {"type": "array", "items": _CALL},
        "name": _TEXT,
        "tool_call_id": _TEXT,
    },
}  # fmt: skip
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1}
_LENGTH = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}


def chat_fields(options: ServeOptions) -> dict[str, Any]:
    """The fields of /v1/chat/completions."""
    named = {"type": "object", "required": ["function"], "properties": {"function": {
        "type": "object", "required": ["name"], "properties": {"name": _TEXT}}}}  # fmt: skip
    return {
        "messages": _required(_with_help(_MESSAGES, "The conversation.")),
        "max_tokens": _with_help(_LENGTH, "Largest number of tokens of the answer."),
        "max_completion_tokens": _with_help(_LENGTH, "The same."),
        "logprobs": {"type": "boolean", "description": "Log-probabilities of each token."},
        "top_logprobs": {
            "type": "integer", "minimum": 0, "maximum": MOST_TOP,
            "description": "Number of the likeliest tokens to list for each token.",
        },
        "add_generation_prompt": {
            "type": "boolean", "default": True,
            "description": "End the prompt with what begins an answer; not if one is continued.",
        },
        "continue_final_message": {
            "type": "boolean", "default": False,
            "description": "Continue the last message, which is the assistant's. The answer is "
            "what is added.",
        },
        "tools": {
            "type": "array", "items": _TOOL, "maxItems": 128,
            "description": "Functions that the model may ask to call.",
        },
        "tool_choice": {
            "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, named],
            "description": "none, auto, required, or the function to call.",
        },
        "parallel_tool_calls": {"type": "boolean", "description": "Ignored."},
        "reasoning_effort": _with_help(_TEXT, "Value for the chat template, if it has one."),
        "chat_template_kwargs": _with_help(_OBJECT, "Further values for the chat template."),
        **_text_fields(options),
    }  # fmt: skip


def response_fields(options: ServeOptions) -> dict[str, Any]:
    """The fields of /v1/responses."""
    kept = ("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", *_IGNORED)
    fields = _text_fields(options)
    return {
        "input": _required(
            _with_help({"anyOf": [_TEXT, _MESSAGES]}, "A text, or the conversation.")
        ),
        "instructions": _with_help(_TEXT, "System message."),
        "max_output_tokens": _with_help(_LENGTH, "Largest number of tokens of the answer."),
        "tools": {"type": "array", "items": _OBJECT, "description": "An empty list."},
        "tool_choice": {"type": "string", "enum": ["none", "auto"], "description": "Ignored."},
        "text": {
            "type": "object",
            "properties": {"format": {
                "type": "object", "required": ["type"],
                "properties": {"type": {"type": "string", "enum": ["text"]}},
            }},
            "description": "Form of the answer: format has the type text.",
        },
        **{name: fields[name] for name in kept},
    }  # fmt: skip


def embedding_fields(options: ServeOptions) -> dict[str, Any]:
    """The fields of /v1/embeddings."""
    fields = _text_fields(options)
    return {
        "input": _required(
            _with_help(_prompts(options), "Text or token ids to embed, or several.")
        ),
        "model": fields["model"],
        "encoding_format": {
            "type": "string", "enum": ["float", "base64"], "default": "float",
            "description": "base64: of the numbers as little-endian float32.",
        },
        "dimensions": {
            "type": "integer", "minimum": 1, "maximum": 2**31 - 1,
            "description": "Numbers of a vector: the model's width, and no other.",
        },
        "pooling": {
            "type": "string", "enum": list(POOLING), "default": "mean",
            "description": "mean: of the states after all tokens; last: of the last token.",
        },
        "priority": fields["priority"],
        "user": fields["user"],
    }  # fmt: skip


def tokenize_fields(options: ServeOptions) -> dict[str, Any]:
    """The fields of /tokenize."""
    return {
        "content": _required(_with_help(_TEXT, "The text.")),
        "add_special": {
            "type": "boolean", "default": False,
            "description": "With the token that begins each of the model's texts.",
        },
    }  # fmt: skip


def detokenize_fields(options: ServeOptions) -> dict[str, Any]:
    """The fields of /detokenize."""
    return {"tokens": _required({"type": "array", "items": _ID, "description": "Token ids."})}
