"""examples/decode_llama.py from the outside: its output, its options and its error messages."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import decode_llama
import pytest
from llama_models import TINY, UNTIED, edit_json, write_checkpoint

_EXAMPLE = pathlib.Path(decode_llama.__file__)
_FIGURES = {
    "num_sequences": int,
    "prompt_tokens": int,
    "generated_tokens": int,
    "seconds": float,
    "compile_seconds": float,
    "tokens_per_second": float,
    "decode_steps": int,
    "layout": str,
    "kv_dtype": str,
    "block_tokens": int,
    "block_bytes": int,
    "capacity": int,
    "blocks_mapped": int,
    "bytes_mapped": int,
    "bytes_static_cache": int,
    "bytes_reserved_virtual": int,
    "mapped_share_of_static": float,
    "saved_by_sharing": float,
    "system_calls": int,
    "system_calls_per_token": float,
    "stalls": int,
    "preemptions": int,
    "accepted_guesses": int,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, UNTIED)
    return path


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert decode_llama.main(["--json", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def _outputs(result: dict[str, Any]) -> list[list[int]]:
    return [sequence["output_ids"] for sequence in result["sequences"]]


def test_the_bundled_model_in_its_own_process() -> None:
    command = [sys.executable, str(_EXAMPLE), "--json", "--max-new-tokens", "40"]
    # Python finds the modules next to the script, unless told not to.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["sequences"]) == result["num_sequences"] > 1
    for sequence in result["sequences"]:
        assert set(sequence) == {"prompt_ids", "output_ids", "text", "finish_reason"}
        assert sequence["finish_reason"] in ("stop", "length")
        words = sequence["text"].split()
        assert sum(word.strip(".,:()'\"").isalpha() for word in words) > 0.7 * len(words)
    for name, kind in _FIGURES.items():
        assert isinstance(result[name], kind), name
    assert result["generated_tokens"] == sum(map(len, _outputs(result)))
    assert 0 < result["bytes_mapped"] < result["bytes_static_cache"]
    assert result["bytes_mapped"] == result["blocks_mapped"] * result["block_bytes"]


def test_text_is_streamed_and_followed_by_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    plot = tmp_path / "memory.png"
    arguments = ["--prompt", "Return a new", "--prompt", "The module", "--max-new-tokens", "20"]
    assert decode_llama.main([*arguments, "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    sequences = _json(capsys, *arguments)["sequences"]
    for prompt, sequence in zip(("Return a new", "The module"), sequences, strict=True):
        assert f"> {prompt}{sequence['text']} [{sequence['finish_reason']}]" in shown
    for row in ("tokens/s", "blocks mapped", "static cache reserves", "system calls per token"):
        assert row in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_samples_and_beams_share_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "The function returns a list of all names that are defined in the module, which"
    common = ["--prompt", prompt, "--max-new-tokens", 30]
    sampled = _json(capsys, *common, "--num-samples", 3, "--temperature", 0.9)
    assert len({tuple(output) for output in _outputs(sampled)}) == sampled["num_sequences"] == 3
    assert 0 < sampled["saved_by_sharing"] < 1
    assert decode_llama.main(list(map(str, [*common, "--num-beams", 2]))) == 0
    shown = capsys.readouterr().out
    beams = _json(capsys, *common, "--num-beams", 2)
    (sequence,) = beams["sequences"]
    assert f"> {prompt}{sequence['text']} [" in shown
    best, second = sequence["beams"]
    assert best["output_ids"] == sequence["output_ids"] != second["output_ids"]
    assert 0 > best["score"] >= second["score"]
    assert "beams" not in sampled["sequences"][0]
    assert "blocks saved by sharing" in shown
    for options, words in (
        (("--num-samples", 2), "needs a --temperature above 0"),
        (("--num-beams", 2, "--max-slots", 3), "needs --max-slots 4"),
        (
            ("--num-samples", 4, "--temperature", 1, "--max-slots", 3),
            "--num-samples 4 needs --max-slots 4",
        ),
    ):
        assert decode_llama.main(list(map(str, [*common, *options]))) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        decode_llama.main(["--num-beams", "2", "--scan", "4"])
    assert "leave out --num-samples" in capsys.readouterr().err


def test_guesses_change_no_token(
    capsys: pytest.CaptureFixture[str], checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # With random weights and a tied head, text repeats itself, so lookups guess well.
    write_checkpoint(tmp_path, TINY)
    common = ["--checkpoint", tmp_path, "--prompt", "some words", "--max-new-tokens", 30]
    plain = _json(capsys, *common)
    looked_up = _json(capsys, *common, "--prompt-lookup", 3)
    drafted = _json(capsys, *common, "--draft", tmp_path)  # the model is its own draft
    for guessed in (looked_up, drafted):
        assert _outputs(guessed) == _outputs(plain)
        assert guessed["accepted_guesses"] > plain["accepted_guesses"] == 0
        assert guessed["decode_steps"] < plain["decode_steps"] == 29
    # A bad draft model costs steps, but does not change tokens.
    other = _json(capsys, *common, "--draft", checkpoint)
    assert _outputs(other) == _outputs(plain)
    assert other["accepted_guesses"] < drafted["accepted_guesses"]
    assert decode_llama.main(list(map(str, ["--prompt", "x", "--draft", checkpoint]))) == 2
    assert "its vocabulary has 256 tokens, the model's 2048" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--prompt-lookup 3 --scan 2", "--prompt-lookup guesses for single steps: leave out"),
        ("--draft x --beams 2", "--draft guesses for single steps: leave out"),
        ("--draft x --prompt-lookup 3", "leave one of them out"),
        ("--chat --turn x", "--turn follows a prompt"),
        ("--chat --scan 4", "leave out --scan, --num-samples and --num-beams"),
        ("--chat --num-beams 2", "leave out --scan, --num-samples and --num-beams"),
    ],
)
def test_options_that_exclude_each_other(
    capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        decode_llama.main(options.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_scan_and_loop_say_the_same(
    capsys: pytest.CaptureFixture[str], checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one and\n\nanother one that is a bit longer than that\nthird\n")
    common = ["--checkpoint", checkpoint, "--prompt-file", prompts, "--prompt", "first"]
    common += ["--max-new-tokens", 30, "--temperature", 0.8, "--top-k", 50, "--top-p", 0.9]
    loop = _json(capsys, *common, "--seed", 4)
    assert bytes(loop["sequences"][0]["prompt_ids"]) != b""
    assert loop["num_sequences"] == 4
    scan = _json(capsys, *common, "--seed", 4, "--scan", 7, "--layout", "per_layer")
    assert _outputs(scan) == _outputs(loop)
    tight = _json(
        capsys, *common, "--seed", 4, "--scan", 7, "--block-tokens", 16, "--capacity", "80KiB"
    )
    assert tight["stalls"] + tight["preemptions"] > 0
    assert _outputs(tight) == _outputs(loop)
    assert _outputs(_json(capsys, *common, "--seed", 5)) != _outputs(loop)


def test_options_reach_what_they_name(
    capsys: pytest.CaptureFixture[str], checkpoint: pathlib.Path
) -> None:
    common = ["--checkpoint", checkpoint, "--prompt", "some words", "--max-new-tokens", 6]
    plain = _json(capsys, *common)
    assert (plain["kv_dtype"], plain["bytes_static_cache"]) == ("float32", 256 * 1024)
    other = _json(
        capsys, *common, "--layout", "per_layer", "--kv-dtype", "bfloat16", "--block-tokens", 64,
        "--max-seq-len", 128, "--max-slots", 3, "--implementation", "xla", "--dtype", "bfloat16",
    )  # fmt: skip
    assert (other["layout"], other["kv_dtype"], other["block_tokens"]) == (
        "per_layer",
        "bfloat16",
        64,
    )
    assert other["bytes_static_cache"] == 3 * 128 * 512
    for dtype in ("int8", "float8_e4m3fn"):
        small = _json(capsys, *common, "--kv-dtype", dtype)
        assert small["kv_dtype"] == dtype
        assert small["generated_tokens"] == 6
        assert small["bytes_static_cache"] < plain["bytes_static_cache"] / 3
    assert other["blocks_mapped"] == 4
    assert len(_outputs(other)[0]) == 6


def test_a_sequence_that_can_never_fit_says_so(
    capsys: pytest.CaptureFixture[str], checkpoint: pathlib.Path
) -> None:
    arguments = ["--checkpoint", checkpoint, "--prompt", 40 * "x", "--block-tokens", 16]
    assert decode_llama.main(["--json", *map(str, arguments), "--capacity", "16KiB"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["sequences"][0]["finish_reason"] == "capacity"
    assert "sequence 0 ended at 40 tokens" in captured.err
    assert "raise --capacity" in captured.err


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Returns the single line that a failing run prints."""
    try:
        status = decode_llama.main([*map(str, arguments)])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert ": error: " in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "must be 1 or more, got 0"),
        (["--max-slots", str(2**31)], "must be at most 2147483647, got 2147483648"),
        (["--max-slots", "many"], "must be a whole number, got 'many'"),
        (["--scan", "-1"], "--scan must be 0 (single steps) or more, got -1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--layout", "paged"], "invalid choice: 'paged'"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or more"),
        (["--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["--implementation", "cuda"], "cuda does not run on cpu, which has cpu and xla"),
        (["--plot", "memory.gif"], "must end in one of .png"),
        (["--plot", "no/such/memory.png"], "there is no directory"),
        (["--prompt-file", "no-such-file"], "--prompt-file: "),
        (["--checkpoint", "no-such-dir"], "no config.json in no-such-dir"),
        (["--checkpoint", "org/name"], "run `hf download org/name --local-dir name`"),
        (["--max-seq-len", "100000"], "is beyond the 512 positions"),
        (["--max-seq-len", "2"], "a sequence may have 2 in all"),
        (["--capacity", "plenty"], "plenty"),
        (["--capacity", "1"], "capacity"),
        (["--capacity", "9" * 30], "--capacity must be less than 2**63 bytes"),
        (["--capacity", "\N{SUPERSCRIPT TWO}"], "capacity must be a positive number"),
        (["--block-tokens", "7"], "block_tokens"),
    ],
)
def test_mistakes_end_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in _fails(capsys, *arguments)


def test_checkpoints_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    write_checkpoint(tmp_path, UNTIED, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    arguments = ("--checkpoint", tmp_path, "--prompt", "x")
    assert "1 of 2 shards are missing" in _fails(capsys, *arguments)
    edit_json(tmp_path / "config.json", model_type="gemma")
    assert "model_type is 'gemma'" in _fails(capsys, *arguments)
    (tmp_path / "tokenizer.json").unlink()
    edit_json(tmp_path / "config.json", model_type="llama")
    assert "no tokenizer.json" in _fails(capsys, *arguments)
