"""Entry point of requests: checks and completes prompts and parameters.

A refused request leaves no trace.
"""

import itertools
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from jax_kvpage._arrays import token_ids_of
from jax_kvpage._values import as_text, raise_all
from jax_kvpage.serving.beams import BeamSearchParams, Params
from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.guidance import Guidance
from jax_kvpage.serving.engine.interrupts import HeldInterrupts
from jax_kvpage.serving.engine.ledger import Ledger
from jax_kvpage.serving.engine.pool_memory import PoolMemory
from jax_kvpage.serving.engine.scheduling import AnyScheduler
from jax_kvpage.serving.engine.tracking import RequestState
from jax_kvpage.serving.outputs import RequestMetrics, RequestOutput
from jax_kvpage.serving.params import SamplingParams
from jax_kvpage.serving.prefixes import PrefixKeys
from jax_kvpage.serving.request import Request
from jax_kvpage.serving.text import Detokenize

__all__ = ["Intake"]


class Intake:
    """Checks and queues requests.

    Args:
        config: configuration of the engine.
        scheduler: decides whether they can run.
        ledger: records accepted requests.
        memory: memory of the pool.
        detokenize: detokenizer of the engine, if any.
        clock: returns seconds.
        guidance: compiles grammars for constrained decoding; None without a tokenizer.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: AnyScheduler,
        ledger: Ledger,
        memory: PoolMemory,
        detokenize: Detokenize | None,
        clock: Callable[[], float],
        guidance: Guidance | None,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._ledger = ledger
        self._detokenize = detokenize
        self._clock = clock
        self._guidance = guidance
        self._namespace = config.namespace or ""
        if config.namespace is None:
            self._namespace = f"jax_kvpage.serving {uuid.uuid4().hex}"
        self._prefixes = PrefixKeys(memory.block_tokens)
        self._shares = memory.shares
        self._seeds = np.random.default_rng(config.seed)
        self._ids = itertools.count()

    def add(
        self,
        prompt: Sequence[int],
        wanted: Params,
        *,
        request_id: object,
        priority: int,
        deadline: float | None,
        namespace: str | None,
    ) -> RequestOutput:
        """See `EngineCore.add_request`."""
        config = self._config
        if not isinstance(wanted, Params):
            raise ValueError(
                "Engine.add_request: params: wanted SamplingParams or BeamSearchParams, got "
                f"{wanted!r}"
            )
        ids, space = _token_ids(prompt), self.namespace_of(namespace)
        searched = wanted if isinstance(wanted, BeamSearchParams) else None
        params = _checked(wanted, config, self._detokenize is not None, self._shares)
        guide = None
        if params.structured_outputs is not None:
            guide = self.guidance().guide(params)
        request_id = next(self._ids) if request_id is None else request_id
        key, shared = None, 0
        if params.prompt_logprobs is not None:
            # The prompt only finds its own tokens after a preemption: those have been scored.
            space = f"{space}\nprompt_logprobs {uuid.uuid4().hex}"
        elif config.prefix_caching:
            key, shared = self._prefixes.find(ids, space)
        request = Request(
            request_id=request_id,
            num_prompt_tokens=len(ids),
            max_tokens=params.max_tokens,
            n=params.n,
            priority=priority,
            deadline=deadline,
            prefix_key=key,
            num_prefix_tokens=shared,
            num_slots=2 * params.n if searched else 0,
            lockstep=searched is not None,
        )
        output = RequestOutput(request_id, ids, [], RequestMetrics(self._clock()))
        group = state = None
        try:
            with HeldInterrupts():
                group = self._scheduler.add(request)
                seed = params.seed
                seed = int(self._seeds.integers(2**32)) if seed is None else seed
                eos, text = config.eos_token_ids, self._detokenize
                state = RequestState(output, params, seed, eos, text, space, guide, searched)
                self._ledger.add(state, group)
        except BaseException:  # such as Ctrl-C: the caller never learns of this request
            if group is not None:
                self._scheduler.cancel(group)
            if state is not None:
                self._ledger.end(state, "cancelled")
            raise
        return output

    def guidance(self) -> Guidance:
        """The grammar compiler; raises a ValueError without a tokenizer."""
        if self._guidance is None:
            raise ValueError(
                "Engine.add_request: structured_outputs needs an engine with `tokenizer`"
            )
        return self._guidance

    def namespace_of(self, name: str | None) -> str:
        """See `EngineCore.namespace_of`."""
        if name is None:
            return self._namespace
        return f"{self._namespace}\n{as_text('Engine: namespace', name, 'a str or None')}"


def _token_ids(prompt: Sequence[int]) -> list[int]:
    """Checks and converts a prompt."""
    if isinstance(prompt, str):
        raise ValueError("Engine: prompt is text, wanted token ids")
    sequences, single = token_ids_of("Engine: prompt", prompt)
    if not single:
        raise ValueError("Engine: prompt: wanted the ids of one sequence, got a list of sequences")
    ids = sequences[0].tolist()
    if not ids:
        raise ValueError("Engine: the prompt is empty, wanted at least one token")
    if min(ids) < 0:
        raise ValueError(f"Engine: prompt: wanted token ids, got {min(ids)} to {max(ids)}")
    return ids


def _checked(params: Params, config: EngineConfig, has_text: bool, shares: bool) -> SamplingParams:
    """Checks parameters against what the engine can serve.

    Args:
        params: parameters of a request.
        config: configuration of the engine.
        has_text: whether the engine has a detokenizer.
        shares: whether sequences of its pool can share blocks.

    Returns:
        The sampler's parameters.

    Raises:
        ValueError: the engine cannot serve the request; one error lists all reasons.
    """
    reasons = []
    if not shares and (params.n > 1 if isinstance(params, SamplingParams) else True):
        reasons.append(
            "samples (n > 1) and beams need forks, which a pool whose sequences are spread over a "
            "mesh (sequence_axis) does not have: add a request for each sample"
        )
    most = config.max_logprobs
    if isinstance(params, BeamSearchParams):
        eos = () if params.ignore_eos else config.eos_token_ids
        params = params.sampling(len({*params.stop_token_ids, *eos}))
        if params.logprobs is not None and params.logprobs > most:
            reasons.append(
                f"beam_width {params.n} looks at {params.logprobs} candidates of each beam, but "
                f"max_logprobs is {most}"
            )
    elif params.logprobs is not None and params.logprobs > most:
        reasons.append(f"logprobs is {params.logprobs}, but max_logprobs is {most}")
    if params.prompt_logprobs is not None and not config.prompt_logprobs:
        reasons.append("prompt_logprobs needs EngineConfig(prompt_logprobs=True)")
    elif params.prompt_logprobs is not None and params.prompt_logprobs > most:
        reasons.append(f"prompt_logprobs is {params.prompt_logprobs}, but max_logprobs is {most}")
    if params.stop and not has_text:
        reasons.append("stop strings need an engine with `detokenize`")
    most = config.max_stop_token_ids
    eos = () if params.ignore_eos else config.eos_token_ids
    stops = len({*params.stop_token_ids, *eos})
    if params.min_tokens and stops > most:
        reasons.append(f"min_tokens with {stops} stop tokens: max_stop_token_ids is {most}")
    raise_all("Engine.add_request", reasons)
    return params
