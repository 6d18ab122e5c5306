"""KV events over ZeroMQ: subscribers can rebuild the prefix cache from them, even after gaps."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import serve_openai
import zmq
from openai_server.kv_events import EventPublisher
from server_rig import MODEL, RunningServer, add_template, serve, wait_until

from jax_kvpage import events

_BLOCK = 16
_END = b"\xff" * 8
_ANY = "tcp://127.0.0.1:0"
_Blocks = dict[int, tuple[str | None, int | None, tuple[int, ...]]]


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


class _Subscriber:
    """Reads events in vLLM's form, without using this package.

    Attributes:
        blocks: Namespace, parent and tokens of each block.
        missed: Sequence numbers that had to be requested again.
    """

    def __init__(self, context: zmq.Context[Any], publisher: EventPublisher, topic: str) -> None:
        self.blocks: _Blocks = {}
        self.missed: list[int] = []
        self._next = 0
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._socket.connect(publisher.endpoint)
        self._replays = context.socket(zmq.DEALER)
        assert publisher.replay_endpoint is not None
        self._replays.connect(publisher.replay_endpoint)

    def read(self, lose: int = 0) -> None:
        """Reads the messages that have arrived, losing one of `lose`."""
        while self._socket.poll(50):
            topic, number, payload = self._socket.recv_multipart()
            assert topic == b"kv"
            got = int.from_bytes(number, "big")
            if lose and got % lose == 1:
                continue
            if got > self._next:
                self.missed += range(self._next, got)
                for each, text in replay(self._replays, self._next):
                    if each < got:
                        self._apply(each, text)
            self._apply(got, payload)

    def catch_up(self) -> None:
        """Requests what follows, like a subscriber that has not heard anything for a while."""
        for number, payload in replay(self._replays, self._next):
            self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        if number < self._next:
            return
        assert number == self._next
        self._next += 1
        _, batch, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        for event in batch:
            if event["type"] == "AllBlocksCleared":
                self.blocks.clear()
            elif event["type"] == "BlockRemoved":
                for name in event["block_hashes"]:
                    del self.blocks[name]
            else:
                parent, ids = event["parent_block_hash"], event["token_ids"]
                assert event["block_size"] == _BLOCK
                for place, name in enumerate(event["block_hashes"]):
                    assert name not in self.blocks
                    assert parent is None or parent in self.blocks
                    tokens = tuple(ids[place * _BLOCK : (place + 1) * _BLOCK])
                    self.blocks[name] = (event["lora_name"], parent, tokens)
                    parent = name

    def sequences(self) -> set[tuple[str | None, tuple[int, ...]]]:
        """Returns, for each block, its namespace and all tokens up to its end."""
        found = set()
        for space, parent, ids in self.blocks.values():
            while parent is not None:
                _, parent, before = self.blocks[parent]
                ids = before + ids
            found.add((space, ids))
        assert len(found) == len(self.blocks)
        return found


def replay(socket: zmq.Socket[bytes], first: int) -> list[tuple[int, bytes]]:
    """Returns the batches from sequence number `first` on, in the form with topics."""
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    found = []
    while True:
        assert socket.poll(60_000), "a replay without an end"
        empty, topic, number, payload = socket.recv_multipart()
        assert empty == b""
        if number == _END:
            assert (topic, payload) == (b"", b"")
            return found
        assert topic == b"kv"
        found.append((int.from_bytes(number, "big"), payload))


def _generate(server: RunningServer, prompt: list[int], salt: str | None, tokens: int) -> list[int]:
    """Serves a request; returns all its token ids."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "cache_salt": salt}
    response = server.post(
        "/v1/completions", body | {"ignore_eos": True, "return_token_ids": True, "seed": 1}
    )
    assert response.status_code == 200, response.text
    return prompt + response.json()["choices"][0]["token_ids"]


def _whole_blocks(ids: list[int]) -> set[tuple[int, ...]]:
    """Returns what the cache holds of a request: the last token is never computed."""
    return {tuple(ids[:end]) for end in range(_BLOCK, len(ids), _BLOCK)}


