"""Streamed text: for every kind of tokenizer, the pieces add up to the full text, and are emitted
as soon as they are certain.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama.scan_runner import Request
from llama.stream import Printer, TextStream
from llama.tokenizer import Tokenizer
from llama_models import write_byte_tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SIGN = "\N{REPLACEMENT CHARACTER}"  # what decoders show for bytes that form no character
_PIECES = ["\u2581", *"abcdehlorw.,'日é", _SIGN, "\u2581the", "wor"]
_SPECIAL = ["<unk>", "<s>", "</s>"]


def _sentencepiece(
    decoder: decoders.Decoder | None, *, prepend: bool = True
) -> tokenizers.Tokenizer:
    """Converts a SentencePiece model: bytes for whatever has no piece, U+2581 for a space."""
    vocab = {token: index for index, token in enumerate(_SPECIAL + _BYTES + _PIECES)}
    merges = [("\u2581", "a"), ("l", "o"), ("o", "r")]
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(merges)}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("\u2581")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def _words(decoder: decoders.Decoder, tokens: list[str]) -> tokenizers.Tokenizer:
    model = models.WordLevel({token: index for index, token in enumerate(tokens)}, tokens[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoder
    return tokenizer


_FALLBACK = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]


def _fallback(*more: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([*_FALLBACK, *more])


_LATE = [decoders.Replace("lo", "0"), decoders.Replace(Regex("a +"), "A")]
_WORDS = ["[UNK]", "a", "##b", "##'s", "n't", ".", "do", ",", f"##{_SIGN}", " x "]
_SUFFIXED = ["?", "a", "b</w>", "a</w>", "é</w>", "</w>"]
_MAKERS: dict[str, Callable[[], tokenizers.Tokenizer] | None] = {
    "byte level": None,
    "llama 2": lambda: _sentencepiece(_fallback(decoders.Strip(" ", 1, 0))),
    "no strip": lambda: _sentencepiece(_fallback(), prepend=False),
    "strips two": lambda: _sentencepiece(_fallback(decoders.Strip(" ", 2, 0))),
    "metaspace": lambda: _sentencepiece(decoders.Metaspace()),
    "no decoder": lambda: _sentencepiece(None),
    "replaced at the end": lambda: _sentencepiece(_fallback(*_LATE)),
    "word piece": lambda: _words(decoders.WordPiece("##", cleanup=True), _WORDS),
    "suffixes": lambda: _words(decoders.BPEDecoder("</w>"), _SUFFIXED),
    "ctc": lambda: _words(decoders.CTC("<pad>", "|"), ["<pad>", "a", "b", "|", "'s", "n't", "."]),
}
_NAMES = list(_MAKERS)


@functools.cache
def _tokenizer(name: str) -> tuple[Tokenizer, int]:
    """Returns the example's tokenizer of that kind, and the number of its ids."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        make = _MAKERS[name]
        if make is None:
            write_byte_tokenizer(path)
        else:
            make().save(str(path / "tokenizer.json"))
        size = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
        return Tokenizer(path, size), size


def _pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in output), stream.finish()]


