"""Streaming text: decodes ids piece by piece, and prints several sequences on one terminal."""

import sys

from .generate import Request
from .tokenizer import Tokenizer

__all__ = ["Printer", "TextStream"]

_WINDOW = 8  # tokens of context that determine how the next one is decoded


class TextStream:
    """Turns ids that arrive one by one into pieces of text that add up to the whole.

    A token may be part of a character, and some decoders change a token by its predecessors.
    So a window of the last printed tokens is decoded with and without the new ones, and the
    difference is returned once it ends in a whole character.

    Args:
      tokenizer: Of the model.
      prompt_ids: Tokens before the first piece; not printed again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = prompt_ids[-_WINDOW:]
        self._printed = len(self._window)

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._printed])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._window = self._window[-_WINDOW:]
        self._printed = len(self._window)
        return after[len(before) :]


class Printer:
    """Streams several sequences to standard output: the first unfinished as it comes, then the
    next.

    Args:
      requests: In the order to print, before any has run.
      prompts: Their texts.
      tokenizer: Of the model.
    """

    def __init__(self, requests: list[Request], prompts: list[str], tokenizer: Tokenizer) -> None:
        self._requests, self._prompts = requests, prompts
        self._streams = [TextStream(tokenizer, request.prompt_ids) for request in requests]
        self._held = [""] * len(requests)
        self._front = -1
        self._next()

    def token(self, request: Request, token: int) -> None:
        """Takes one token; tokens of later sequences are held back."""
        piece = self._streams[request.index].push(token)
        if request.index == self._front:
            self._write(piece)
        else:
            self._held[request.index] += piece

    def finish(self, request: Request) -> None:
        """Takes the end of a sequence, and goes on to the next if it was the one being printed."""
        while self._front < len(self._requests) and self._requests[self._front].finish_reason:
            self._write(f" [{self._requests[self._front].finish_reason}]\n\n")
            self._next()

    def _next(self) -> None:
        self._front += 1
        if self._front < len(self._requests):
            self._write(f"> {self._prompts[self._front]}{self._held[self._front]}")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