def test_subscribers_follow_the_prefix_cache(context, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / MODEL
    folder.mkdir()
    start = list(range(100, 140))
    with (
        EventPublisher(_ANY, _ANY, topic="kv") as publisher,
        serve(add_template(folder), publisher=publisher) as server,
    ):
        wait_until(lambda: publisher._next > 0)  # the first batch is sent before anyone subscribes
        listening = _Subscriber(context, publisher, "k")
        losing = _Subscriber(context, publisher, "")
        wanted: set[tuple[str | None, tuple[int, ...]]] = set()
        space = server.loaded.engine.namespace_of

        def follows() -> bool:
            listening.read()
            return listening.sequences() == wanted

        for number in range(8):
            salt = "mine" if number % 2 else None
            prompt = start[: 40 - number] + [7 * number] * number
            ids = _generate(server, prompt, salt, 5 + 3 * number)
            wanted.update((space(salt), tokens) for tokens in _whole_blocks(ids))
            wait_until(follows)
            losing.read(lose=3)
        losing.catch_up()
        assert losing.sequences() == wanted
        assert len(losing.missed) > 1
        assert listening.missed[:1] == [0], "it came late"
        # Eviction, on the engine's thread.
        engine, pool = server.service._engine, server.loaded.pool
        asyncio.run(engine.inspect(lambda _: pool.evict()))
        wanted.clear()
        wait_until(follows)
        losing.catch_up()
        assert losing.blocks == {}


def test_replays_reach_back_as_far_as_batches_are_kept(context) -> None:
    with EventPublisher(_ANY, _ANY, topic="kv", num_batches=3) as publisher:
        for _ in range(5):
            publisher.publish([events.AllBlocksCleared()])
        socket = context.socket(zmq.DEALER)
        socket.connect(publisher.replay_endpoint)
        for wrong in ([b"", b"1"], [b"", b"\0" * 9], [b"\0" * 8], [b"x", b"\0" * 8], [b""] * 9):
            socket.send_multipart(wrong)  # not a valid request: no answer
        assert [number for number, _ in replay(socket, 0)] == [2, 3, 4]
        assert [number for number, _ in replay(socket, 4)] == [4]
        assert replay(socket, 5) == replay(socket, 2**64 - 1) == []


def test_the_older_form(context) -> None:
    """Events are arrays, and a replay has no topics."""
    removed = events.BlockRemoved((1, 2), "CPU")
    with EventPublisher(_ANY, _ANY, topic="kv", form="array") as publisher:
        publisher.publish([removed])
        socket = context.socket(zmq.DEALER)
        socket.connect(publisher.replay_endpoint)
        socket.send_multipart([b"", b"\0" * 8])
        assert socket.poll(60_000)
        empty, number, payload = socket.recv_multipart()
        assert (empty, number) == (b"", b"\0" * 8)
        assert msgspec.msgpack.decode(payload)[1:] == [[["BlockRemoved", [1, 2], "CPU"]], 0]
        assert socket.recv_multipart() == [b"", _END, b""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-events-endpoint", "nowhere"], "nowhere"),
        (["--kv-events-endpoint", _ANY, "--kv-events-replay-endpoint", "tcp://no:1"], "tcp://no:1"),
        (["--kv-events-replay-endpoint", _ANY], "--kv-events-endpoint"),
        (["--kv-events-endpoint", _ANY, "--no-prefix-caching"], "--no-prefix-caching"),
    ],
)
def test_mistakes_in_options_are_one_line(options, message, capsys) -> None:
    """They are reported before the model loads."""
    assert serve_openai.main(["--port", "0", "--checkpoint", "/absent", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("serve_openai.py: error:")
    assert message in error
    assert "/absent" not in error


def test_an_address_in_use_is_refused() -> None:
    with EventPublisher(_ANY) as publisher, pytest.raises(OSError, match="in use"):
        EventPublisher(publisher.endpoint)
