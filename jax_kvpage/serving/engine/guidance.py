"""Constrained decoding with llguidance: computes which tokens a grammar allows next.

The host computes a vocabulary mask for each constrained sequence of a step, one bit per token, and
the device applies it before sampling. A mask depends on the newest token, so a step that samples
for such a sequence is read back before the next one is dispatched.
"""

import collections
import copy
import importlib
import json
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jax_kvpage.serving.params import SamplingParams
from jax_kvpage.serving.structured import StructuredOutputsParams

__all__ = ["Guidance", "Guide", "fill_masks"]

_MOST = 128  # compiled grammars to keep


class Guidance:
    """Compiles grammars for a tokenizer. Thread-safe.

    Args:
        tokenizer: see `Engine`.
        eos_token_ids: tokens that end an output; if empty, those of the tokenizer.

    Attributes:
        num_words: int32 words of a mask. The last word is 0 if the mask applies, else -1.

    Raises:
        ModuleNotFoundError: llguidance is not installed.
        ValueError: the tokenizer is not supported.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        try:
            self._library = importlib.import_module("llguidance")
        except ImportError as error:
            raise ModuleNotFoundError(
                "Engine: tokenizer: constrained decoding needs llguidance; "
                "pip install 'jax_kvpage[guided]'"
            ) from error
        self._tokenizer = self._wrap(tokenizer, list(eos_token_ids))
        self._eos = frozenset(eos_token_ids) | frozenset(self._tokenizer.eos_tokens)
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self.num_words = -(-self._tokenizer.vocab_size // 32) + 1

    def compile(self, wanted: StructuredOutputsParams) -> Any:
        """Returns a matcher at the start of a grammar; copy it before use.

        Raises:
            ValueError: the grammar is invalid or too complex.
        """
        try:
            grammar = self._grammar(wanted)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _refusal(f"{type(error).__name__}: {error}") from error
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
            if matcher is not None:
                self._compiled[grammar] = matcher
                return matcher
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > _MOST:
                self._compiled.popitem(last=False)
        return matcher

    def guide(self, params: SamplingParams) -> "Guide":
        """Returns a guide for a request with `structured_outputs`; raises like `compile`."""
        assert params.structured_outputs is not None
        matcher = self.compile(params.structured_outputs)
        words = self.num_words - 1
        never = _bits(self._eos if params.ignore_eos else (), words)
        stops = {*params.stop_token_ids, *self._eos}
        return Guide(matcher.deep_copy(), never, _bits(stops, words), params.min_tokens)

    def _wrap(self, tokenizer: Any, eos: list[int]) -> Any:
        """Wraps a tokenizer for the library."""
        if isinstance(tokenizer, self._library.LLTokenizer):
            return tokenizer
        if hasattr(tokenizer, "to_str"):  # a `tokenizers.Tokenizer`
            told = {**json.loads(tokenizer.to_str()), "padding": None, "truncation": None}
            tokenizer = json.dumps(told)
        try:
            return self._library.LLTokenizer(tokenizer, eos_token=eos or None)
        except Exception as error:  # the library raises several types
            raise ValueError(f"Engine: tokenizer: {error}") from error

    def _grammar(self, wanted: StructuredOutputsParams) -> str:
        library, matcher = self._library, self._library.LLMatcher
        if wanted.regex is not None:
            return matcher.grammar_from_regex(wanted.regex)
        if wanted.choice is not None:
            return library.grammar_from("choice", json.dumps(wanted.choice))
        if wanted.grammar is not None:
            return library.grammar_from("grammar", wanted.grammar)
        if wanted.structural_tag is not None:
            return self._structural(_parsed(wanted.structural_tag))
        schema = {"type": "object"} if wanted.json is None else _parsed(wanted.json)
        if wanted.disable_additional_properties:
            schema = copy.deepcopy(schema)
            _close(schema)
        options: dict[str, Any] = {"whitespace_flexible": not wanted.disable_any_whitespace}
        if wanted.whitespace_pattern is not None:
            options["whitespace_pattern"] = wanted.whitespace_pattern
        return matcher.grammar_from_json_schema(json.dumps(schema), defaults=options)

    def _structural(self, wanted: dict[str, Any]) -> str:
        tags = []
        for each in wanted["structures"]:
            begin = each["begin"]
            trigger = next((text for text in wanted["triggers"] if begin.startswith(text)), None)
            if not trigger:
                raise ValueError(f"no trigger begins {begin!r}")
            grammar = each.get("schema", {})
            tags.append(
                self._library.StructTag(
                    trigger=trigger, begin=begin, grammar=grammar, end=each["end"]
                )
            )
        return self._library.StructTag.to_grammar(tags)


class Guide:
    """The state of a sequence in its grammar.

    Args:
        matcher: llguidance matcher.
        never: int32[words]: tokens that masks always exclude.
        stops: int32[words]: tokens that are excluded before `min_tokens`.
        min_tokens: see `SamplingParams`.
    """

    def __init__(self, matcher: Any, never: np.ndarray, stops: np.ndarray, min_tokens: int) -> None:
        self._matcher = matcher
        self._never = never
        self._stops = stops
        self._min_tokens = min_tokens
        self._num_taken = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing but an end-of-sequence token can follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> "Guide":
        """Returns a copy in the same state."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def take(self, token: int) -> None:
        """Advances by one token.

        Raises:
            RuntimeError: the grammar does not allow the token (the model gave no allowed token any
                probability), or it has become too complex.
        """
        if not self._matcher.consume_token(token):
            reason = str(self._matcher.get_error()).splitlines()[0]
            raise RuntimeError(f"structured_outputs: {reason}")
        self._num_taken += 1

    def cut(self, guesses: list[int]) -> list[int]:
        """Returns the longest prefix of some tokens that the grammar allows."""
        return guesses[: self._matcher.validate_tokens(guesses)]

    def fill(self, masks: np.ndarray, guesses: Sequence[int]) -> None:
        """Writes the masks of the next tokens.

        Args:
            masks: int32[k, words + 1]: output, one mask more than there are guesses.
            guesses: tokens that `cut` has kept; mask i is for the token after the first i guesses.
        """
        taken = 0
        for place in range(len(guesses) + 1):
            words = masks[place, :-1]
            masks[place, -1] = 0
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._forbid(words, self._never)
            if self._num_taken + place < self._min_tokens:
                self._forbid(words, self._stops)
            taken += self._matcher.try_consume_tokens(list(guesses[place : place + 1]))
        if taken:
            self._matcher.rollback(taken)

    def _forbid(self, words: np.ndarray, tokens: np.ndarray) -> None:
        """Removes tokens from a mask, unless nothing would be left."""
        left = words & ~tokens
        if left.any():
            words[:] = left


