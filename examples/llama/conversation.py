"""Conversations with a chat model: turns messages and answers into the next prompt's token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import InputError
from .chat import ChatTemplate
from .scan_runner import Request
from .tokenizer import Tokenizer

__all__ = ["Conversation"]


class Conversation:
    """The messages of one conversation.

    Args:
      template: The checkpoint's chat template.
      tokenizer: The checkpoint's tokenizer.
      stop_ids: Token ids that end an answer.

    Attributes:
      messages: The messages of the user and of the assistant, alternating.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._prompt = ""
        self.messages: list[dict[str, str]] = []

    def ask(self, text: str) -> list[int]:
        """Adds a message of the user; returns the prompt ids for the answer."""
        self.messages.append({"role": "user", "content": text})
        self._prompt = self._template.render(self.messages)
        # The template writes the special tokens itself.
        return self._tokenizer.encode(self._prompt, special=False)

    def follow(self, prompt_ids: list[int], output_ids: list[int], text: str) -> list[int]:
        """Adds an answer and the user's next message; returns the prompt ids for the next answer.

        If the new text continues the old one, so do the ids, and the cache has all the earlier
        ones. Some templates change earlier messages (they drop reasoning, or strip whitespace).
        Then the entire text is encoded again, and the cache has the common prefix.
        """
        stopped = bool(output_ids) and output_ids[-1] in self._stop_ids
        kept = output_ids[:-1] if stopped else output_ids
        answer = self._tokenizer.continuation(prompt_ids, kept)
        self.messages.append({"role": "assistant", "content": answer})
        known = self._prompt + answer
        ids = self.ask(text)
        if not self._prompt.startswith(known):
            return ids
        rest = self._prompt[len(known) :]
        more = self._tokenizer.encode(rest, special=False) if rest else []
        return [*prompt_ids, *kept, *more]

    def next_request(self, request: Request, text: str, max_seq_len: int) -> Request:
        """The request for the answer to the user's message `text`, after a finished request.

        Raises:
          InputError: The conversation has become too long for a sequence.
        """
        ids = self.follow(request.prompt_ids, request.output_ids, text)
        if len(ids) >= max_seq_len:
            raise InputError(
                f"the conversation of prompt {request.index} has {len(ids)} tokens, but a sequence "
                f"may have {max_seq_len} in all; lower --max-new-tokens or raise --max-seq-len"
            )
        return Request(request.index, ids, request.max_new_tokens)

    def later_turns(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the user's later messages add, without the answers, to estimate the length
        of the conversation.
        """
        messages: list[Mapping[str, Any]] = list(self.messages)
        length, turns = len(self._prompt), []
        for text in texts:
            messages.append({"role": "assistant", "content": ""})
            messages.append({"role": "user", "content": text})
            rendered = self._template.render(messages)
            added = rendered[length:]
            turns.append(self._tokenizer.encode(added, special=False) if added else [])
            length = len(rendered)
        return turns
