"""examples/serve_openai.py as a process: startup, shutdown by SIGTERM, and invalid options."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import openai
import pytest
import serve_openai

_SCRIPT = pathlib.Path(serve_openai.__file__)
# One step shape, so that little is compiled.
_SMALL = ["--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--max-logprobs", "1"]


@contextlib.contextmanager
def _start(*options: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """Starts a server process on a free port; yields it and a client."""
    process = subprocess.Popen(
        [sys.executable, str(_SCRIPT), "--port", "0", *_SMALL, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(120, process.kill)  # ends the wait for a line that never comes
    timer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving tiny_llama at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, process.communicate(timeout=60))
        url = f"{found[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as client:
            yield process, client
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def _stream(client: openai.OpenAI) -> openai.Stream[openai.types.Completion]:
    return client.completions.create(
        model="tiny_llama",
        prompt="A class",
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_sigterm_lets_requests_finish() -> None:
    with _start("--shutdown-timeout", "60") as (process, client):
        chunks = _stream(client)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        *_, last = chunks
        assert last.choices[0].finish_reason == "length"
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_sigterm_ends_requests_after_a_time() -> None:
    with _start("--shutdown-timeout", "0.1") as (process, client):
        chunks = _stream(client)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "/absent"], "absent"),
        (["--capacity", "much"], "much"),
        (["--api-key", ""], "--api-key"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys) -> None:
    assert serve_openai.main(options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("serve_openai.py: error:")
    assert message in err
    assert not out


def test_a_port_in_use_is_told_before_the_model_loads(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve_openai.main(["--port", str(port), "--checkpoint", "/absent"]) == 2
    assert f"port {port}: Address already in use" in capsys.readouterr().err
