"""README's examples run as printed; the first one generates the same as a NumPy model."""

import pathlib

import numpy as np
from markdown_code import python_blocks, run_page

README = pathlib.Path(__file__).parents[1] / "README.md"


def _logits(params: dict[str, np.ndarray], text: list[int], heads: int, kv: int) -> np.ndarray:
    """Returns the logits [tokens, vocabulary] of README's toy model for a whole text, in
    float64.
    """
    x = params["embed"][text]
    hidden = np.tri(len(text), dtype=bool)
    for qkv, out in zip(params["qkv"], params["out"], strict=True):
        q, k, v = np.split((x @ qkv).reshape(len(text), heads + 2 * kv, -1), (heads, heads + kv), 1)
        k, v = (np.repeat(y, heads // kv, axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(hidden, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(len(text), -1) @ out
    return x @ params["logits"]


def test_the_examples_run_as_printed() -> None:
    assert len(python_blocks(README)) == 2
    names = run_page(README)
    assert len(names["prompts"]) == 2
    params = {name: np.asarray(x, np.float64) for name, x in names["params"].items()}
    for prompt, text in zip(names["prompts"], names["generated"], strict=True):
        assert text[: len(prompt)] == prompt
        assert len(text) == len(prompt) + 10
        logits = _logits(params, text, names["HEADS"], names["KV_HEADS"])
        for end in range(len(prompt), len(text)):
            row = logits[end - 1]
            # bfloat16 may prefer a token that is equally good up to rounding.
            assert row[text[end]] > row.max() - 0.05 * row.std(), (end, text)
