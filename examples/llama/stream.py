"""Streaming: turns ids into pieces of text, and prints those of several sequences in order."""

from .scan_runner import Request
from .tokenizer import Tokenizer, common_start

__all__ = ["Printer", "TextStream"]

_WINDOW = 48  # normal limit on the tokens decoded at a time
_KEPT = 16  # tokens of context that stay when the window is cut
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns ids that arrive one by one into pieces of text that add up to
    `Tokenizer.continuation`.

    The text of a token depends on its neighbours: it may be part of a character, and decoders treat
    the beginning of a text specially. Each step therefore decodes a window of tokens and returns
    the new text, except a U+FFFD at the end, which may be an incomplete character. The window grows
    until its older part can be cut off without changing the text of the rest.
    (`tokenizers.decoders.DecodeStream` works similarly, but fails on ids that are not valid UTF-8,
    and cannot return the text that it holds back at the end.)

    Args:
      tokenizer: The model's tokenizer.
      prompt_ids: The tokens before the first piece; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids)
        self._prompt: str | None = tokenizer.decode(prompt_ids)
        self._given = 0  # characters of the window's text that were already returned
        self._limit = _WINDOW
        self._text = self._prompt
        self._shrink()

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes, or "" if that is not certain yet."""
        self._window.append(token)
        self._text = self._tokenizer.decode(self._window)
        if self._tokenizer.rewrites:
            return ""
        certain = len(self._text) - self._text.endswith(_UNKNOWN)
        piece = self._give(certain)
        self._shrink()
        return piece

    def finish(self) -> str:
        """Returns the text held back at the end of the sequence."""
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        if self._prompt is not None:
            self._given = common_start(self._prompt, self._text)
        if end <= self._given:
            return ""
        piece = self._text[self._given : end]
        self._given, self._prompt = end, None
        return piece

    def _shrink(self) -> None:
        """Cuts off the older part of a long window, at a token where the rest decodes the same."""
        if len(self._window) <= self._limit or self._tokenizer.rewrites:
            return
        given = self._given
        if self._prompt is not None:
            given = common_start(self._prompt, self._text)
        for start in range(len(self._window) - _KEPT, len(self._window) - 2 * _KEPT, -1):
            rest = self._tokenizer.decode(self._window[start:])
            removed = len(self._text) - len(rest)
            # A text that begins with U+FFFD may begin inside a character.
            whole_character = rest and rest[0] != _UNKNOWN
            if whole_character and removed <= given and self._text.endswith(rest):
                self._window = self._window[start:]
                self._text, self._given = rest, self._given - removed
                self._prompt = None if self._prompt is None else self._prompt[removed:]
                self._limit = _WINDOW
                return
        self._limit *= 2  # for example in a long run of special tokens


class Printer:
    """Streams several sequences to standard output, one after the other: the first unfinished one
    is printed as its tokens arrive.

    Args:
      requests: The requests in the order to print, before any has run.
      leads: The text to print before each.
      tokenizer: The model's tokenizer.
    """

    def __init__(self, requests: list[Request], leads: list[str], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.start(requests, leads)

    def start(self, requests: list[Request], leads: list[str]) -> None:
        """Starts with new requests; all earlier ones must have finished."""
        self._requests, self._leads = requests, leads
        self._streams = [TextStream(self._tokenizer, request.prompt_ids) for request in requests]
        self._held = [""] * len(requests)
        self._front = -1
        self._next()

    def token(self, request: Request, token: int) -> None:
        """Handles one token; text of later sequences is held back."""
        self._show(request, self._streams[request.index].push(token))

    def finish(self, request: Request) -> None:
        """Handles the end of a sequence; if it was being printed, continues with the next."""
        self._show(request, self._streams[request.index].finish())
        while self._front < len(self._requests) and self._requests[self._front].finish_reason:
            self._write(f" [{self._requests[self._front].finish_reason}]\n\n")
            self._next()

    def _show(self, request: Request, piece: str) -> None:
        if request.index == self._front:
            self._write(piece)
        else:
            self._held[request.index] += piece

    def _next(self) -> None:
        self._front += 1
        if self._front < len(self._requests):
            self._write(f"{self._leads[self._front]}{self._held[self._front]}")

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
