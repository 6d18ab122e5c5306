"""The engine: lists and streams of requests, on top of `EngineCore`."""

from collections.abc import Iterator, Sequence

from jax_kvpage.serving.beams import Params
from jax_kvpage.serving.engine.core import EngineCore
from jax_kvpage.serving.outputs import RequestOutput
from jax_kvpage.serving.params import SamplingParams

__all__ = ["Engine"]


class Engine(EngineCore):
    """Generates tokens for requests that come and go.

    A context manager; `close` ends all requests and gives their memory back. The pool stays open.

    Args:
        step: the model: `step(params, cache, tokens, batch) -> (logits, cache)` with tokens
            int32[T], a ragged `Batch` of S sequences, and logits float[n, vocabulary] of
            the rows `batch.last_rows`: S of them, and more where guesses are verified. It is
            compiled for each bucket, and must not call `advance`. Over a pool with replicas
            (`data_axis`), tokens, batch and logits have an equal part for each of them, as
            `jax_kvpage.spread` makes them; so have the arrays inside of the step.
        params: its first argument, any pytree of arrays.
        pool: the memory. While the engine runs, only the engine makes caches of it. If it has a
            store, preempted requests of one sequence wait there, and prompts that it has are read
            before their requests start, while others run: where that takes less time than to
            compute the tokens, by the speeds that the engine measures. `EngineConfig.namespace`
            lets an engine find what one before it has stored. If it has replicas, one step serves
            them all; each request runs on one, where it costs least, and those of a replica whose
            memory runs out wait or are preempted while the others go on.
        config: options.
        detokenize: from ids to text, for `CompletionOutput.text` and stop strings.
        tokenizer: for `SamplingParams.structured_outputs`: a `tokenizers.Tokenizer`, its JSON text,
            or an `llguidance.LLTokenizer`. Needs llguidance: `pip install 'jax_kvpage[guided]'`.
        draft: a smaller model that guesses the tokens that a step verifies, in place of prompt
            lookup. What the engine samples decides: outputs stay the same. Not with replicas.
        clock: seconds, for deadlines and metrics.

    Attributes:
        config: the options.
        scheduler: decides what runs.
        closed: whether `close` was called.

    Raises:
        ValueError: options that do not fit each other or the pool.
        ModuleNotFoundError: a tokenizer without llguidance.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params | Sequence[Params] | None = None,
    ) -> list[RequestOutput]:
        """Runs requests to their end.

        Args:
            prompts: token ids of each.
            params: for all, or for each.

        Returns:
            Their outputs, in order. Requests that were added before are served as well.

        Raises:
            ValueError: a prompt or parameters that the engine cannot serve; nothing has run.
            RequestRefused: a request can never run, or the queue is full; nothing has run.
        """
        outputs = self._add_all(prompts, params)
        try:
            while not all(output.finished for output in outputs):
                self.step()
        finally:  # an exception or Ctrl-C
            for output in outputs:
                self.cancel(output)
        return outputs

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params | Sequence[Params] | None = None,
    ) -> Iterator[RequestOutput]:
        """Runs requests and yields each one's output whenever it has more tokens.

        Requests are added at the first `next`. Ending the iteration cancels what is unfinished.
        Several streams may be read in turn: each serves the others' requests too.

        Args:
            prompts: token ids of each.
            params: for all, or for each.

        Yields:
            The output of one of the requests: the same object every time, with all tokens so far.

        Raises:
            ValueError: as for `generate`.
            RequestRefused: as for `generate`.
        """
        outputs = self._add_all(prompts, params)
        try:
            left = dict.fromkeys(range(len(outputs)), 0)
            while left:
                for i in list(left):
                    output = outputs[i]
                    count = sum(len(each.token_ids) for each in output.outputs)
                    more = count > left[i] or output.finished
                    left[i] = count
                    if output.finished:
                        del left[i]
                    if more:
                        yield output
                if left:
                    self.step()
        finally:
            for output in outputs:
                self.cancel(output)

    def _add_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params | Sequence[Params] | None,
    ) -> list[RequestOutput]:
        """Adds requests; none if one is refused."""
        if params is None or isinstance(params, Params):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"Engine: {len(prompts)} prompts, but {len(params)} params")
        outputs: list[RequestOutput] = []
        try:
            for prompt, each in zip(prompts, params, strict=True):
                outputs.append(self.add_request(prompt, each))
        except BaseException:
            for output in outputs:
                self.cancel(output)
            raise
        return outputs
