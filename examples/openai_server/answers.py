"""Converts outputs of the engine to OpenAI's objects: complete responses and stream chunks."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_kvpage.serving import CompletionOutput, Logprob, RequestOutput

from .calls import Call

__all__ = ["Answer", "finish_reason"]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_REASONS = {"capacity": "length"}  # out of memory: for the client this is a length limit


def finish_reason(reason: str | None) -> str | None:
    """Converts a finish reason of the engine to OpenAI's."""
    return None if reason is None else _REASONS.get(reason, reason)


@dataclasses.dataclass
class _Sent:
    """How much of a choice was already sent to the client."""

    characters: int = 0
    tokens: int = 0
    offset: int = 0  # of the next token in the text, for logprobs


class Answer:
    """Makes the objects of one response.

    Args:
      call: The request.
      decode: Converts token ids to text.
      echoes: Texts of the prompts, to be put before the text of choices.
    """

    def __init__(
        self, call: Call, decode: Callable[[Sequence[int]], str], echoes: Sequence[str]
    ) -> None:
        self._call = call
        self._decode = decode
        self._echoes = echoes
        self._sent: dict[int, _Sent] = {}
        kind = "chat.completion" if call.is_chat else "text_completion"
        chunk = call.is_chat and call.stream
        self._head = {
            "id": ("chatcmpl-" if call.is_chat else "cmpl-") + secrets.token_hex(12),
            "object": kind + (".chunk" if chunk else ""),
            "created": int(time.time()),
            "model": call.model,
        }
        # If the last chunk contains the usage, all others have the field too.
        self._no_usage = {"usage": None} if call.include_usage else {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response to a request without streaming."""
        choices = [
            self._choice(number, output, each)
            for number, output in enumerate(outputs)
            for each in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": _usage(outputs)}

    def pieces(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The new part of a prompt's output, as chunks; there may be none."""
        chunks = []
        for each in output.outputs:
            sent = self._state(number, each)
            is_news = len(each.token_ids) > sent.tokens or each.finish_reason is not None
            if sent.tokens < 0 or not is_news:
                continue
            if self._call.is_chat and sent.tokens == 0:
                chunks.append(self._chunk(self._role(number, each)))
            chunks.append(self._chunk(self._choice(number, output, each)))
            if each.finish_reason is not None:
                sent.tokens = -1  # nothing follows
        return chunks

    def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The last chunk of a stream with usage."""
        return {**self._head, "choices": [], "usage": _usage(outputs)}

    def _chunk(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head, **self._no_usage, "choices": [choice]}

    def _role(self, number: int, output: CompletionOutput) -> dict[str, Any]:
        """The first choice of a chat stream."""
        return {
            "index": self._index(number, output),
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def _index(self, number: int, output: CompletionOutput) -> int:
        return number * int(self._call.sampling["n"]) + output.index

    def _state(self, number: int, output: CompletionOutput) -> _Sent:
        return self._sent.setdefault(self._index(number, output), _Sent())

    def _choice(self, number: int, output: RequestOutput, each: CompletionOutput) -> dict[str, Any]:
        """A choice with everything that was not sent yet."""
        sent = self._state(number, each)
        text = each.text[sent.characters :]
        tokens = slice(sent.tokens, len(each.token_ids))
        is_first = sent.tokens == 0
        if self._call.echo and is_first:
            text = self._echoes[number] + text
            sent.offset = len(self._echoes[number])
        choice: dict[str, Any] = {
            "index": self._index(number, each),
            "logprobs": self._logprobs(sent, each, tokens),
            "finish_reason": finish_reason(each.finish_reason),
            "stop_reason": each.stop_reason,
        }
        sent.characters, sent.tokens = len(each.text), len(each.token_ids)
        if self._call.token_ids:
            choice["token_ids"] = each.token_ids[tokens]
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if not self._call.is_chat:
            choice["text"] = text
        elif self._call.stream:
            choice["delta"] = {"content": text}
        else:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        return choice

    def _logprobs(
        self, sent: _Sent, output: CompletionOutput, tokens: slice
    ) -> dict[str, Any] | None:
        if output.logprobs is None:
            return None
        pairs = list(zip(output.token_ids[tokens], output.logprobs[tokens], strict=True))
        top = int(self._call.sampling["logprobs"])
        if self._call.is_chat:
            return {"content": [self._entry(*pair, top) for pair in pairs], "refusal": None}
        texts = [self._decode([token]) for token, _ in pairs]
        offsets = []
        for text in texts:
            offsets.append(sent.offset)
            sent.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [found[token].logprob for token, found in pairs],
            "top_logprobs": [self._top(found, top) for _, found in pairs] if top else None,
            "text_offset": offsets,
        }

    def _top(self, found: Mapping[int, Logprob], top: int) -> dict[str, float]:
        """Logprobs by token text. If several tokens have the same text, the most likely one's."""
        texts: dict[str, float] = {}
        for token, logprob in _ranked(found, top):
            texts.setdefault(self._decode([token]), logprob.logprob)
        return texts

    def _entry(self, token: int, found: Mapping[int, Logprob], top: int) -> dict[str, Any]:
        """The entry of a token in a chat, with its most likely alternatives."""
        alternatives = [self._token(*pair) for pair in _ranked(found, top)]
        return {**self._token(token, found[token]), "top_logprobs": alternatives}

    def _token(self, token: int, logprob: Logprob) -> dict[str, Any]:
        text = self._decode([token])
        # The bytes of a partial character cannot be derived from its text.
        encoded = None if _UNKNOWN in text else list(text.encode())
        return {"token": text, "logprob": logprob.logprob, "bytes": encoded}


def _ranked(found: Mapping[int, Logprob], top: int) -> list[tuple[int, Logprob]]:
    pairs = sorted(found.items(), key=lambda pair: pair[1].rank)
    return [pair for pair in pairs if pair[1].rank <= top]


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    # After a preemption, a prompt may be found in the cache again.
    cached = sum(
        min(output.metrics.num_cached_tokens, len(output.prompt_token_ids)) for output in outputs
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
