"""Incremental detokenization and stop strings."""

from collections.abc import Callable, Sequence

__all__ = ["Detokenize", "TextBuilder"]

Detokenize = Callable[[Sequence[int]], str]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 5  # tokens of the prompt that are decoded as context


class TextBuilder:
    """Decodes tokens as they arrive and searches their text for stop strings.

    The text of a token depends on its neighbours, so the newest tokens are decoded together with
    the preceding ones. A trailing U+FFFD is held back because it may be an incomplete character.

    Args:
        detokenize: converts token ids to text.
        prompt: tokens that precede the output.
        stop: strings that end the text.

    Attributes:
        text: the text without incomplete characters.
    """

    def __init__(self, detokenize: Detokenize, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenize = detokenize
        self._stop = tuple(stop)
        self._held = max((len(text) for text in self._stop), default=1) - 1
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._read = 0, len(self._ids)
        self.text = ""

    @property
    def shown(self) -> str:
        """The text without a trailing part that may turn out to begin a stop string."""
        return self.text[: max(len(self.text) - self._held, 0)]

    def push(self, token: int) -> None:
        """Adds a token."""
        self._ids.append(token)
        self._decode(final=False)

    def finish(self) -> None:
        """Adds text that was held back as incomplete."""
        self._decode(final=True)

    def find_stop(self, num_before: int) -> tuple[str, int] | None:
        """Finds the stop string that ends the text first.

        Args:
            num_before: characters known before; stop strings that lie entirely within them are
                ignored.

        Returns:
            (string, index of its first character), or None.
        """
        begins = [max(num_before - len(text) + 1, 0) for text in self._stop]
        found = [
            (self.text.find(text, begin), text)
            for text, begin in zip(self._stop, begins, strict=True)
        ]
        found = [(place, text) for place, text in found if place >= 0]
        if not found:
            return None
        place, text = min(found, key=lambda pair: pair[0] + len(pair[1]))
        return text, place

    def _decode(self, final: bool) -> None:
        before = self._detokenize(self._ids[self._begin : self._read])
        now = self._detokenize(self._ids[self._begin :])
        if final or (len(now) > len(before) and not now.endswith(_UNKNOWN)):
            self.text += now[len(before) :]
            self._begin, self._read = self._read, len(self._ids)
