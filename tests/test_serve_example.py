"""examples/serve_batch.py: its figures, its traces, and its error messages."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from typing import Any

import pytest
import serve_batch
from llama import serving
from llama.arguments import InputError
from llama.serving import model_step
from llama.workload import read_trace, trace_jobs
from llama_models import UNTIED, cache_spec, generate, random_model, write_checkpoint

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, EngineConfig, SamplingParams

_SMALL = [
    "--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--max-seq-len", "128",
    "--block-tokens", "16", "--json",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, UNTIED)
    return path


def _serve(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert serve_batch.main([*_SMALL, *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_prompts(checkpoint, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "occupancy.png"
    values = _serve(
        capsys, "--checkpoint", checkpoint, "--prompt", "ab" * 20, "--prompt", "x" * 200,
        "--num-requests", 6, "--max-new-tokens", 9, "--plot", plot, "--temperature", 0,
        "--num-speculative-tokens", 2, "--max-num-seqs", 1,
    )  # fmt: skip
    assert (values["requests"], values["refused"]) == (6, 3)
    assert values["finish_reasons"] == {"length": 3}
    assert values["generated_tokens"] == 27
    assert len(set(values["texts"])) == 1
    assert values["cached_tokens"] == 2 * 39
    assert values["computed_tokens"] == 40 + 2 + 3 * 8
    assert 0 < values["accepted_guesses"] < 3 * 8  # the text repeats itself
    assert values["first_token_ms_p50"] > 0 < values["between_tokens_ms_p99"]
    assert 0 < values["waste"] < 1
    assert plot.stat().st_size > 1000


@pytest.mark.exhaustive  # guesses of a draft are compared in test_serving_draft.py
def test_a_draft_model(checkpoint, tmp_path, capsys) -> None:
    """A draft equal to the model is always right; one with another vocabulary is refused."""
    options = ["--checkpoint", checkpoint, "--prompt", "abcdefgh", "--max-new-tokens", 9]
    options += ["--temperature", 0]
    values = _serve(capsys, *options, "--draft", checkpoint)
    assert values["guesses"] > 0
    assert values["accepted_guesses"] == values["guesses"]
    assert values["texts"] == _serve(capsys, *options)["texts"]
    small = tmp_path / "small"
    write_checkpoint(small, dataclasses.replace(UNTIED, vocab_size=UNTIED.vocab_size - 8))
    assert serve_batch.main([*_SMALL, *map(str, [*options, "--draft", small])]) == 2
    error = capsys.readouterr().err
    assert "--draft" in error
    assert str(UNTIED.vocab_size - 8) in error


def test_a_store_is_found_by_the_next_run(checkpoint, tmp_path, capsys) -> None:
    """Finds the full blocks of prompts that an earlier run evicted, but not those of other
    weights.
    """
    options = ["--prompt", "ab" * 30, "--prompt", "cd" * 30, "--max-new-tokens", 9]
    options += ["--temperature", 0, "--max-num-seqs", 1, "--store", tmp_path / "store"]
    spec = cache_spec(UNTIED, max_slots=1, max_seq_len=128, block_tokens=16)
    options += ["--capacity", spec.slot_bytes]
    first = _serve(capsys, "--checkpoint", checkpoint, *options)
    assert first["cached_tokens"] == 0
    again = _serve(capsys, "--checkpoint", checkpoint, *options)
    assert again["cached_tokens"] > 0
    assert again["texts"] == first["texts"]
    other = tmp_path / "other"
    write_checkpoint(other, UNTIED)
    assert _serve(capsys, "--checkpoint", other, *options)["cached_tokens"] == 0
    small = ["--store-limit", "much"]
    assert serve_batch.main([*_SMALL, *map(str, [*options, *small])]) == 2
    assert "--store" in capsys.readouterr().err


def test_a_trace_under_pressure(checkpoint, tmp_path, capsys) -> None:
    trace = tmp_path / "trace.csv.gz"
    rows = [f"2023-11-16 18:15:4{i}.6805900,{600 + 50 * i},400" for i in range(5)]
    text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])
    trace.write_bytes(gzip.compress(text.encode()))
    values = _serve(
        capsys, "--checkpoint", checkpoint, "--trace", trace, "--shrink", 10, "--speed", 40,
        "--capacity", 9 * 16 * 1024,
    )  # fmt: skip
    assert values["prompt_tokens"] == sum(60 + 5 * i for i in range(5))
    assert values["finish_reasons"] == {"length": 5}
    assert values["generated_tokens"] == 200
    assert values["texts"] == []
    assert values["capacity"] == 9 * 16 * 1024
    extra = values["recomputed_tokens"]
    prompts, generated = values["prompt_tokens"], values["generated_tokens"]
    assert values["computed_tokens"] == prompts + generated - 5 + extra


def test_equal_hash_ids_of_a_mooncake_trace_give_equal_tokens(tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 2000 * i, "input_length": 1500, "output_length": 7, "hash_ids": [0, i, 9]}
        for i in range(2)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    first, second = trace_jobs(read_trace(trace, 5), 256, 1, 0.5, 0)
    assert (first.arrival, second.arrival, first.max_tokens) == (0, 4, 7)
    assert first.prompt_ids[:512] == second.prompt_ids[:512]
    assert first.prompt_ids[512:1024] != second.prompt_ids[512:1024]
    assert first.prompt_ids[1024:] == second.prompt_ids[1024:]
    assert len(first.prompt_ids) == 1500
    trace.write_text('{"timestamp": 0}')
    with pytest.raises(InputError, match="not a known trace"):
        read_trace(trace, 5)
    for wrong in (-1, 1.5, "a"):
        trace.write_text(json.dumps(lines[0] | {"hash_ids": [wrong]}))
        with pytest.raises(InputError, match="not a known trace"):
            read_trace(trace, 5)


def test_seeds_of_later_prompts_wrap_around(checkpoint, capsys) -> None:
    values = _serve(
        capsys, "--checkpoint", checkpoint, "--prompt", "ab", "--num-requests", 2,
        "--max-new-tokens", 4, "--temperature", 1, "--seed", 2**32 - 1,
    )  # fmt: skip
    assert values["finish_reasons"] == {"length": 2}


def test_a_llama_says_what_it_says_in_the_other_example() -> None:
    model, spec = random_model(UNTIED), cache_spec(UNTIED, max_slots=4)
    prompts = [list(range(start, start + 30 - start)) for start in (1, 9, 20)]
    expected = generate(model, prompts, spec=spec, max_new_tokens=12).outputs
    step, weights = model_step(model)
    options = EngineConfig(max_num_batched_tokens=32, buckets=((32, 4),))
    with kvp.KVPool(spec, spec.virtual_bytes) as pool, Engine(step, weights, pool, options) as e:
        outputs = e.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_mistakes_in_the_input(checkpoint, tmp_path, capsys) -> None:
    corrupt = tmp_path / "corrupt.csv.gz"
    packed = bytearray(gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens" * 9))
    packed[12] ^= 0xFF  # in the compressed data
    corrupt.write_bytes(packed)
    words = tmp_path / "words.jsonl"
    words.write_text('{"timestamp": 0, "input_length": "x", "output_length": 1, "hash_ids": []}')
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1]}')
    for arguments in (
        ["--checkpoint", checkpoint, "--trace", trace, "--seed", -1],
        ["--trace", tmp_path / "absent.csv"],
        ["--checkpoint", checkpoint, "--trace", corrupt],
        ["--checkpoint", checkpoint, "--trace", words],
        ["--checkpoint", tmp_path],
        ["--checkpoint", checkpoint, "--top-p", 2],
        ["--checkpoint", checkpoint, "--capacity", "much"],
        ["--checkpoint", checkpoint, "--capacity", "100TiB"],
        ["--checkpoint", checkpoint, "--plot", tmp_path / "plot.foo"],
        ["--checkpoint", checkpoint, "--plot", tmp_path / "absent" / "plot.png"],
    ):
        assert serve_batch.main([*_SMALL, *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("serve_batch.py: error:")
        assert not out


def test_results_are_printed_before_the_plot(checkpoint, tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")

    def fail(result: serving.Result, file: pathlib.Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(serving, "plot_occupancy", fail)
    arguments = ["--checkpoint", checkpoint, "--prompt", "ab", "--max-new-tokens", 2]
    arguments += ["--plot", tmp_path / "plot.png"]
    assert serve_batch.main([*_SMALL, *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["generated_tokens"] == 2
    assert err == "serve_batch.py: error: the disk is full\n"
