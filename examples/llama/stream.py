"""Streaming: ids become pieces of text, and the pieces of several sequences share one terminal."""

from .generate import Request
from .tokenizer import Tokenizer, common_start

__all__ = ["Printer", "TextStream"]

_WINDOW = 48  # tokens decoded in a step at most, as a rule
_KEPT = 16  # tokens of context left when the window is cut
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns ids that arrive one by one into pieces of text that add up to
    `Tokenizer.continuation`.

    The text of a token depends on its neighbours: it may be part of a character, and decoders treat
    the beginning of a text in a special way. So each step decodes a window of tokens, and gives out
    what is new, except a U+FFFD at its end: it may be a character that is not complete yet. The
    window grows until its older part can be cut off without a change to the text of the rest.
    (`tokenizers.decoders.DecodeStream` follows the same idea, but it fails on ids that are not
    valid UTF-8, and has no way to get at the text that it holds back at the end.)

    Args:
      tokenizer: Of the model.
      prompt_ids: The tokens before the first piece; their text is not given out again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids)
        self._prompt: str | None = tokenizer.decode(prompt_ids)
        self._given = 0  # characters of the window's text that need not be given out any more
        self._limit = _WINDOW
        self._text = self._prompt
        self._shrink()

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while nothing is certain."""
        self._window.append(token)
        self._text = self._tokenizer.decode(self._window)
        if self._tokenizer.rewrites:
            return ""
        certain = len(self._text) - self._text.endswith(_UNKNOWN)
        piece = self._give(certain)
        self._shrink()
        return piece

    def finish(self) -> str:
        """The text that has been held back, at the end of the sequence."""
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
        """Cuts off the older part of a long window, at a token where the rest decodes alike."""
        if len(self._window) <= self._limit or self._tokenizer.rewrites:
            return
        given = self._given
        if self._prompt is not None:
            given = common_start(self._prompt, self._text)
        for start in range(len(self._window) - _KEPT, len(self._window) - 2 * _KEPT, -1):
            rest = self._tokenizer.decode(self._window[start:])
            removed = len(self._text) - len(rest)
            # One that begins with U+FFFD may begin inside a character.
            whole_character = rest and rest[0] != _UNKNOWN
            if whole_character and removed <= given and self._text.endswith(rest):
                self._window = self._window[start:]
                self._text, self._given = rest, self._given - removed
                self._prompt = None if self._prompt is None else self._prompt[removed:]
                self._limit = _WINDOW
                return
        self._limit *= 2  # such as for a long run of special tokens


class Printer:
    """Streams several sequences to standard output: the first unfinished as it comes, then the
    next.

    Args:
      requests: In the order to print, before any has run.
      leads: What is printed in front of each.
      tokenizer: Of the model.
    """

    def __init__(self, requests: list[Request], leads: list[str], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.start(requests, leads)

    def start(self, requests: list[Request], leads: list[str]) -> None:
        """Goes on with other requests, when all of those before have finished."""
        self._requests, self._leads = requests, leads
        self._streams = [TextStream(self._tokenizer, request.prompt_ids) for request in requests]
        self._held = [""] * len(requests)
        self._front = -1
        self._next()

    def token(self, request: Request, token: int) -> None:
        """Takes one token; what belongs to a later sequence is held back."""
        self._show(request, self._streams[request.index].push(token))

    def finish(self, request: Request) -> None:
        """Takes the end of a sequence, and goes on to the next if it was the one being printed."""
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