def fill_masks(
    guided: Iterable[tuple[int, Guide, Sequence[int]]], size: int, each: int, num_words: int
) -> np.ndarray:
    """Returns the masks of a step, int32[size * each, num_words].

    Args:
        guided: positions in the step, their guides, and the tokens that they verify.
        size: sequences in the bucket.
        each: tokens sampled per sequence.
        num_words: see `Guidance`.
    """
    masks = np.full((size * each, num_words), -1, np.int32)
    for place, guide, guesses in guided:
        guide.fill(masks[place * each : (place + 1) * each], guesses)
    return masks


def _refusal(reason: str) -> ValueError:
    return ValueError(f"Engine.add_request: structured_outputs: {reason.strip()}")


def _bits(tokens: Iterable[int], num_words: int) -> np.ndarray:
    """int32[num_words] with the bits of tokens set."""
    bits = np.zeros(num_words * 32, bool)
    bits[[token for token in tokens if token < len(bits)]] = True
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _parsed(value: str | dict[str, Any]) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _close(schema: Any) -> None:
    """Forbids additional properties wherever the schema does not specify them."""
    if isinstance(schema, list):
        for part in schema:
            _close(part)
    elif isinstance(schema, dict):
        names = schema.get("properties")
        is_object = isinstance(names, dict) or schema.get("type") == "object"
        if is_object and not {"additionalProperties", "patternProperties"} & schema.keys():
            schema["additionalProperties"] = False
        for name, part in schema.items():
            if name not in ("const", "enum", "default", "examples"):
                _close(part)
