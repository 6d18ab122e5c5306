"""examples/serve_openai.py: limits, keys, clients that disconnect, and malformed bodies."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from covering import num_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_server.limits import Limits
from server_rig import MODEL, RunningServer, add_template, serve, wait_until

_KEY = "secret"
_LIMITS = Limits(max_body_bytes=20_000, max_requests=3, max_logprobs=5, seconds=20)
_LONG: dict[str, Any] = {"model": MODEL, "prompt": "A", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(add_template(tmp_path_factory.mktemp(MODEL)), _LIMITS, key=_KEY) as running:
        yield running


def _error(response: httpx.Response) -> dict[str, Any]:
    """Returns the error of a response, which must have OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def _works(server: RunningServer) -> None:
    """Asserts that a request is served."""
    body = {"model": MODEL, "prompt": "A class", "max_tokens": 2}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] >= 1


def _raw(
    server: RunningServer, body: dict[str, Any], path: str = "/v1/completions"
) -> socket.socket:
    """Opens a connection and sends a request on it."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {_KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", f"Basic {_KEY}", _KEY])
def test_a_key_is_required(server, header) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/models", "/v1/completions", "/v1/chat/completions"):
        response = httpx.request("POST", server.url + path, headers=headers)
        assert response.status_code == 401
        assert _error(response)["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError), server.client(api_key="wrong") as client:
        client.models.list()
    assert httpx.get(server.url + "/health").status_code == 200


def test_large_bodies_are_refused(server) -> None:
    body = {"model": MODEL, "prompt": "x" * 30_000}
    response = server.post("/v1/completions", body)
    assert response.status_code == 413
    assert _error(response)["code"] == "request_too_large"

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 1000

    with httpx.Client(timeout=60) as client:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {_KEY}"}
        response = client.post(server.url + "/v1/completions", content=chunks(), headers=headers)
    assert response.status_code == 413
    _works(server)


def test_other_content_types_methods_and_paths(server) -> None:
    response = server.post("/v1/completions", b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert _error(response)
    headers = {"Authorization": f"Bearer {_KEY}"}
    for path, status in (("/v1/completions", 405), ("/v1/nothing", 404)):
        response = httpx.get(server.url + path, headers=headers)
        assert response.status_code == status
        assert _error(response)


def test_too_many_requests(server) -> None:
    with _raw(server, {**_LONG, "prompt": ["A", "B"], "stream": True}) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        response = server.post("/v1/completions", {**_LONG, "prompt": ["A", "B"]})
        assert response.status_code == 429
        assert _error(response)["type"] == "rate_limit_error"
        assert int(response.headers["Retry-After"]) > 0
        _works(server)  # one more is allowed
    wait_until(server.is_idle)
    response = server.post("/v1/completions", {**_LONG, "prompt": ["A"] * 4})
    assert response.status_code == 400
    assert _error(response)["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_cancels_its_request(server, stream: bool) -> None:
    aborted = server.metrics()["vllm:request_success_total", "abort"]
    with _raw(server, {**_LONG, "n": 4, "stream": stream}) as connection:
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        else:
            wait_until(lambda: not server.is_idle())
    wait_until(server.is_idle)
    wait_until(lambda: server.metrics()["vllm:request_success_total", "abort"] == aborted + 1)
    with server.client() as client:  # also with OpenAI's client
        stream_of_chunks = client.completions.create(
            model=MODEL, prompt="A", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream_of_chunks)
        stream_of_chunks.close()
    wait_until(server.is_idle)
    _works(server)


def test_requests_and_vanishing_clients_leave_nothing_open(server) -> None:
    """Many threads send requests of several kinds; each is answered or refused."""
    count, num_threads = num_cases(60, 10_000), 8
    answered: list[int] = []
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {_KEY}"}

    def send(begin: int) -> None:
        def post(content: bytes) -> int:
            url = server.url + "/v1/completions"
            return client.post(url, content=content, headers=headers).status_code

        short = json.dumps({**_LONG, "max_tokens": 2}).encode()
        kinds = (
            lambda: post(short),
            lambda: post(b'{"model"'),
            lambda: _raw(server, _LONG).close() or 0,
            lambda: _raw(server, {**_LONG, "stream": True}).close() or 0,
        )
        # One client per thread: creating one takes longer than a request.
        with httpx.Client(timeout=60) as client:
            for number in range(begin, count, num_threads):
                answered.append(kinds[(number // num_threads + number) % 4]())

    before = _open_files(server)
    threads = [threading.Thread(target=send, args=(begin,)) for begin in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answered) == count
    assert set(answered) <= {0, 200, 400, 429}
    assert {0, 200, 400} <= set(answered)
    wait_until(server.is_idle)
    _works(server)
    wait_until(lambda: _open_files(server) <= before)


def test_the_time_of_a_request_is_limited(server, monkeypatch) -> None:
    monkeypatch.setattr(server.service, "limits", dataclasses.replace(_LIMITS, seconds=0.2))
    response = server.post("/v1/completions", {**_LONG, "n": 4})
    assert response.status_code == 504
    assert _error(response)["code"] == "timeout"
    wait_until(server.is_idle)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = f"Authorization: Bearer {_KEY}\r\nContent-Type: application/json\r\n"
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n{head}\r\n"
        )
        connection.sendall(head.encode() + b"{")  # the rest of the body never comes
        assert connection.recv(1000).startswith(b"HTTP/1.1 504")
    with server.client() as client, pytest.raises(openai.APIError, match="seconds"):
        for _ in client.completions.create(
            model=MODEL,
            prompt="A",
            max_tokens=500,
            n=4,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            pass


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["role", "content", "type"]), inner)
    ),
    max_leaves=5,
)
_FIELDS = st.sampled_from(
    [
        "model", "prompt", "messages", "n", "stop", "logprobs", "top_logprobs", "temperature",
        "top_p", "top_k", "min_p", "seed", "stream", "stream_options", "max_tokens", "min_tokens",
        "presence_penalty", "repetition_penalty", "stop_token_ids", "logit_bias", "best_of", "echo",
        "suffix", "cache_salt", "priority", "tools", "response_format", "chat_template_kwargs",
    ]
)  # fmt: skip
_BODIES = st.one_of(
    st.binary(max_size=64),
    _JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"", b"[" * 5000, b'{"a":' * 3000, b"1" * 5000, b'{"model": NaN}']),
    # A valid request in which one or more fields get arbitrary values.
    st.dictionaries(_FIELDS, _JSON, min_size=1, max_size=3).map(
        lambda fields: json.dumps(
            {"model": MODEL, "prompt": "A", "max_tokens": 2} | fields
        ).encode()
    ),
)


def test_malformed_bodies_are_answered(server) -> None:
    """Never 5xx: what the schema allows is served; anything else is a 4xx with OpenAI's error
    form.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {_KEY}"}
    refused = 0

    @settings(
        max_examples=num_cases(100, 5000), suppress_health_check=list(HealthCheck), database=None
    )
    @given(body=_BODIES, path=st.sampled_from(["completions", "chat/completions"]))
    def check(body: bytes, path: str) -> None:
        nonlocal refused
        response = client.post(f"{server.url}/v1/{path}", content=body, headers=headers)
        if response.status_code == 200:
            assert b'"model"' in body
            return
        refused += 1
        assert 400 <= response.status_code < 500, (body, response.text)
        assert _error(response)["type"] == "invalid_request_error"

    before = _open_files(server)
    with httpx.Client(timeout=60) as client:
        check()
    assert refused > 50
    wait_until(server.is_idle)
    assert httpx.get(server.url + "/health").status_code == 200
    _works(server)
    wait_until(lambda: _open_files(server) <= before)


def _open_files(server: RunningServer) -> int:
    """Returns the number of this process's file descriptors once no request is active."""
    wait_until(server.is_idle)
    time.sleep(0.05)
    return len(os.listdir("/proc/self/fd"))
