"""Serves a model with an OpenAI-compatible API, using `jax_kvpage.serving.AsyncEngine`.

    python examples/serve_openai.py                                 # small model, port 8000
    python examples/serve_openai.py --checkpoint DIR --port 8080 --api-key SECRET
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "tiny_llama", "prompt": "A class is", "max_tokens": 32}'

Endpoints: /v1/completions, /v1/chat/completions (for checkpoints with a chat template), /v1/models,
/health and /metrics (Prometheus, vLLM's names). DIR is a model directory as for decode_llama.py.
Needs `pip install '.[serve]'`.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from llama.arguments import BUNDLED, InputError, positive

_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for a mistake in the input, or 130 for an interrupt."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (InputError, OSError) as error:
        print(f"serve_openai.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the server has started
        print("serve_openai.py: interrupted", file=sys.stderr)
        return 130
    return 0


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds, got {text}")
    return value


def _positive_seconds(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "serve_openai.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = "Hugging Face model directory (default: the small model of this repository)"
    add("--checkpoint", type=pathlib.Path, default=BUNDLED, metavar="DIR", help=what)
    what = "name of the model in requests (default: that of the directory)"
    add("--served-model-name", metavar="NAME", help=what)
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s)",
    )
    add(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="0: any free port (default: %(default)s)",
    )
    what = "bearer token that /v1 requires (default: $JAX_KVPAGE_API_KEY, or none)"
    add("--api-key", default=os.environ.get("JAX_KVPAGE_API_KEY"), metavar="KEY", help=what)
    what = "maximum number of running sequences (default: %(default)s)"
    add("--max-num-seqs", type=positive, default=16, metavar="N", help=what)
    what = "maximum number of tokens per step (default: %(default)s)"
    add("--max-num-batched-tokens", type=positive, default=128, metavar="N", help=what)
    what = "maximum tokens per sequence (default: the model's max_position_embeddings)"
    add("--max-seq-len", type=positive, metavar="N", help=what)
    what = "physical memory of the pool (default: half of what all slots can hold)"
    add("--capacity", metavar="SIZE", help=what)
    what = "tokens per block (default: 16 for the small model, else chosen by jax_kvpage)"
    add("--block-tokens", type=positive, metavar="N", help=what)
    what = "tokens to guess by prompt lookup and verify per step (default: none)"
    add("--num-speculative-tokens", type=positive, default=0, metavar="N", help=what)
    add("--no-prefix-caching", action="store_true", help="compute every prompt")
    what = "directory for prefixes and sequences that memory has no room for; kept between runs"
    add("--store", type=pathlib.Path, metavar="DIR", help=what)
    what = "size limit of --store (default: %(default)s)"
    add("--store-limit", default="8GiB", metavar="SIZE", help=what)
    what = "limit of running and waiting requests; others get a 429 (default: %(default)s)"
    add("--max-requests", type=positive, default=256, metavar="N", help=what)
    what = "maximum number of logprobs per token (default: %(default)s)"
    add("--max-logprobs", type=positive, default=20, metavar="N", help=what)
    what = "size limit of a request's body (default: %(default)s)"
    add("--max-body-bytes", type=positive, default=4 << 20, metavar="N", help=what)
    what = "time limit of a request, in seconds (default: %(default)g)"
    add("--timeout", type=_positive_seconds, default=600.0, metavar="SECONDS", help=what)
    what = "time limit for receiving a request's body, in seconds (default: %(default)g)"
    add("--body-timeout", type=_positive_seconds, default=30.0, metavar="SECONDS", help=what)
    what = "let requests set their own priority"
    add("--allow-priority", action="store_true", help=what)
    what = "name of this server in Host headers; on localhost, others are refused; repeatable"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=what)
    what = (
        "ZeroMQ address to publish KV events on, such as tcp://127.0.0.1:5557 (default: no events)"
    )
    add("--kv-events-endpoint", metavar="ADDRESS", help=what)
    what = "ZeroMQ address where subscribers ask for missed events, such as tcp://127.0.0.1:5558"
    add("--kv-events-replay-endpoint", metavar="ADDRESS", help=what)
    add("--kv-events-topic", default="", metavar="TEXT", help="topic of events (default: empty)")
    what = "map: the form of vLLM 0.32; array: that of older versions (default: %(default)s)"
    add("--kv-events-form", choices=("map", "array"), default="map", help=what)
    what = "time that running requests get after SIGTERM, in seconds (default: %(default)g)"
    add("--shutdown-timeout", type=_seconds, default=30.0, metavar="SECONDS", help=what)
    return parser


@contextlib.contextmanager
def _publisher(args: argparse.Namespace) -> Iterator[Any]:
    """Yields a publisher of KV events, or None without the option for it."""
    if args.kv_events_endpoint is None:
        if args.kv_events_replay_endpoint is not None:
            raise InputError("--kv-events-replay-endpoint: wanted --kv-events-endpoint with it")
        yield None
        return
    if args.no_prefix_caching:
        raise InputError(
            "--kv-events-endpoint: there are no events without a prefix cache: leave out "
            "--no-prefix-caching"
        )
    missing = [name for name in ("zmq", "msgspec") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--kv-events-endpoint needs {', '.join(missing)}: pip install 'jax_kvpage[events]'"
        )
    from openai_server.kv_events import EventPublisher

    with EventPublisher(
        args.kv_events_endpoint,
        args.kv_events_replay_endpoint,
        topic=args.kv_events_topic,
        form=args.kv_events_form,
    ) as publisher:
        yield publisher


def _run(args: argparse.Namespace) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"needs {', '.join(missing)}: pip install 'jax_kvpage[serve]'")
    if args.api_key is not None and not (args.api_key and args.api_key.isascii()):
        raise InputError("--api-key: wanted ASCII characters, one or more")
    from openai_server.limits import Limits
    from openai_server.loading import Options, load
    from openai_server.running import Started, bind, run

    options = Options(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_seq_len=args.max_seq_len,
        capacity=args.capacity,
        block_tokens=args.block_tokens,
        max_logprobs=args.max_logprobs,
        num_speculative_tokens=args.num_speculative_tokens,
        prefix_caching=not args.no_prefix_caching,
        store=args.store,
        store_limit=args.store_limit,
    )
    limits = Limits(
        max_body_bytes=args.max_body_bytes,
        max_requests=args.max_requests,
        max_logprobs=args.max_logprobs,
        seconds=args.timeout,
        body_seconds=args.body_timeout,
        priorities=args.allow_priority,
    )

    def started(server: Started) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {loaded.model.name} at http://{host}:{server.port}", flush=True)

    try:
        listener = bind(args.host, args.port)
    except OSError as error:
        raise InputError(f"{args.host}, port {args.port}: {error.strerror}") from error
    with (
        listener,
        _publisher(args) as publisher,
        load(args.checkpoint, options, args.served_model_name) as loaded,
    ):
        loaded.engine.warm_up()
        asyncio.run(
            run(
                loaded,
                limits,
                listener,
                api_key=args.api_key,
                host_names=args.allowed_host,
                publisher=publisher,
                shutdown_seconds=args.shutdown_timeout,
                on_start=started,
            )
        )


if __name__ == "__main__":
    sys.exit(main())
