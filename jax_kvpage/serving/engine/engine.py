"""The engine: batches and streams of requests on top of `EngineCore`."""

from collections.abc import Iterator, Sequence

from jax_kvpage.serving.beams import Params
from jax_kvpage.serving.engine.core import EngineCore
from jax_kvpage.serving.outputs import RequestOutput
from jax_kvpage.serving.params import SamplingParams

__all__ = ["Engine"]


class Engine(EngineCore):
    """Generates tokens for requests that come and go.

    A context manager; `close` ends all requests and releases their memory. The pool stays open.

    Args:
        step: the model: `step(params, cache, tokens, batch) -> (logits, cache)`, with tokens
            int32[T], a ragged `Batch` of S sequences, and logits float[n, vocabulary] of the rows
            `batch.last_rows`: n is S, or more if guesses are verified. It is compiled for each
            bucket, and must not call `advance`. On a pool with replicas (`data_axis`), tokens,
            batch and logits, as well as arrays inside the step, have an equal part for each
            replica, as made by `jax_kvpage.spread`.
        params: first argument of `step`, any pytree of arrays.
        pool: the memory. While the engine runs, only the engine may create caches of the pool. If
            the pool has a store, preempted requests with one sequence are swapped out to it, and
            stored prompts are read before their requests start, while others run; both only if that
            takes less time than recomputing the tokens at the measured speeds.
            `EngineConfig.namespace` lets an engine find what an earlier one has stored. If the pool
            has replicas, one step serves all of them. Each request runs on the replica where it
            costs least; when a replica runs out of memory, its requests wait or are preempted while
            the others continue.
        config: engine options.
        detokenize: converts token ids to text, for `CompletionOutput.text` and stop strings.
        tokenizer: tokenizer for `SamplingParams.structured_outputs`: a `tokenizers.Tokenizer`, its
            JSON text, or an `llguidance.LLTokenizer`. Needs llguidance: `pip install
            'jax_kvpage[guided]'`.
        draft: a smaller model that guesses the tokens that a step verifies, instead of prompt
            lookup. Outputs stay the same, because the engine's own samples decide. Not supported
            with replicas.
        clock: returns seconds, for deadlines and metrics.

    Attributes:
        config: the options.
        scheduler: decides what runs.
        closed: whether `close` was called.

    Raises:
        ValueError: the options are not compatible with each other or with the pool.
        ModuleNotFoundError: a tokenizer is given, but llguidance is not installed.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params | Sequence[Params] | None = None,
    ) -> list[RequestOutput]:
        """Runs requests to completion.

        Args:
            prompts: token ids of each prompt.
            params: parameters for all prompts, or one for each.

        Returns:
            The outputs, in order. Requests that were added before are served as well.

        Raises:
            ValueError: the engine cannot serve a prompt or its parameters; nothing was run.
            RequestRefused: a request can never run, or the queue is full; nothing was run.
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
        """Runs requests and yields the output of each whenever it has more tokens.

        Requests are added at the first `next`. Ending the iteration cancels unfinished requests.
        Several streams may be read in turn: each also serves the requests of the others.

        Args:
            prompts: token ids of each prompt.
            params: parameters for all prompts, or one for each.

        Yields:
            The output of one request: always the same object for a request, with all tokens so far.

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
        """Adds all requests, or none if one is refused."""
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
