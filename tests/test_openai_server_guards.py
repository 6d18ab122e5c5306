"""examples/serve_openai.py: checks made before a request is read, and what errors reveal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import serve_openai
from llama.tokenizer import TokenizerError
from openai_server.guards import allowed_hosts
from openai_server.limits import Limits
from openai_server.model import ServedModel
from server_rig import MODEL, RunningServer, add_template, serve, wait_until

_LIMITS = Limits(max_requests=2, max_logprobs=5)
_BODY: dict[str, Any] = {"model": MODEL, "prompt": "A class", "max_tokens": 2}
_CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "A"}],
    "max_tokens": 2,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(add_template(tmp_path_factory.mktemp(MODEL)), _LIMITS) as running:
        yield running


@contextlib.contextmanager
def _unfinished(server: RunningServer) -> Iterator[socket.socket]:
    """A request whose body never ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        yield connection


def test_requests_count_before_their_bodies_are_read(server) -> None:
    with _unfinished(server), _unfinished(server):
        wait_until(lambda: server.post("/v1/completions", b"no JSON").status_code == 429)
    wait_until(lambda: server.post("/v1/completions", _BODY).status_code == 200)


def test_a_body_has_to_arrive_in_time(server, monkeypatch) -> None:
    limits = dataclasses.replace(_LIMITS, body_seconds=0.2)
    monkeypatch.setattr(server.service, "limits", limits)
    with _unfinished(server) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert server.post("/v1/completions", _BODY).status_code == 200


@pytest.mark.parametrize("part", ["render", "encode"])
def test_slow_prompts_do_not_stop_the_event_loop(server, monkeypatch, part: str) -> None:
    go_on, began = threading.Event(), threading.Event()
    model = server.service.model
    owner: Any = model.template if part == "render" else model.tokenizer
    original = getattr(owner, part)

    def slow(*args: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(60)
        return original(*args, **options)

    monkeypatch.setattr(owner, part, slow)
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(server.post("/v1/chat/completions", _CHAT).status_code)
    )
    thread.start()
    try:
        assert began.wait(60)
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
        ids = {**_BODY, "prompt": [5, 6, 7]}
        assert server.post("/v1/completions", ids).status_code == 200
    finally:
        go_on.set()
        thread.join(60)
    assert statuses == [200]


def test_threads_for_prompts_are_few(server) -> None:
    """At most two prompts are prepared at a time, however many requests come."""
    running, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 2:
                full.set()
        assert full.wait(60)
        with lock:
            running -= 1

    async def many() -> None:
        await asyncio.gather(*(server.service.in_thread(work) for _ in range(20)))

    asyncio.run(many())
    assert most == 2


def test_priority_is_for_servers_that_allow_it(server, monkeypatch) -> None:
    response = server.post("/v1/completions", {**_BODY, "priority": -5})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"
    assert server.post("/v1/completions", {**_BODY, "priority": 0}).status_code == 200
    seen = []
    original = server.service._engine.stream

    def stream(*args: Any, **options: Any) -> Any:
        seen.append(options["priority"])
        return original(*args, **options)

    monkeypatch.setattr(server.service._engine, "stream", stream)
    monkeypatch.setattr(server.service, "limits", dataclasses.replace(_LIMITS, priorities=True))
    for path, body in (("completions", _BODY), ("chat/completions", _CHAT)):
        assert server.post(f"/v1/{path}", {**body, "priority": -5}).status_code == 200
    assert seen == [-5, -5]


def test_errors_of_templates_show_no_paths(server, monkeypatch, caplog) -> None:
    forbidden = {**_CHAT, "messages": [{"role": "forbidden", "content": "x"}]}
    error = server.post("/v1/chat/completions", forbidden).json()["error"]
    assert error["message"] == "the chat template refuses the messages: no such role"
    monkeypatch.setattr(server.service.model.template, "_template", _Failing())
    error = server.post("/v1/chat/completions", _CHAT).json()["error"]
    assert error["message"] == "the chat template cannot render the messages"
    assert "/secret/path" in caplog.text, "the operator sees it"
    assert "chat_template.jinja" in caplog.text


