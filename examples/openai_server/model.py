"""The served model, as far as the server sees it: its name, its tokenizer and its chat template."""

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import Sequence

from llama.chat import ChatTemplate
from llama.tokenizer import Tokenizer, TokenizerError

from .calls import Call
from .errors import ApiError

__all__ = ["ServedModel"]

_SHORT = 4096  # characters that are encoded without a thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model under a name.

    Attributes:
      name: As requests have it.
      tokenizer: Of the checkpoint.
      vocab_size: Token ids lie below.
      max_seq_len: Most tokens of a sequence, prompt and answer.
      template: Of the checkpoint; None if it is not a chat model.
      created: When, in Unix time.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    template: ChatTemplate | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @staticmethod
    def find_template(checkpoint: pathlib.Path) -> ChatTemplate | None:
        """The chat template of a model directory; None if it has none.

        Raises:
          TokenizerError: There is one, but it is not valid.
        """
        files = (checkpoint / "chat_template.jinja", checkpoint / "tokenizer_config.json")
        if files[0].is_file() or (
            files[1].is_file() and b'"chat_template"' in files[1].read_bytes()
        ):
            return ChatTemplate(checkpoint)
        return None

    async def encode(self, call: Call) -> list[list[int]]:
        """The token ids of a request's prompts.

        Raises:
          ApiError: Another model, no chat model, or prompts that it cannot take.
        """
        if call.model != self.name:
            raise ApiError(
                f"there is no model {call.model[:200]!r} here, only {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        if call.is_chat:
            text = self._render(call)
            # The template writes the special tokens itself.
            prompts = [await self._encode(text, "messages", special=False)]
        else:
            prompts = [
                await self._encode(prompt, "prompt") if isinstance(prompt, str) else prompt
                for prompt in call.prompts
            ]
        for ids in prompts:
            self._check(ids, call)
        return prompts

    def max_tokens(self, call: Call, ids: Sequence[int]) -> int:
        """Tokens to produce at most; by default 16, in a chat all that there is room for."""
        room = self.max_seq_len - len(ids)
        default = room if call.is_chat else min(16, room)
        return default if call.max_tokens is None else call.max_tokens

    def _render(self, call: Call) -> str:
        if self.template is None:
            raise ApiError(
                f"{self.name} has no chat template: use /v1/completions",
                param="messages",
                code="unsupported_parameter",
            )
        try:
            return self.template.render(call.messages, **call.template_values)
        except (TokenizerError, TypeError) as error:  # a name that render itself has
            raise ApiError(str(error)[:1000], param="messages", code="invalid_value") from error

    async def _encode(self, text: str, param: str, special: bool = True) -> list[int]:
        try:
            if len(text) <= _SHORT:
                await asyncio.sleep(0)  # others have their turn between many prompts
                return self.tokenizer.encode(text, special)
            return await asyncio.to_thread(self.tokenizer.encode, text, special)
        except TokenizerError as error:
            raise ApiError(str(error)[:1000], param=param, code="invalid_value") from error

    def _check(self, ids: Sequence[int], call: Call) -> None:
        param = "messages" if call.is_chat else "prompt"
        if not ids:
            raise ApiError("the prompt has no tokens", param=param, code="invalid_value")
        if max(ids) >= self.vocab_size:
            raise ApiError(
                f"token id {max(ids)} is not below the vocabulary's size, {self.vocab_size}",
                param=param,
                code="invalid_value",
            )
        asked = call.max_tokens or 1
        if len(ids) + asked > self.max_seq_len:
            raise ApiError(
                f"the prompt has {len(ids)} tokens, and {asked} are to follow, but a sequence has "
                f"at most {self.max_seq_len}",
                param=param if call.max_tokens is None else "max_tokens",
                code="context_length_exceeded",
            )
