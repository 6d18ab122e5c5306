"""Converts text to token ids and back with the checkpoint's `tokenizer.json`."""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

__all__ = ["Tokenizer", "TokenizerError", "common_start"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TokenizerError(ValueError):
    """A tokenizer that is missing, damaged, or does not match the model."""


class Tokenizer:
    """The tokenizer of the model directory `path`; ids must be below `vocab_size`.

    Attributes:
      rewrites: Whether a new token may change text far back, so that text cannot be streamed.

    Raises:
      TokenizerError: There is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, path: str | pathlib.Path, vocab_size: int) -> None:
        file = pathlib.Path(path) / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer.json in {path}; one with only a tokenizer.model can be converted "
                "with AutoTokenizer.from_pretrained(...).save_pretrained of transformers"
            )
        try:
            # Pass the contents, because the library only accepts UTF-8 paths.
            self._tokenizer = tokenizers.Tokenizer.from_buffer(file.read_bytes())
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer: {error}") from error
        # Some tokenizers pad or truncate by default.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._vocab_size = vocab_size
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}
        steps = list(_decoder_steps(json.loads(self._tokenizer.to_str())["decoder"]))
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self.rewrites = _rewrites(steps)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Encodes a prompt, with the special tokens that the tokenizer adds; without them
        (`special=False`), encodes a continuation of another text.

        Raises:
          TokenizerError: The text has no tokens, or an id for which the model has no embedding.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        if not ids:
            raise TokenizerError(f"the prompt {text!r} has no tokens")
        if max(ids) >= self._vocab_size:
            raise TokenizerError(
                f"tokenizer.json gives id {max(ids)}, but config.json has vocab_size "
                f"{self._vocab_size}: they do not belong together"
            )
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        Each byte that is not part of a character becomes U+FFFD, and so does an incomplete last
        character. (For a single invalid byte, the library would turn an entire run of byte tokens
        into U+FFFD, including complete characters.)
        """
        if self._byte_fallback:
            tokens = [self._tokenizer.id_to_token(token) for token in ids]
            kept = [token for token in tokens if token is not None and token not in self._special]
            mended = list(_mend_bytes(kept))
            if mended != kept:
                return str(self._tokenizer.decoder.decode(mended))
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def continuation(self, prompt_ids: list[int], output_ids: list[int]) -> str:
        """The text of the output after the prompt (some decoders drop a leading space)."""
        whole = self.decode(prompt_ids + output_ids)
        return whole[common_start(self.decode(prompt_ids), whole) :]


def common_start(prompt: str, whole: str) -> int:
    """The number of characters of `whole`, the text of prompt and output, that are the prompt's.

    That is all of the prompt's text, unless the output changes its end: by completing a character,
    or because the decoder treats the end of a text specially.
    """
    if whole.startswith(prompt):
        return len(prompt)
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((index for index, (left, right) in pairs if left != right), len(whole))


def _decoder_steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields the decoders of a tokenizer.json in the order in which they run."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_steps(part)
    else:
        yield decoder


def _rewrites(steps: list[dict[str, Any]]) -> bool:
    """Whether a decoder replaces patterns in the joined text, so that later text can change it.

    Before `Fuse` (or another decoder that joins the tokens), a replacement sees one token at a
    time. A replacement of a single character does not depend on later text either.
    """
    joined = False
    for step in steps:
        pattern = step.get("pattern", {})
        if joined and step["type"] == "Replace" and len(pattern.get("String", "..")) > 1:
            return True
        joined = joined or step["type"] in ("Fuse", "ByteLevel")
    return False


def _mend_bytes(tokens: list[str]) -> Iterator[str]:
    """Replaces byte tokens that do not form a character by U+FFFD."""
    run = b""
    for token in [*tokens, ""]:
        match = _BYTE.fullmatch(token)
        if match:
            run += bytes([int(match[1], 16)])
            continue
        position = 0
        while position < len(run):
            try:
                good, bad = len(run), 0
                run[position:].decode("utf-8")
            except UnicodeDecodeError as error:
                good, bad = position + error.start, error.end - error.start
            yield from (f"<0x{byte:02X}>" for byte in run[position:good])
            if bad:
                yield _UNKNOWN
            position = good + bad
        run = b""
        if token:
            yield token
