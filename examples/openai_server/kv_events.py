"""KV events over ZeroMQ in the format of vLLM's `ZmqEventPublisher`, for the same subscribers.

Each batch of events is a message of three frames on a PUB socket: the topic, a sequence number (8
bytes, big endian, starting at 0) and a MessagePack `EventBatch`. A subscriber that missed a number
asks a ROUTER socket for all batches from that number on.
"""

import asyncio
import collections
import logging
import threading
from collections.abc import Sequence

import zmq

import jax_kvpage
from jax_kvpage import events as kv_events
from jax_kvpage.serving import AsyncEngine

__all__ = ["EventPublisher", "publish_events"]

_INTERVAL = 0.05  # seconds between polls of the pool
_POLL_MS = 100  # interval at which the replay thread checks whether to end
_LINGER_MS = 1000  # time for the last batch to be sent at the end
_HIGH_WATER = 100_000  # the most messages queued for a subscriber, as in vLLM
_END = (-1).to_bytes(8, "big", signed=True)  # the number that ends a replay

_log = logging.getLogger(__name__)


class EventPublisher:
    """Publishes batches of events, and replays them on request. A context manager.

    `publish` and `close` must be called by one thread; another thread answers replay requests.

    Args:
      endpoint: The address for subscribers, such as "tcp://127.0.0.1:5557"; port 0 for any.
      replay_endpoint: The address for replay requests; None for no replays.
      topic: First frame of all messages.
      form: Encoding of events (`events.encode`): "map" for vLLM 0.32, "array" for older versions.
        With "map", replayed messages begin with the topic too.
      num_batches: Number of batches kept for replays.

    Attributes:
      endpoint: The address, with the port that was chosen.
      replay_endpoint: The same for replays.

    Raises:
      OSError: An endpoint is not valid, or in use.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        form: kv_events.Form = "map",
        num_batches: int = 10_000,
    ) -> None:
        self._topic = topic.encode()
        self._form: kv_events.Form = form
        self._next = 0
        self._kept: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=num_batches)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._context = zmq.Context()
        try:
            self._publisher = self._bind(zmq.PUB, endpoint, _HIGH_WATER)
            self.endpoint = self._publisher.getsockopt_string(zmq.LAST_ENDPOINT)
            self.replay_endpoint = None
            if replay_endpoint is not None:
                # Large enough for a complete replay and its end marker.
                replays = self._bind(zmq.ROUTER, replay_endpoint, num_batches + 1)
                self.replay_endpoint = replays.getsockopt_string(zmq.LAST_ENDPOINT)
                self._thread = threading.Thread(target=self._serve, args=(replays,), daemon=True)
                self._thread.start()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def __enter__(self) -> "EventPublisher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def publish(self, events: Sequence[kv_events.Event]) -> None:
        """Sends events as one batch. Subscribers that are too slow will miss it."""
        payload = kv_events.encode(events, form=self._form, data_parallel_rank=0)
        number, self._next = self._next, self._next + 1
        with self._lock:  # store it before it is sent, so that all receivers can ask for it
            self._kept.append((number, payload))
        self._publisher.send_multipart([self._topic, number.to_bytes(8, "big"), payload])

    def close(self) -> None:
        """Closes the sockets."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._context.destroy(linger=_LINGER_MS)

    def _bind(self, kind: int, endpoint: str, high_water: int) -> "zmq.Socket[bytes]":
        made = self._context.socket(kind)
        made.set_hwm(high_water)
        try:
            made.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{endpoint}: {error.strerror}") from error
        return made

    def _serve(self, replays: "zmq.Socket[bytes]") -> None:
        """Answers replay requests: an empty frame and the first sequence number wanted."""
        while not self._closing.is_set():
            if not replays.poll(_POLL_MS):
                continue
            client, *frames = replays.recv_multipart()
            if len(frames) != 2 or frames[0] or len(frames[1]) != 8:
                continue
            first = int.from_bytes(frames[1], "big")
            with self._lock:
                kept = [each for each in self._kept if each[0] >= first]
            named = self._form == "map"
            head = [client, b"", self._topic] if named else [client, b""]
            for number, payload in kept:
                replays.send_multipart([*head, number.to_bytes(8, "big"), payload])
            head = [client, b"", b""] if named else [client, b""]
            replays.send_multipart([*head, _END, b""])


async def publish_events(
    engine: AsyncEngine, pool: jax_kvpage.KVPool, publisher: EventPublisher
) -> None:
    """Publishes the events of a pool until the engine is closed."""
    while True:
        try:
            found = await engine.inspect(lambda _: pool.events())
        except jax_kvpage.DeviceFault as error:  # the engine starts a new generation
            _log.warning("%s", error)
            found = []
        except (RuntimeError, jax_kvpage.PoolClosed):
            return
        if found:
            publisher.publish(found)
        await asyncio.sleep(_INTERVAL)
