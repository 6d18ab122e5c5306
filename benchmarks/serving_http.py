"""What HTTP costs: requests through examples/serve_openai.py beside the same on the engine.

    pip install '.[serve]' httpx
    python benchmarks/serving_http.py [--checkpoint DIR] [--concurrency N]

The engine runs in this process behind `AsyncEngine`, the server in another; the rounds of both
alternate, and the idle one waits without work. All requests are streamed, with prompts of random
ids that no cache has. Prints one JSON object: medians over the rounds of generated tokens per
second and of the time to the first token, as the client sees it, and what HTTP adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

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
    args = parser.parse_args()
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
            figures = asyncio.run(_compare(args, found[0]))
        finally:
            server.terminate()
    print(json.dumps(vars(args) | {"checkpoint": args.checkpoint.name} | figures))


async def _compare(args: argparse.Namespace, url: str) -> dict[str, Any]:
    import httpx
    from openai_server.loading import Options, load

    from jax_kvpage.serving import AsyncEngine, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    rng = np.random.default_rng(0)
    with load(args.checkpoint, Options(max_num_seqs=args.concurrency), "model") as loaded:
        loaded.engine.warm_up()
        async with (
            AsyncEngine(loaded.engine) as engine,
            httpx.AsyncClient(base_url=url, timeout=600) as client,
        ):

            async def direct(ids: list[int]) -> tuple[float, int]:
                begin, first, count = time.perf_counter(), 0.0, 0
                async for output in engine.stream(ids, params):
                    first = first or time.perf_counter() - begin
                    count = len(output.outputs[0].token_ids)
                return first, count

            async def http(ids: list[int]) -> tuple[float, int]:
                body = {"model": "model", "prompt": ids, "max_tokens": args.max_tokens}
                body |= {"temperature": 0, "ignore_eos": True, "stream": True}
                body |= {"stream_options": {"include_usage": True}}
                begin, first, last = time.perf_counter(), 0.0, ""
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            first = first or time.perf_counter() - begin
                            last = line
                return first, json.loads(last[6:])["usage"]["completion_tokens"]

            results: dict[str, list[tuple[float, float]]] = {"engine": [], "http": []}
            for number in range(args.rounds + 1):
                for name, request in (("engine", direct), ("http", http)):
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
    return figures | {"throughput_ratio": round(ratio, 3), "first_token_added_ms": round(added, 2)}


async def _round(
    request: _Request, prompts: list[list[int]], concurrency: int
) -> tuple[float, float]:
    """Generated tokens per second, and the median time to the first token."""
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
