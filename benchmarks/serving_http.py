"""Cost of HTTP: requests through examples/serve_openai.py compared with the same on the engine.

    pip install '.[serve]' httpx
    python benchmarks/serving_http.py [--checkpoint DIR] [--concurrency N]
    python benchmarks/serving_http.py --random-llama --vllm-python venvs/vllm/bin/python

The engine runs in this process behind `AsyncEngine`, the server in another, and vLLM's server in a
third; their rounds alternate while the others are idle. All requests are streamed, with prompts of
random ids that are not cached. Prints one JSON object: medians over the rounds of generated tokens
per second and of the client's time to the first token, the overhead of HTTP, and the throughput
relative to vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
from random_llama import write_checkpoint

_EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.append(str(_EXAMPLES))

# Runs one request; returns seconds to the first token and the number of tokens.
_Request = Callable[[list[int]], Awaitable[tuple[float, int]]]


def main() -> None:
    """Runs the rounds and prints the figures."""
    from llama.arguments import BUNDLED

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=pathlib.Path, default=BUNDLED, help="model directory")
    add("--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)")
    add("--num-requests", type=int, default=32, help="in a round (default: %(default)s)")
    add("--prompt-tokens", type=int, default=64, help="(default: %(default)s)")
    add("--max-tokens", type=int, default=64, help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="of each (default: %(default)s)")
    add("--random-llama", action="store_true", help="serve 56M random weights in float32")
    add("--vllm-python", help="interpreter with vllm, whose server is measured too")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.random_llama:
            args.checkpoint = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_checkpoint(str(args.checkpoint))
        urls = {"http": stack.enter_context(_own_server(args))}
        if args.vllm_python:
            urls["vllm"] = stack.enter_context(_vllm_server(args))
        figures = asyncio.run(_compare(args, urls))
    name = "random llama" if args.random_llama else args.checkpoint.name
    print(json.dumps(vars(args) | {"checkpoint": name} | figures))


@contextlib.contextmanager
def _own_server(args: argparse.Namespace) -> Iterator[str]:
    command = [sys.executable, str(_EXAMPLES / "serve_openai.py"), "--port", "0"]
    command += ["--checkpoint", str(args.checkpoint), "--served-model-name", "model"]
    command += ["--max-num-seqs", str(args.concurrency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                raise SystemExit(f"the server did not start: {line!r}")
            yield found[0]
        finally:
            server.terminate()


@contextlib.contextmanager
def _vllm_server(args: argparse.Namespace) -> Iterator[str]:
    """Runs vLLM's server on all cores; by default it leaves one idle."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(args.checkpoint), "--dtype", "float32"]
    command += ["--served-model-name", "model", "--max-num-seqs", str(args.concurrency)]
    command += ["--max-model-len", "2048", "--disable-uvicorn-access-log"]
    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log) as server,
    ):
        try:
            while not _answers(f"{url}/health"):
                if server.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"vLLM's server did not start:\n{log.read()[-2000:]}")
                time.sleep(1)
            yield url
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


async def _compare(args: argparse.Namespace, urls: dict[str, str]) -> dict[str, Any]:
    import httpx
    from openai_server.loading import Options, load

    from jax_kvpage.serving import AsyncEngine, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    rng = np.random.default_rng(0)
    with load(args.checkpoint, Options(max_num_seqs=args.concurrency), "model") as loaded:
        loaded.engine.warm_up()
        async with (
            AsyncEngine(loaded.engine) as engine,
            httpx.AsyncClient(timeout=600) as client,
        ):

            async def direct(ids: list[int]) -> tuple[float, int]:
                begin, first, count = time.perf_counter(), 0.0, 0
                async for output in engine.stream(ids, params):
                    first = first or time.perf_counter() - begin
                    count = len(output.outputs[0].token_ids)
                return first, count

            async def http(url: str, ids: list[int]) -> tuple[float, int]:
                body = {"model": "model", "prompt": ids, "max_tokens": args.max_tokens}
                body |= {"temperature": 0, "ignore_eos": True, "stream": True}
                body |= {"stream_options": {"include_usage": True}}
                begin, first, last = time.perf_counter(), 0.0, ""
                async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            first = first or time.perf_counter() - begin
                            last = line
                return first, json.loads(last[6:])["usage"]["completion_tokens"]

            requests: dict[str, _Request] = {"engine": direct}
            requests |= {name: functools.partial(http, url) for name, url in urls.items()}
            results: dict[str, list[tuple[float, float]]] = {name: [] for name in requests}
            for number in range(args.rounds + 1):
                for name, request in requests.items():
                    shape = (args.num_requests, args.prompt_tokens)
                    prompts = rng.integers(3, loaded.model.vocab_size, shape).tolist()
                    measured = await _round(request, prompts, args.concurrency)
                    if number:  # the first round warms both up
                        results[name].append(measured)
    figures = {}
    for name, rounds in results.items():
        speed, first = np.median(rounds, axis=0)
        figures[f"{name}_tokens_per_second"] = round(float(speed), 1)
        figures[f"{name}_first_token_ms"] = round(float(first) * 1000, 2)
    ratio = figures["http_tokens_per_second"] / figures["engine_tokens_per_second"]
    added = figures["http_first_token_ms"] - figures["engine_first_token_ms"]
    figures |= {"throughput_ratio": round(ratio, 3), "first_token_added_ms": round(added, 2)}
    if "vllm" in results:
        ratio = figures["http_tokens_per_second"] / figures["vllm_tokens_per_second"]
        figures["throughput_ratio_to_vllm"] = round(ratio, 3)
    return figures


async def _round(
    request: _Request, prompts: list[list[int]], concurrency: int
) -> tuple[float, float]:
    """Runs a round; returns generated tokens/s and the median time to the first token."""
    left = iter(prompts)
    done: list[tuple[float, int]] = []

    async def work() -> None:
        for ids in left:
            done.append(await request(ids))

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    seconds = time.perf_counter() - begin
    firsts, counts = zip(*done, strict=True)
    return sum(counts) / seconds, float(np.median(firsts))


if __name__ == "__main__":
    main()
