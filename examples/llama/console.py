"""Input for an interactive chat: messages from a terminal or a pipe, and Ctrl-C."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from .prompts import InputError, valid_text

__all__ = ["Console"]


class Console:
    """Standard input, one message a line; blank lines are skipped.

    Args:
      json: Whether standard output is for JSON only, so that there is no prompt for messages.

    Attributes:
      interactive: Whether a user types the messages. Then the terminal echoes them, and Ctrl-C ends
        the answer instead of the program.
    """

    def __init__(self, json: bool) -> None:
        streams = (sys.stdin, sys.stdout)
        self.interactive = not json and all(stream and stream.isatty() for stream in streams)
        self._pressed = False

    def messages(self) -> Iterator[str]:
        """Yields the user's messages, up to the end of the file or Ctrl-D.

        Raises:
          InputError: A message that is not valid text, or a pipe or file without messages.
        """
        count = 0
        try:
            for line in self._lines():
                if line.strip():
                    count += 1
                    yield valid_text("the message", line)
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error}") from error
        if not count and not self.interactive:
            raise InputError(
                "--chat without --prompt reads messages from standard input, which has none"
            )

    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed since the latest message.

        A second Ctrl-C raises KeyboardInterrupt as usual. If the run is not interactive, the first
        one does.
        """
        return self._pressed

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            for line in sys.stdin or ():
                yield line.rstrip("\r\n")
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (editing and history for `input`)
        # Otherwise the caller handles it, or it is ignored.
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            while True:
                self._pressed = False
                try:
                    line = input("> ")
                except EOFError:
                    print()
                    return
                if ours:
                    signal.signal(signal.SIGINT, self._press)
                yield line
                if ours:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _press(self, *_: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
