"""An answer in several engine requests looks like one: tokens, text, log-probabilities, ends, in every output kind."""

from __future__ import annotations

import pytest

PROMPT, ANSWER = [1, 2, 3], [10, 11, 12, 13, 14, 15, 16]


def params(kind: str = "FINAL_ONLY", **options):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**{"max_tokens": 100, **options}, output_kind=RequestOutputKind[kind])


def engine(prompt_ids: list[int], p) -> list:
    """An engine that says ANSWER token by token, whatever part of it is in the prompt already, and then stops."""
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind

    start = len(prompt_ids) - len(PROMPT)
    assert prompt_ids == PROMPT + ANSWER[:start]
    said = ANSWER[start : start + p.max_tokens]
    reason = "stop" if start + len(said) == len(ANSWER) else "length"
    outputs = []
    for i in range(1, len(said) + 1):
        last = i == len(said)
        if p.output_kind is RequestOutputKind.FINAL_ONLY and not last:
            continue
        tokens = said[i - 1 : i] if p.output_kind is RequestOutputKind.DELTA else said[:i]
        answer = CompletionOutput(
            0, "".join(f"{t} " for t in tokens), tokens, float(len(tokens)), [{t: None} for t in tokens],
            finish_reason=reason if last else None,
        )  # fmt: skip
        outputs.append(RequestOutput("r", None, prompt_ids, None, [answer], last, num_cached_tokens=start))
    return outputs


def run(every: int, kind: str, limit: int = 100) -> list:
    from mem_triton_vllm.segments import OutputSegments

    segments = OutputSegments(PROMPT, params(kind), every, limit)
    seen = []
    while not segments.done:
        for output in engine(segments.prompt_ids, segments.params()):
            seen += segments.take(output)
    assert segments.generated == seen_tokens(seen, kind)
    return seen


def seen_tokens(outputs: list, kind: str) -> list[int]:
    return [t for o in outputs for t in o.outputs[0].token_ids] if kind == "DELTA" else outputs[-1].outputs[0].token_ids


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("kind", ["FINAL_ONLY", "CUMULATIVE", "DELTA"])
def test_the_caller_sees_one_answer(every, kind):
    seen, whole = run(every, kind), run(100, kind)
    assert seen_tokens(seen, kind) == ANSWER
    assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
    if kind == "FINAL_ONLY":
        assert len(seen) == 1
    for mine, one in zip(seen[-1:], whole[-1:], strict=True) if kind != "DELTA" else zip(seen, whole, strict=False):
        a, b = mine.outputs[0], one.outputs[0]
        assert (a.text, list(a.token_ids), a.cumulative_logprob, a.logprobs) == (
            b.text, list(b.token_ids), b.cumulative_logprob, b.logprobs,
        )  # fmt: skip
    assert all(o.prompt_token_ids == PROMPT and o.num_cached_tokens == 0 for o in seen)
    assert all(o.outputs[0].finish_reason is None for o in seen[:-1])


def test_the_limit_ends_the_answer_within_a_segment_and_at_its_edge():
    for limit in (1, 2, 3, 4, 5):
        (only,) = run(2, "FINAL_ONLY", limit)
        assert only.outputs[0].token_ids == ANSWER[:limit] and only.outputs[0].finish_reason == "length"


def test_a_seed_moves_on_with_the_segments():
    from mem_triton_vllm.segments import OutputSegments

    segments = OutputSegments(PROMPT, params(seed=5), 2, 100)
    assert (segments.params().seed, segments.params().max_tokens) == (5, 2)
    for output in engine(segments.prompt_ids, segments.params()):
        segments.take(output)
    assert segments.params().seed == 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"seed": 3, "temperature": 0.5, "repetition_penalty": 1.2, "logprobs": 2}, None),
        ({"n": 2}, "several answers"),
        ({"stop": "."}, "stop strings"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"prompt_logprobs": 1}, "prompt log"),
    ],
)
def test_what_a_continuation_would_start_over_keeps_one_piece(options, reason):
    from mem_triton_vllm.segments import fixed

    found = fixed(params(**options))
    assert found is None if reason is None else reason in found
