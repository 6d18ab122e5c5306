"""decode_llama.py and its environment: encodings, pipes, interrupts and files that cannot be
written. None of them causes a traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import signal
import subprocess
import sys
import types

import decode_llama
import pytest
from llama.arguments import InputError, make_parser
from llama.prompts import read_prompts
from llama_models import UNTIED, write_checkpoint

_EXAMPLE = pathlib.Path(decode_llama.__file__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, UNTIED)
    return path


def _options() -> list[argparse.Action]:
    return [action for action in make_parser()._actions if action.dest != "help"]


def test_help_describes_every_option_with_its_default() -> None:
    for action in _options():
        assert action.help, action.dest
        assert "(default: " in action.help, action.dest
    shown = make_parser(decode_llama.__doc__).format_help()
    for text in ("hf download", "quantized", "longrope", "Qwen3", "a bias of the output"):
        assert text in shown
    shown.encode("ascii")


def test_help_does_not_wait_for_jax() -> None:
    code = f"""
import runpy, sys
sys.argv = ["decode_llama.py", "--help"]
try:
    runpy.run_path({str(_EXAMPLE)!r}, run_name="__main__")
except SystemExit as error:
    assert error.code == 0
assert "jax" not in sys.modules
"""
    path = os.pathsep.join([str(_EXAMPLE.parent), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


def _prompts(file: pathlib.Path, content: bytes) -> list[str]:
    file.write_bytes(content)
    return read_prompts(argparse.Namespace(prompt=[], prompt_file=file))


def test_a_prompt_file_has_lines_and_nothing_else(tmp_path: pathlib.Path) -> None:
    """Only \\n and \\r\\n end a line; Python recognizes nine other line separators."""
    file = tmp_path / "prompts.txt"
    others = "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r"
    for separator in others:
        prompt = f"one{separator}two"
        assert _prompts(file, f"{prompt}\n{prompt}\r\n".encode()) == [prompt, prompt]
    assert _prompts(file, b"\xef\xbb\xbffirst\r\n\r\n \t\n last") == ["first", " last"]
    for content, message in (
        (b"\xff\xfeo\x00", "is not UTF-8"),
        (b"\xef\xbb\xbf\n\r\n", "holds no prompts"),
        (b"", "holds no prompts"),
    ):
        with pytest.raises(InputError, match=message):
            _prompts(file, content)
    with pytest.raises(InputError, match="Is a directory"):
        read_prompts(argparse.Namespace(prompt=[], prompt_file=tmp_path))


def test_prompts_of_undecodable_arguments() -> None:
    def read(argument: bytes) -> list[str]:
        prompt = argument.decode("ascii", "surrogateescape")  # what Python does in a C locale
        return read_prompts(argparse.Namespace(prompt=[prompt], prompt_file=None))

    assert read("日本語 é".encode()) == ["日本語 é"]
    for wrong in (b"a\xff", b"\xe6\x97", b"\xed\xa0\x80"):
        with pytest.raises(InputError, match=r"--prompt '.*' is not valid UTF-8"):
            read(wrong)
    with pytest.raises(InputError, match="is not valid UTF-8"):
        read_prompts(argparse.Namespace(prompt=["\ud800"], prompt_file=None))


def test_a_terminal_without_unicode(
    checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "日 é", "--max-new-tokens", "5"]
    assert decode_llama.main(arguments) == 0
    shown = stdout.buffer.getvalue().decode("ascii")
    assert shown.startswith("> \\u65e5 \\xe9")
    assert "What it took" in shown


def test_no_standard_output_at_all(
    checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "x", "--max-new-tokens", "1"]
    assert decode_llama.main(arguments) == 0
    assert capfd.readouterr() == ("", "")


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the single line on standard error."""
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("decode_llama.py: ")
    return shown


@pytest.mark.parametrize("json", [[], ["--json"]], ids=["text", "json"])
def test_a_pipe_without_reader_and_a_full_disk(
    json: list[str],
    checkpoint: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "x", "--max-new-tokens", "1", *json]
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor, status, message in (
        (writer, 141, "standard output was closed"),
        (full, 1, "No space left on device"),
    ):
        with os.fdopen(descriptor, "w") as stdout:  # closing it fails if it still has buffered text
            monkeypatch.setattr(sys, "stdout", stdout)
            assert decode_llama.main(arguments) == status
        assert message in _line(capsys)


def test_a_plot_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setitem(sys.modules, "llama.run", types.SimpleNamespace(run=run))
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for file in (folder, "/proc/memory.png", "/dev/null/memory.png", f"{'x' * 300}.png"):
        with pytest.raises(SystemExit) as caught:
            decode_llama.main(["--plot", str(file)])
        assert caught.value.code == 2
        assert "error: --plot" in _line(capsys)
    # The check creates nothing and changes nothing.
    kept = tmp_path / "kept.svg"
    kept.write_text("old")
    for file in (tmp_path / "new.png", kept):
        with pytest.raises(AssertionError, match="has begun"):
            decode_llama.main(["--plot", str(file)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "kept.svg"]
    assert kept.read_text() == "old"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 141, "standard output was closed"),
        (PermissionError(13, "Permission denied", "weights"), 2, "Permission denied: 'weights'"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (ModuleNotFoundError("No module named 'rich'"), 1, "pip install '.[examples]'"),
        (InputError("two\nlines"), 2, "error: two lines"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_run_is_one_line(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "llama.run", types.SimpleNamespace(run=run))
    assert decode_llama.main([]) == status
    assert message in _line(capsys)


def _environment(*folders: pathlib.Path) -> dict[str, str]:
    """Returns an environment for the script, with `folders` ahead of the installed packages."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return env | {"PYTHONPATH": os.pathsep.join([*map(str, folders), *sys.path])}


# Runs its arguments with the default SIGINT handler: a shell's background jobs ignore SIGINT.
_INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])",
)


def test_an_interrupt_while_jax_is_imported(tmp_path: pathlib.Path) -> None:
    """Extension modules turn KeyboardInterrupt into an ImportError."""
    (tmp_path / "jax.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.sigtimedwait([], 30)\n"
        "except KeyboardInterrupt:\n"
        "    raise ImportError('cannot initialize the extension') from None\n"
    )
    done = subprocess.run(
        [*_INTERRUPTIBLE, sys.executable, str(_EXAMPLE)],
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "decode_llama.py: interrupted\n")


def test_an_interrupt_and_a_closed_pipe_of_a_process(checkpoint: pathlib.Path) -> None:
    """Real signals and pipes, also while Python exits."""
    env = _environment()
    command = [*_INTERRUPTIBLE, sys.executable, str(_EXAMPLE)]
    command += ["--checkpoint", str(checkpoint), "--prompt", "x"]
    processes = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    interrupted, piped = processes
    piped.stdout.close()
    assert interrupted.stdout.read(1) == ">"
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.communicate(timeout=120)[1] == "decode_llama.py: interrupted\n"
    assert interrupted.returncode == 130
    assert piped.stderr.read() == "decode_llama.py: standard output was closed\n"
    piped.stderr.close()
    assert piped.wait(timeout=120) == 141