def _check(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> None:
    found = "".join(_pieces(tokenizer, prompt, output))
    assert found == tokenizer.continuation(prompt, output)


_IDS = st.lists(st.integers(0, 10_000), max_size=40)


@pytest.mark.parametrize("name", _NAMES)
@settings(max_examples=150)
@given(prompt=_IDS, output=_IDS)
def test_pieces_of_any_ids_add_up(name: str, prompt: list[int], output: list[int]) -> None:
    tokenizer, size = _tokenizer(name)
    _check(tokenizer, [token % size for token in prompt], [token % size for token in output])


@pytest.mark.parametrize("name", ["byte level", "llama 2", "no strip"])
@settings(max_examples=100)
@given(prompt=st.text(min_size=1), text=st.text(), cut=st.integers(0, 8))
@example("日本語", "日本語", 0)
@example("x", "日本語", 1)
@example("x", "🙂🙂", 2)
@example(" ", f"  two{_SIGN}", 0)
@example(_SIGN, f"{_SIGN}a{_SIGN}", 0)
def test_pieces_of_any_text_add_up(name: str, prompt: str, text: str, cut: int) -> None:
    """Also if the sequence or the prompt ends inside a character."""
    tokenizer, _ = _tokenizer(name)
    ids = tokenizer.encode(prompt + text)
    start = len(tokenizer.encode(prompt))
    for begin in range(max(start - 3, 0), start + 1):
        _check(tokenizer, ids[:begin], ids[begin : len(ids) - cut])
    whole = "".join(_pieces(tokenizer, [], ids))
    assert whole == tokenizer.decode(ids)
    if "\u2581" not in prompt + text:  # the pieces use it for a space
        assert whole == prompt + text


@pytest.mark.parametrize("name", _NAMES)
def test_long_sequences(name: str) -> None:
    """Sequences longer than the window: of bytes that rarely form characters, of characters, and of
    one token.
    """
    tokenizer, size = _tokenizer(name)
    random = np.random.default_rng(0)
    for _ in range(3):
        _check(tokenizer, *random.integers(0, size, (2, 250)).tolist())
    for token in random.integers(0, size, 5):
        _check(tokenizer, [], [int(token)] * 120)
    if size > 255:
        text = f"weiß, naïve 字 und 🙂! 日本語テキスト Ж {_SIGN}" * 4
        ids = tokenizer.encode(text)
        for start in (0, 90):
            _check(tokenizer, ids[:start], ids[start:])


@pytest.mark.parametrize("name", ["byte level", "llama 2"])
def test_a_character_comes_with_its_last_byte(name: str) -> None:
    tokenizer, _ = _tokenizer(name)
    prompt, ids = tokenizer.encode("xy"), tokenizer.encode("xy語本🙂a")
    pieces = _pieces(tokenizer, prompt, ids[len(prompt) :])
    assert pieces == ["", "", "語", "", "", "本", "", "", "", "🙂", "a", ""]
    # An incomplete character at the end is shown as such, and does not spoil those before it.
    pieces = _pieces(tokenizer, prompt, ids[len(prompt) : -2])
    assert pieces == ["", "", "語", "", "", "本", "", "", "", _SIGN]


def test_bytes_that_form_no_character_spoil_nothing_else() -> None:
    tokenizer, _ = _tokenizer("llama 2")
    ids = [len(_SPECIAL) + byte for byte in b"\xff\xe6\x97\xa5\xe6\x97A\xc3\xa9\xf0\x9f"]
    assert tokenizer.decode(ids) == f"{_SIGN}日{_SIGN}Aé{_SIGN}"
    ids.insert(2, 1)  # a special token inside a character is ignored
    assert tokenizer.decode(ids) == f"{_SIGN}日{_SIGN}Aé{_SIGN}"


def test_spaces_at_the_start_belong_to_the_output() -> None:
    tokenizer, _ = _tokenizer("llama 2")
    prompt, ids = tokenizer.encode("hello"), tokenizer.encode("hello world a the")
    assert "".join(_pieces(tokenizer, prompt, ids[len(prompt) :])) == " world a the"
    assert "".join(_pieces(tokenizer, [1], ids)) == "hello world a the"


def test_the_printer_shows_the_held_end_of_every_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer, _ = _tokenizer("llama 2")
    prompts, texts = ["a", "hello"], [f" 日本{_SIGN}", "語"]
    requests = [Request(i, tokenizer.encode(prompt), 99) for i, prompt in enumerate(prompts)]
    printer = Printer(requests, [f"> {prompt}" for prompt in prompts], tokenizer)
    outputs = [tokenizer.encode(p + t) for p, t in zip(prompts, texts, strict=True)]
    for request, ids in reversed(list(zip(requests, outputs, strict=True))):
        for token in ids[len(request.prompt_ids) :][: None if request.index == 0 else -1]:
            printer.token(request, token)
        request.finish_reason = "length"
        printer.finish(request)
    assert capsys.readouterr().out == f"> a 日本{_SIGN} [length]\n\n> hello{_SIGN} [length]\n\n"
