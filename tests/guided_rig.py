"""A tokenizer for the rig's vocabulary, and engines and parameters for constrained decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llguidance
import serving_rig as rig

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, SamplingParams, StructuredOutputsParams

_SINGLES = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,. -_+'
_LONGER = ["ab", "12", '":', '{"', "true", "false", "null", "é", "the", "00", '",', "<f", "x>"]


class Words:
    """A tokenizer for the rig's vocabulary; token 0 ends a text."""

    eos_token_id, bos_token_id, special_token_ids = 0, None, (0,)
    tokens = tuple(
        text.encode() for text in ["</s>", *_SINGLES, *_LONGER, "<", ">", "A"][: rig.VOCABULARY]
    )

    def __call__(self, text: bytes) -> list[int]:
        ids = []
        while text:
            best = max((t for t in self.tokens[1:] if text.startswith(t)), key=len)
            ids.append(self.tokens.index(best))
            text = text[len(best) :]
        return ids


def decode(ids: Sequence[int]) -> str:
    return b"".join(Words.tokens[i] for i in ids if i).decode(errors="replace")


def tokenizer() -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words()))


def guided_engine(pool: kvp.KVPool, **options: Any) -> Engine:
    config = rig.config(eos_token_ids=(0,), **options)
    return Engine(rig.step, rig.params(), pool, config, detokenize=decode, tokenizer=tokenizer())


def guided_params(**options: Any) -> SamplingParams:
    """Separates the options of the constraint from the others."""
    names = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
    names += ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
    wanted = {name: options.pop(name) for name in names if name in options}
    options.setdefault("max_tokens", 60)
    return SamplingParams(structured_outputs=StructuredOutputsParams(**wanted), **options)
