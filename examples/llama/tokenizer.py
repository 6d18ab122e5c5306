"""Text to token ids and back, through the checkpoint's own `tokenizer.json`."""

import pathlib

import tokenizers

__all__ = ["Tokenizer", "TokenizerError"]


class TokenizerError(ValueError):
    """A tokenizer that is missing, damaged, or not the model's."""


class Tokenizer:
    """The tokenizer of the model directory `path`; ids must lie below `vocab_size`.

    Raises:
      TokenizerError: No tokenizer.json, one that cannot be read, or one with more ids than the
        model has embeddings.
    """

    def __init__(self, path: str | pathlib.Path, vocab_size: int) -> None:
        file = pathlib.Path(path) / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer.json in {path}; one with only a tokenizer.model can be converted "
                "with AutoTokenizer.from_pretrained(...).save_pretrained of transformers"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer: {error}") from error
        # Some tokenizers pad or truncate by default; a prompt is neither.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the tokenizer puts around it.

        Raises:
          TokenizerError: The text has no tokens, or an id that the model has no embedding for.
        """
        ids = self._tokenizer.encode(text).ids
        if not ids:
            raise TokenizerError(f"the prompt {text!r} has no tokens")
        if max(ids) >= self._vocab_size:
            raise TokenizerError(
                f"tokenizer.json gives id {max(ids)}, but config.json has vocab_size "
                f"{self._vocab_size}: they do not belong together"
            )
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def continuation(self, prompt_ids: list[int], output_ids: list[int]) -> str:
        """Text of the output as it stands after the prompt (some decoders drop a leading space)."""
        prompt, whole = self.decode(prompt_ids), self.decode(prompt_ids + output_ids)
        return whole[len(prompt) :] if whole.startswith(prompt) else self.decode(output_ids)