def test_templates_may_add_what_is_no_text(server, monkeypatch) -> None:
    monkeypatch.setattr(server.service.model.template, "render", lambda *_, **__: "a \ud800")
    answer = server.post("/v1/chat/completions", _CHAT)
    assert answer.status_code == 400
    assert "half of a surrogate pair" in answer.json()["error"]["message"]


def test_a_request_that_ends_by_itself_keeps_no_other_from_ending(server, monkeypatch) -> None:
    ended = []

    class Scope:
        def __init__(self, expiring: bool) -> None:
            self.expiring = expiring

        def reschedule(self, when: float) -> None:
            if self.expiring:  # what asyncio.Timeout does
                raise RuntimeError("Cannot change state of expiring Timeout")
            ended.append(when)

    async def end() -> None:
        server.service.end()

    for name in ("_stopping", "_ending"):
        monkeypatch.setattr(server.service, name, False)
    monkeypatch.setattr(server.service, "_scopes", [Scope(True), Scope(False)])
    asyncio.run(end())
    assert len(ended) == 1


class _Failing:
    def render(self, **values: Any) -> str:
        raise OSError("/secret/path")


def test_errors_of_the_engine_show_no_exceptions(server, monkeypatch, caplog) -> None:
    original = server.loaded.engine._carry_out

    def fail(*args: Any) -> Any:
        monkeypatch.setattr(server.loaded.engine, "_carry_out", original)
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.loaded.engine, "_carry_out", fail)
    response = server.post("/v1/completions", _BODY)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the request has failed"
    assert "/secret/path" in caplog.text
    assert server.post("/v1/completions", _BODY).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:1234", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_other_hosts_are_refused_on_localhost(server, host: str, status: int) -> None:
    for path in ("/v1/models", "/metrics"):
        response = httpx.get(server.url + path, headers={"Host": host})
        assert response.status_code == status
        if status != 200:
            assert response.json()["error"]["code"] == "invalid_host"


def test_names_that_a_server_has() -> None:
    assert allowed_hosts("0.0.0.0") is None
    assert allowed_hosts("192.0.2.1") is None
    local = {"localhost", "127.0.0.1", "[::1]"}
    assert allowed_hosts("::1") == local
    assert allowed_hosts("127.0.0.2") == local | {"127.0.0.2"}
    assert allowed_hosts("192.0.2.1", ["Box.local"]) == local | {"192.0.2.1", "box.local"}
    assert allowed_hosts("fe80::1%eth0", ["x"]) == local | {"[fe80::1]", "x"}


@pytest.mark.parametrize(
    ("option", "value"), [("--timeout", "0"), ("--body-timeout", "0"), ("--timeout", "nan")]
)
def test_no_time_at_all_is_refused(option: str, value: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        serve_openai.main([option, value])
    assert caught.value.code == 2
    assert f"argument {option}: must be" in capsys.readouterr().err


_TEMPLATE = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("config", "is_chat"),
    [
        (None, False),
        ({}, False),
        ({"chat_template": None}, False),
        ({"other": {"chat_template": _TEMPLATE}}, False),
        ([], False),
        ({"chat_template": []}, False),
        ({"chat_template": [{"name": "tool_use", "template": _TEMPLATE}]}, False),
        ({"chat_template": _TEMPLATE}, True),
        ({"chat_template": [{"name": "default", "template": _TEMPLATE}]}, True),
    ],
)
def test_where_a_template_is_found(tmp_path: pathlib.Path, config: Any, is_chat: bool) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ServedModel.find_template(tmp_path)
    assert (template is not None) == is_chat
    if template is not None:
        assert template.render([{"role": "user", "content": "hello"}]) == "hello"


@pytest.mark.parametrize(
    "text",
    ['{"chat_template": 3}', '{"chat_template": "{% if"}', "{", "[" * 100_000],
)
def test_templates_that_are_not_valid(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        ServedModel.find_template(tmp_path)
