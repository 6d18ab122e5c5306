"""The example server in a thread, with the shipped model and a chat template, for its tests."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
from llama.arguments import BUNDLED
from openai_server.kv_events import EventPublisher
from openai_server.limits import Limits
from openai_server.loading import Loaded, Options, load
from openai_server.running import Started, bind, run
from prometheus_client.parser import text_string_to_metric_families

from jax_kvpage.serving import Engine

__all__ = ["MODEL", "RunningServer", "add_template", "serve", "wait_until"]

MODEL = "tiny"
# One step shape, so that results depend neither on other requests nor on the prefix cache.
_OPTIONS = Options(
    max_num_seqs=4, max_num_batched_tokens=32, buckets=((32, 4),), max_logprobs=5, block_tokens=16
)
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def add_template(folder: pathlib.Path) -> pathlib.Path:
    """Copies the shipped model to a folder and adds a chat template."""
    for file in BUNDLED.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


class RunningServer:
    """A running server.

    Attributes:
        port: Port on which it listens.
        url: Base URL.
        service: The service, for its limits.
        loaded: Its engine, which only the server's thread may use, and its pool.
    """

    def __init__(self, started: Started, loaded: Loaded, key: str | None) -> None:
        self.port = started.port
        self.url = f"http://127.0.0.1:{started.port}"
        self.service = started.service
        self.loaded = loaded
        self._key = key

    def client(self, **options: Any) -> openai.OpenAI:
        """Returns an OpenAI client that does not retry."""
        options = {"api_key": self._key or "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    def post(self, path: str, body: dict[str, Any] | bytes, **options: Any) -> httpx.Response:
        """Sends a request without the OpenAI client."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        headers |= options.pop("headers", {})
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(self.url + path, headers=headers, timeout=60, **content, **options)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Returns the samples by name and, if there is another label, its value."""
        text = httpx.get(self.url + "/metrics", timeout=60).text
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == MODEL
                assert labels.pop("engine") == "0"
                samples[(sample.name, *labels.values())] = sample.value
        return samples

    def is_idle(self) -> bool:
        """Returns whether no request holds memory."""
        stats = self.loaded.pool.stats()
        return stats.blocks_mapped == stats.blocks_draining == stats.slots_occupied == 0


@contextlib.contextmanager
def serve(
    checkpoint: pathlib.Path,
    limits: Limits | None = None,
    *,
    key: str | None = None,
    before: Callable[[Engine], None] | None = None,
    publisher: EventPublisher | None = None,
) -> Iterator[RunningServer]:
    """Runs a server; checks that it ends cleanly and leaves no memory in use.

    Args:
        checkpoint: Path of the model.
        limits: Limits for clients.
        key: API key.
        before: Called with the engine before the server gets it.
        publisher: Receives its events.
    """
    started = threading.Event()
    servers: list[Started] = []
    failures: list[BaseException] = []

    def on_start(server: Started) -> None:
        servers.append(server)
        started.set()

    def main() -> None:
        limited = limits or Limits(max_logprobs=5)
        try:
            serving = run(
                loaded, limited, listener, api_key=key, publisher=publisher, on_start=on_start
            )
            asyncio.run(serving)
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    listener = bind("127.0.0.1", 0)
    with load(checkpoint, _OPTIONS, MODEL) as loaded:
        if before is not None:
            before(loaded.engine)
        thread = threading.Thread(target=main, daemon=True)
        thread.start()
        started.wait(60)
        try:
            assert servers, failures
            server = RunningServer(servers[0], loaded, key)
            yield server
            wait_until(server.is_idle)
        finally:
            for each in servers:
                each.stop()
            thread.join(60)
        assert not thread.is_alive()
        assert not failures


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.02)
