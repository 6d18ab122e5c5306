"""decode_llama.py --chat with a user at a terminal: Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import decode_llama
import pytest
from llama_models import UNTIED, write_checkpoint

_CTRL_C, _CTRL_D = "\x03", "\x04"
_SECONDS = 120


class _Terminal:
    """A process with its own terminal, and the text shown on it."""

    def __init__(self, *arguments: str) -> None:
        self._keys, theirs = pty.openpty()
        env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        env |= {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}
        # A session with this as its controlling terminal: Ctrl-C becomes a signal.
        start = (
            "import fcntl, os, signal, sys, termios; os.setsid(); "
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(pathlib.Path(decode_llama.__file__)), *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
        )
        os.close(theirs)
        self._unread = ""

    def press(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def press_until(self, keys: str, words: str) -> str:
        """Presses keys every second until `words` are shown. Python's readline may miss a signal
        that arrives after it has shown its prompt and before it waits for a key.
        """
        for _ in range(_SECONDS):
            self.press(keys)
            if self._wait(1):
                return self.read_until(words)
        raise AssertionError(f"{words!r} is not shown")

    def _wait(self, seconds: float) -> bool:
        """Returns whether anything but the pressed keys is shown within some seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self._keys], [], [], left)
            if not ready:
                return False
            try:
                self._unread += os.read(self._keys, 4096).decode(errors="replace")
            except OSError:  # the process has ended
                return True
            if self._unread.replace("^C", "").strip():
                return True
        return False

    def read_until(self, words: str) -> str:
        """Returns what is shown up to and including `words`."""
        deadline = time.monotonic() + _SECONDS
        while words not in self._unread:
            ready, _, _ = select.select([self._keys], [], [], deadline - time.monotonic())
            assert ready, f"{words!r} is not in {self._unread!r}"
            try:
                more = os.read(self._keys, 4096)
            except OSError:  # the process has ended
                more = b""
            assert more, f"{words!r} is not in {self._unread!r}"
            self._unread += more.decode(errors="replace")
        end = self._unread.index(words) + len(words)
        shown, self._unread = self._unread[:end], self._unread[end:]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)


@pytest.fixture
def terminal(tmp_path: pathlib.Path) -> Iterator[_Terminal]:
    write_checkpoint(tmp_path, UNTIED)
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    arguments = ["--checkpoint", str(tmp_path), "--chat", "--max-seq-len", "256"]
    opened = _Terminal(*arguments, "--max-new-tokens", "200")
    yield opened
    opened.close()


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(terminal: _Terminal) -> None:
    terminal.read_until("> ")
    terminal.press("hi\n")
    terminal.read_until("hi\r\n")
    time.sleep(0.3)  # the terminal shows the line before the program has it
    terminal.press(_CTRL_C)  # during the compilation of the model's first step
    assert "[cancelled]" in terminal.read_until("\n> ")
    terminal.press("and\n")
    terminal.read_until("[length]")  # the conversation continues
    terminal.read_until("> ")
    terminal.press(_CTRL_D)
    table = terminal.read_until("turn 2: tokens read / cached")
    assert "What it took" in table
    assert terminal.process.wait(_SECONDS) == 0


def test_ctrl_c_at_the_prompt_is_an_interrupt(terminal: _Terminal) -> None:
    terminal.read_until("> ")
    terminal.press_until(_CTRL_C, "decode_llama.py: interrupted")
    assert terminal.process.wait(_SECONDS) == 130


def test_ctrl_d_in_place_of_a_message(terminal: _Terminal) -> None:
    terminal.read_until("> ")
    terminal.press(_CTRL_D)
    assert terminal.process.wait(_SECONDS) == 0
