"""Prompts are cut if a step would otherwise be padded far beyond its tokens."""

from __future__ import annotations

import bisect

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_model import PlainMemory, Server

from jax_kvpage.serving import Watermark

SIZES = (8, 32, 128, 512, 2048)


def server_of(sizes: tuple[int, ...] = SIZES, blocks: int = 1000) -> Server:
    return Server(
        PlainMemory(blocks, 16, 4096, 12, 0),
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        step_sizes=sizes,
        admission=Watermark(),
    )


def test_a_prompt_fills_steps() -> None:
    server = server_of()
    server.add(num_prompt_tokens=1088, max_tokens=2)
    plans = [server.step() for _ in range(4)]
    assert [plan.counts.tolist() for plan in plans] == [[512], [512], [64], [1]]
    assert [plan.samples.tolist() for plan in plans] == [[False], [False], [True], [True]]


def test_without_sizes_nothing_is_cut() -> None:
    server = server_of(())
    server.add(num_prompt_tokens=1088, max_tokens=2)
    assert server.step().counts.tolist() == [1088]


def test_each_new_request_still_starts() -> None:
    server = server_of()
    for _ in range(3):
        server.add(num_prompt_tokens=400, max_tokens=2)
    # The last prompt is cut to one token, and continues in the next step.
    assert server.step().counts.tolist() == [400, 111, 1]
    assert server.step().counts.tolist() == [1, 289, 222]
    assert server.step().counts.tolist() == [1, 127]
    server.run()


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    sizes=st.sets(st.integers(8, 2047), max_size=4),
    drafts=st.sampled_from([0, 3]),
)
def test_padding_stays_small_where_prompts_can_be_cut(
    prompts: list[int], sizes: set[int], drafts: int
) -> None:
    server = server_of((*sizes, 8, 2048))
    ordered = sorted({8, 2048} | sizes)
    for number, tokens in enumerate(prompts):
        server.add(num_prompt_tokens=tokens, max_tokens=1 + number % 3, n=1 + number % 2)
    while server.scheduler.has_unfinished:
        plan = server.step(drafts=drafts)  # checks the plan, and that nothing is computed twice
        if plan.is_empty or plan.num_tokens in ordered:
            continue
        at = bisect.bisect_left(ordered, plan.num_tokens)
        spare = int((plan.counts[plan.num_decodes :] - 1).sum())
        if at and plan.num_tokens - ordered[at - 1] <= spare:
            assert ordered[at] - plan.num_tokens <= max(256, ordered[at] / 4)
        assert server.steps < 1000
