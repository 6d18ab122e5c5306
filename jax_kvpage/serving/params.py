"""How a request is sampled and when it ends; parameter names follow vLLM."""

import dataclasses
import math

from jax_kvpage._values import as_tuple, is_integer, is_number, raise_all
from jax_kvpage.serving.structured import StructuredOutputsParams

__all__ = ["SamplingParams"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when its sequences end.

    Attributes:
        n: number of continuations; the prompt is computed once.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample only from the k most likely tokens; 0 or -1 for all.
        top_p: sample only from the smallest set of most likely tokens whose probabilities sum to at
            least p.
        min_p: sample only tokens at least this fraction as likely as the most likely one.
        presence_penalty: subtracted from the logits of tokens that occur in the output.
        frequency_penalty: subtracted once for each occurrence of the token in the output.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that
            the prompt or the output contains.
        seed: random seed, from 0 to 2**32 - 1; None lets the engine choose one. The random numbers
            of a token depend only on the seed, the index of the continuation and the position.
        max_tokens: maximum number of tokens to produce.
        min_tokens: minimum number of tokens to produce: before that, stop tokens are not sampled
            and stop strings are ignored.
        stop: strings that end the output and are left out of its text (needs a detokenizer); None
            for none.
        stop_token_ids: tokens that end the output; None for none.
        ignore_eos: continue after the engine's end-of-sequence tokens.
        include_stop_str_in_output: keep the stop string in the text.
        logprobs: also return the log probabilities of this many most likely tokens and of the
            chosen token, before penalties and temperature; 0 for the chosen token only, None for
            none.
        prompt_logprobs: the same for each prompt token except the first. The whole prompt is then
            computed, and other requests do not find it in the prefix cache.
        structured_outputs: constraint on the output (needs an engine with `tokenizer`). The output
            ends ("stop") when nothing may follow. Log probabilities are computed without the
            constraint.

    Raises:
        ValueError: values out of range; one error lists all of them.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else as_tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", as_tuple(self.stop_token_ids))
        reasons = self._reasons()
        raise_all("SamplingParams", reasons)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def _reasons(self) -> list[str]:
        """Reasons why the values are invalid."""
        reasons = []

        def want(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                reasons.append(f"{name} is {getattr(self, name)!r}, wanted {wanted}")

        def within(name: str, low: float, high: float) -> bool:
            value = getattr(self, name)
            return is_number(value) and math.isfinite(value) and low <= value <= high

        want(is_integer(self.n) and self.n >= 1, "n", "1 or more")
        want(within("temperature", 0, math.inf), "temperature", "0 (greedy) or more")
        want(is_integer(self.top_k) and self.top_k >= -1, "top_k", "0 or -1 (all), or more")
        want(within("top_p", 0, 1) and self.top_p > 0, "top_p", "above 0 and at most 1")
        want(within("min_p", 0, 1), "min_p", "from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            want(within(name, -2, 2), name, "from -2 to 2")
        positive = within("repetition_penalty", 0, math.inf) and self.repetition_penalty > 0
        want(positive, "repetition_penalty", "above 0")
        seeded = is_integer(self.seed) and 0 <= self.seed < 2**32
        want(self.seed is None or seeded, "seed", "None, or from 0 to 2**32 - 1")
        limited = is_integer(self.max_tokens) and self.max_tokens >= 1
        want(limited, "max_tokens", "1 or more")
        want(is_integer(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "0 or more")
        if limited and is_integer(self.min_tokens):
            most = f"at most max_tokens ({self.max_tokens})"
            want(self.min_tokens <= self.max_tokens, "min_tokens", most)
        texts = isinstance(self.stop, tuple) and all(
            isinstance(text, str) and text for text in self.stop
        )
        want(texts, "stop", "strings that are not empty")
        ids = isinstance(self.stop_token_ids, tuple) and all(
            is_integer(token) and 0 <= token < 2**31 for token in self.stop_token_ids
        )
        want(ids, "stop_token_ids", "token ids")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            want(isinstance(getattr(self, name), bool), name, "True or False")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            want(count is None or (is_integer(count) and count >= 0), name, "None, or 0 or more")
        known = isinstance(self.structured_outputs, StructuredOutputsParams | None)
        want(known, "structured_outputs", "StructuredOutputsParams, or None")
        return reasons
