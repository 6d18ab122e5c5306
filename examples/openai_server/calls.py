"""Parses and checks the bodies of `/v1/completions` and `/v1/chat/completions`.

Fields of OpenAI's and vLLM's servers are either supported or refused, never ignored.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax_kvpage.serving import SamplingParams

from .errors import ApiError
from .fields import Fields, check_text
from .limits import Limits

__all__ = ["Call", "Prompt", "parse_chat", "parse_completion"]

Prompt = str | list[int]

_MOST_STOPS = 16
_LONGEST_STOP = 1000
_MOST_STOP_IDS = 128
_MOST_PROMPTS = 1024
_LONGEST_SALT = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A checked body.

    Attributes:
      model: Name of the model.
      prompts: Texts or token ids; empty for a chat.
      messages: Messages of a chat; empty otherwise.
      template_values: More variables of the chat template.
      sampling: Arguments of `SamplingParams`, without max_tokens.
      max_tokens: The most tokens to generate; None for the default.
      stream: Whether to stream the response.
      include_usage: Whether the last chunk contains the usage.
      echo: Whether the text begins with the prompt.
      token_ids: Whether choices also contain the token ids.
      namespace: Namespace in the prefix cache.
      priority: Requests with lower numbers run first.
    """

    model: str
    prompts: Sequence[Prompt] = ()
    messages: Sequence[Mapping[str, str]] = ()
    template_values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any]
    max_tokens: int | None
    stream: bool
    include_usage: bool
    echo: bool = False
    token_ids: bool
    namespace: str | None
    priority: int

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat."""
        return bool(self.messages)

    def params(self, max_tokens: int) -> SamplingParams:
        """Makes the sampling parameters.

        Raises:
          ApiError: Values out of range.
        """
        try:
            return SamplingParams(**self.sampling, max_tokens=max_tokens)
        except ValueError as error:
            # The message lists "name is value, wanted ..." line by line.
            reason = str(error).split("\n  - ")[1]
            raise ApiError(reason, param=reason.split()[0], code="invalid_value") from error


def parse_completion(values: dict[str, Any], limits: Limits) -> Call:
    """Parses the body of `/v1/completions`.

    Raises:
      ApiError: The body is invalid or not supported.
    """
    fields = Fields(values)
    prompts = _prompts(fields.any("prompt"))
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs", high=limits.max_logprobs)
    if echo and logprobs is not None:
        raise fields.error(
            "echo", "the prompt has no logprobs on this server", "unsupported_parameter"
        )
    fields.expect("suffix", "")
    fields.expect("best_of", 1)
    common = _common(fields, limits, logprobs, fields.integer("max_tokens", low=1))
    return Call(prompts=prompts, echo=echo, **common)


def parse_chat(values: dict[str, Any], limits: Limits) -> Call:
    """Parses the body of `/v1/chat/completions`.

    Raises:
      ApiError: The body is invalid or not supported.
    """
    fields = Fields(values)
    messages = _messages(fields.any("messages"))
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", high=limits.max_logprobs)
    if top is not None and not wanted:
        raise fields.error("top_logprobs", "wanted logprobs to be true")
    first = fields.integer("max_completion_tokens", low=1)
    second = fields.integer("max_tokens", low=1)
    if first is not None and second is not None and first != second:
        raise fields.error("max_tokens", "it differs from max_completion_tokens")
    fields.expect("response_format", {"type": "text"})
    fields.expect("modalities", ["text"])
    fields.expect("tools", [])
    fields.expect("tool_choice", "none")
    template_values = fields.object("chat_template_kwargs")
    common = _common(fields, limits, (top or 0) if wanted else None, first or second)
    return Call(messages=messages, template_values=template_values, **common)


def _common(
    fields: Fields, limits: Limits, logprobs: int | None, max_tokens: int | None
) -> dict[str, Any]:
    """Parses the fields common to both, and refuses all that are left."""
    model = fields.string("model")
    if not model:
        raise fields.error("model", "wanted the name of a model", "missing_required_parameter")
    stream = fields.boolean("stream")
    options = Fields(fields.object("stream_options"), "stream_options.")
    include_usage = options.boolean("include_usage")
    options.finish()
    if include_usage and not stream:
        raise fields.error("stream_options", "wanted stream to be true")
    fields.expect("logit_bias", {})
    sampling = {
        "n": fields.integer("n", 1, low=1),
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": fields.integer("top_k", 0, low=-1),
        "min_p": fields.number("min_p", 0.0),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
        "seed": fields.integer("seed", high=2**32 - 1),
        "min_tokens": fields.integer("min_tokens", 0),
        "stop": _stops(fields.any("stop")),
        "stop_token_ids": _at_most(
            _ids(fields.any("stop_token_ids") or [], "stop_token_ids"),
            _MOST_STOP_IDS,
            "stop_token_ids",
        ),
        "ignore_eos": fields.boolean("ignore_eos"),
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output"),
        "logprobs": logprobs,
    }
    common = {
        "model": model,
        "sampling": sampling,
        "max_tokens": max_tokens,
        "stream": stream,
        "include_usage": include_usage,
        "token_ids": fields.boolean("return_token_ids"),
        "namespace": _at_most(fields.string("cache_salt"), _LONGEST_SALT, "cache_salt"),
        "priority": _priority(fields) if limits.priorities else 0,
    }
    fields.expect("priority", 0)
    fields.finish()
    return common


def _priority(fields: Fields) -> int:
    return fields.integer("priority", 0, low=-(2**31)) or 0


def _prompts(value: Any) -> list[Prompt]:
    """Parses a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [check_text(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise ApiError(
            "prompt: wanted a string, token ids, or a list of one or more of either",
            param="prompt",
            code="invalid_type" if value else "missing_required_parameter",
        )
    if isinstance(value[0], str | list):
        _at_most(value, _MOST_PROMPTS, "prompt")
        return [
            check_text(each, "prompt") if isinstance(each, str) else _ids(each, "prompt")
            for each in value
        ]
    return [_ids(value, "prompt")]


def _at_most(value: Any, most: int, param: str) -> Any:
    """Returns the value; raises ApiError if it is too long."""
    if value is not None and len(value) > most:
        raise ApiError(
            f"{param}: wanted a length of {most} at most, got {len(value)}",
            param=param,
            code="invalid_value",
        )
    return value


def _ids(value: Any, param: str) -> list[int]:
    """Checks token ids, but not whether they are in the model's vocabulary."""
    if not isinstance(value, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in value
    ):
        raise ApiError(f"{param}: wanted token ids", param=param, code="invalid_type")
    return value


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise ApiError("stop: wanted a string or strings", param="stop", code="invalid_type")
    if len(stops) > _MOST_STOPS or any(not 0 < len(text) <= _LONGEST_STOP for text in stops):
        raise ApiError(
            f"stop: wanted at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters",
            param="stop",
            code="invalid_value",
        )
    return [check_text(text, "stop") for text in stops]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ApiError(
            "messages: wanted a list of one or more messages",
            param="messages",
            code="invalid_type" if value else "missing_required_parameter",
        )
    return [_message(each, f"messages[{number}]") for number, each in enumerate(value)]


def _message(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ApiError(f"{path}: wanted an object", param=path, code="invalid_type")
    fields = Fields(value, f"{path}.")
    role = fields.string("role")
    if not role:
        raise fields.error("role", "wanted a string", "missing_required_parameter")
    message = {"role": role, "content": _content(fields.any("content"), f"{path}.content")}
    name = fields.string("name")
    if name is not None:
        message["name"] = name
    fields.finish()
    return message


def _content(value: Any, path: str) -> str:
    """Parses a text, or a list of text parts, which are joined."""
    if isinstance(value, str):
        return check_text(value, path)
    if not isinstance(value, list):
        raise ApiError(f"{path}: wanted a string", param=path, code="invalid_type")
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise ApiError(f"{path}: wanted text parts", param=path, code="invalid_type")
        fields = Fields(part, f"{path}.")
        fields.expect("type", "text")
        texts.append(fields.string("text") or "")
        fields.finish()
    return "".join(texts)
