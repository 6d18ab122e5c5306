"""examples/serve_openai.py through the OpenAI client: its answers are the engine's."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from server_rig import MODEL, RunningServer, add_template, serve

from jax_kvpage.serving import Engine, RequestOutput, SamplingParams

_PROMPTS = ["A class is", "If the file does not exist,", "This function is called when"]
_GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=2)
_SEEDED = SamplingParams(seed=7, n=3, max_tokens=10)
_STOPPED = SamplingParams(temperature=0, max_tokens=12, stop=(" class",))


class _Expected:
    """What the engine generates on its own."""

    def __init__(self) -> None:
        self.greedy: list[RequestOutput] = []
        self.seeded: RequestOutput
        self.stopped: RequestOutput
        self.chat: RequestOutput

    def compute(self, engine: Engine, encode: Any) -> None:
        prompts = [encode(text) for text in _PROMPTS]
        self.greedy = engine.generate(prompts, _GREEDY)
        self.seeded, self.stopped = engine.generate([prompts[0]] * 2, [_SEEDED, _STOPPED])
        chat = encode("<s>user: What is a class?\nassistant:", special=False)
        (self.chat,) = engine.generate([chat], SamplingParams(temperature=0, max_tokens=9))


_expected = _Expected()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    from llama.tokenizer import Tokenizer

    folder: pathlib.Path = add_template(tmp_path_factory.mktemp(MODEL))
    encode = Tokenizer(folder, 2048).encode
    with serve(folder, before=lambda engine: _expected.compute(engine, encode)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def _texts(choices: Any) -> list[str]:
    return [choice.text for choice in sorted(choices, key=lambda choice: choice.index)]


def test_completions_are_the_engines(client) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=_PROMPTS,
        max_tokens=12,
        temperature=0,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    outputs = [output.outputs[0] for output in _expected.greedy]
    assert _texts(answer.choices) == [output.text for output in outputs]
    assert [choice.finish_reason for choice in answer.choices] == [
        output.finish_reason for output in outputs
    ]
    for choice, output, request in zip(answer.choices, outputs, _expected.greedy, strict=True):
        assert choice.token_ids == output.token_ids
        assert choice.prompt_token_ids == request.prompt_token_ids
        found = choice.logprobs
        chosen = [
            pairs[token].logprob
            for token, pairs in zip(output.token_ids, output.logprobs, strict=True)
        ]
        assert found.token_logprobs == pytest.approx(chosen, abs=1e-4)
        assert "".join(found.tokens) == choice.text
        assert found.text_offset[:2] == [0, len(found.tokens[0])]
        assert all(1 <= len(top) <= 2 for top in found.top_logprobs)
    usage = answer.usage
    assert usage.prompt_tokens == sum(len(each.prompt_token_ids) for each in _expected.greedy)
    assert usage.completion_tokens == sum(len(output.token_ids) for output in outputs)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up(client, echo: bool) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=_PROMPTS,
            max_tokens=12,
            temperature=0,
            stream=True,
            echo=echo,
            stream_options={"include_usage": True},
        )
    )
    texts = [""] * 3
    reasons: list[str | None] = [None] * 3
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert reasons[choice.index] is None, "nothing follows the end"
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    outputs = [output.outputs[0] for output in _expected.greedy]
    begins = _PROMPTS if echo else [""] * 3
    assert texts == [begin + output.text for begin, output in zip(begins, outputs, strict=True)]
    assert reasons == [output.finish_reason for output in outputs]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == sum(len(output.token_ids) for output in outputs)
    assert len({chunk.id for chunk in chunks}) == 1


def test_n_and_seeds(client) -> None:
    options: dict[str, Any] = {"model": MODEL, "n": 3, "max_tokens": 10}
    wanted = [output.text for output in _expected.seeded.outputs]
    assert len(set(wanted)) == 3
    answer = client.completions.create(prompt=_PROMPTS[0], seed=7, **options)
    assert _texts(answer.choices) == wanted
    other = client.completions.create(prompt=_PROMPTS[0], seed=8, **options)
    assert _texts(other.choices) != wanted


def test_stop_strings(client) -> None:
    (wanted,) = _expected.stopped.outputs
    assert wanted.finish_reason == "stop"
    options = {"model": MODEL, "prompt": _PROMPTS[0], "max_tokens": 12, "temperature": 0}
    (choice,) = client.completions.create(stop=" class", **options).choices
    assert (choice.text, choice.finish_reason) == (wanted.text, "stop")
    assert choice.stop_reason == " class"
    chunks = client.completions.create(stop=[" class"], stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text


def test_prompts_as_token_ids_are_cached(client) -> None:
    ids = _expected.greedy[1].prompt_token_ids * 6  # several blocks
    options = {"model": MODEL, "max_tokens": 3, "temperature": 0}
    salt = {"cache_salt": "another"}
    first = client.completions.create(prompt=ids, extra_body=salt, **options)
    second = client.completions.create(prompt=[ids, ids], extra_body=salt, **options)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 2 * 16
    assert _texts(second.choices) == _texts(first.choices) * 2
    salted = client.completions.create(prompt=ids, extra_body={"cache_salt": "me"}, **options)
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_chat(client) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is a class?"}]}]
    options: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0}
    answer = client.chat.completions.create(
        max_completion_tokens=9, logprobs=True, top_logprobs=2, **options
    )
    (choice,), (wanted,) = answer.choices, _expected.chat.outputs
    assert choice.message.role == "assistant"
    assert choice.message.content == wanted.text
    assert choice.finish_reason == wanted.finish_reason
    assert answer.usage.prompt_tokens == len(_expected.chat.prompt_token_ids)
    entries = choice.logprobs.content
    assert len(entries) == len(wanted.token_ids)
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy"
        assert bytes(entry.bytes).decode() == entry.token
    chunks = list(client.chat.completions.create(max_tokens=9, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == wanted.text
    assert chunks[-1].choices[0].finish_reason == wanted.finish_reason


def test_models_and_health(server, client) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 512)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"model": "gpt-4"}, "model", "model_not_found"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": 5}, None, "request_too_large"),
        ({"max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [1] * 512}, "prompt", "context_length_exceeded"),
        ({"prompt": [2048]}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "missing_required_parameter"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "unsupported_parameter"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"extra_body": {"top_k": 2**31}}, "top_k", "invalid_value"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ],
)
def test_completions_that_are_refused(client, options, param, code) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "A", **options})
    error = caught.value
    assert error.status_code == (404 if code == "model_not_found" else 400)
    assert (error.param, error.code) == (param, code)
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "forbidden", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content.type",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, "messages"),
    ],
)
def test_chats_that_are_refused(client, options, param) -> None:
    messages = [{"role": "user", "content": "A"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": messages, **options})
    assert caught.value.param == param


def test_metrics_agree(server, client) -> None:
    before = server.metrics()
    options: dict[str, Any] = {"model": MODEL, "temperature": 0}
    answers = [
        client.completions.create(prompt=_PROMPTS, max_tokens=5, n=2, **options),
        client.completions.create(prompt=_PROMPTS[0], max_tokens=12, stop=" class", **options),
    ]
    now = server.metrics()
    rise = {name: value - before[name] for name, value in now.items()}
    usages = [answer.usage for answer in answers]
    assert rise["vllm:prompt_tokens_total",] == sum(usage.prompt_tokens for usage in usages)
    generated = sum(usage.completion_tokens for usage in usages)
    assert rise["vllm:generation_tokens_total",] == generated
    assert rise["vllm:request_success_total", "length"] == 3
    assert rise["vllm:request_success_total", "stop"] == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert rise[f"vllm:{name}_count",] == 4
        assert rise[f"vllm:{name}_sum",] > 0
    stopped = len(_expected.stopped.outputs[0].token_ids)
    assert rise["vllm:inter_token_latency_seconds_count",] == 3 * 4 + stopped - 1
    assert now["vllm:num_requests_running",] == now["vllm:num_requests_waiting",] == 0
    assert now["vllm:num_preemptions_total",] == 0
    stats = server.loaded.pool.stats()
    assert now["vllm:prefix_cache_queries_total",] == stats.prefix_queries
    assert now["vllm:prefix_cache_hits_total",] == stats.prefix_hits > 0
    assert 0 <= now["vllm:kv_cache_usage_perc",] <= 1


def test_metrics_while_a_request_runs(server, client) -> None:
    options: dict[str, Any] = {"model": MODEL, "extra_body": {"ignore_eos": True}}
    with client.completions.create(
        prompt="A", max_tokens=500, n=2, stream=True, **options
    ) as chunks:
        next(chunks)
        now = server.metrics()
    assert now["vllm:num_requests_running",] == 1
    assert now["vllm:kv_cache_usage_perc",] > 0
