"""An answer in several engine requests looks like one: tokens, text, log-probabilities, ends, in every output kind."""

from __future__ import annotations

import copy
import random
from pathlib import Path

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
            0,
            "".join(f"{t} " for t in tokens),
            tokens,
            float(len(tokens)),
            [{t: None} for t in tokens],
            finish_reason=reason if last else None,
        )
        outputs.append(RequestOutput("r", None, prompt_ids, None, [answer], last, num_cached_tokens=start))
    return outputs


def run(every: int, kind: str, limit: int = 100) -> list:
    from mem_triton_vllm.continuation import ContinuedAnswer

    answer = ContinuedAnswer(PROMPT, params(kind), every, limit)
    seen = []
    while not answer.done:
        for output in engine(answer.prompt_ids, answer.params()):
            seen += answer.take(output)
    assert answer.generated == seen_tokens(seen, kind)
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
            b.text,
            list(b.token_ids),
            b.cumulative_logprob,
            b.logprobs,
        )
    assert all(o.prompt_token_ids == PROMPT and o.num_cached_tokens == 0 for o in seen)
    assert all(o.outputs[0].finish_reason is None for o in seen[:-1])


def test_the_limit_ends_the_answer_within_a_request_and_at_its_edge():
    for limit in (1, 2, 3, 4, 5):
        (only,) = run(2, "FINAL_ONLY", limit)
        assert only.outputs[0].token_ids == ANSWER[:limit] and only.outputs[0].finish_reason == "length"


def test_a_seed_moves_on_with_the_requests():
    from mem_triton_vllm.continuation import ContinuedAnswer

    answer = ContinuedAnswer(PROMPT, params(seed=5), 2, 100)
    assert (answer.params().seed, answer.params().max_tokens) == (5, 2)
    for output in engine(answer.prompt_ids, answer.params()):
        answer.take(output)
    assert answer.params().seed == 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"seed": 3, "temperature": 0.5, "repetition_penalty": 1.2, "logprobs": 2}, None),
        ({"n": 2}, "several answers"),
        ({"stop": "."}, "stop strings"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"prompt_logprobs": 0}, "prompt log"),
    ],
)
def test_what_a_continuation_would_start_over_keeps_one_piece(options, reason):
    from mem_triton_vllm.continuation import fixed

    found = fixed(params(**options))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words": ["AB"]},
        {"thinking_token_budget": 5},
        {"frequency_penalty": 0.1},
        {"flat_logprobs": True},
        {"trace_decode_token_ids": [1, 2]},
        {"routed_experts_prompt_start": 2},
        {"watermarking": True},
        {"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 0},
        {"repetition_detection": {"max_pattern_size": 2, "min_count": 3}},
    ],
)
def test_fault06_what_looks_back_over_the_answer_keeps_one_piece(options):
    from vllm.sampling_params import RepetitionDetectionParams

    from mem_triton_vllm.continuation import fixed

    if "repetition_detection" in options:
        options = {"repetition_detection": RepetitionDetectionParams(**options["repetition_detection"])}
    assert fixed(params(**options)) in (*options, "penalties")


def test_fault06_every_parameter_is_either_known_to_be_cuttable_or_keeps_one_piece():
    """A parameter that a later vLLM adds keeps one piece until somebody has looked at it."""
    from vllm import SamplingParams

    from mem_triton_vllm.continuation import CUTTABLE, fixed

    assert set(SamplingParams.__struct_fields__) >= CUTTABLE
    for name in set(SamplingParams.__struct_fields__) - CUTTABLE:
        asked = params()
        setattr(asked, name, 7)
        assert fixed(asked), name
    everyday = params(
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        seed=1,
        logit_bias={5: 1.0},
        allowed_token_ids=[1],
        stop_token_ids=[2],
        ignore_eos=True,
        logprobs=2,
        skip_special_tokens=False,
        stop=[],
        bad_words=[],
        repetition_penalty=1.1,
        extra_args={"mem_top_k": 1},
    )
    everyday.update_from_generation_config({"eos_token_id": [3, 4]})
    assert fixed(everyday) is None


def test_fault06_custom_logits_processors_and_watermarks_of_an_engine_keep_one_piece():
    from types import SimpleNamespace as Config

    from mem_triton_vllm.continuation import fixed_by_engine

    def engine_of(processors=None, watermark=None):
        return Config(model_config=Config(logits_processors=processors), watermark_config=watermark)

    assert fixed_by_engine(engine_of()) is None
    assert fixed_by_engine(engine_of(["my.Processor"])) == "custom logits processors"
    assert fixed_by_engine(engine_of(watermark={})) == "watermarks"


MODEL = Path(__file__).parents[2] / "benchmarks/recall/model-memory"
HALVES = [175, 256, 250, 227, 35]  # bytes of the shipped model's tokenizer: most are parts of characters


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def processed(tokenizer, prompt_ids: list[int], p, said: list[int], reason: str, first: int = 0) -> list:
    """What vLLM's own output processor makes of a request whose core says ``said``; with ``n``, each answer alike.

    first: the tokens said before, of which log-probabilities are made.
    """
    import numpy as np
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.outputs import LogprobsLists

    processor = OutputProcessor(tokenizer, log_stats=False)
    request = EngineCoreRequest("r-0", prompt_ids, None, p, None, 0.0, None, None, None, external_req_id="r")
    parent = ParentRequest(request) if p.n > 1 else None
    ids = []
    for index in range(p.n):
        child = copy.copy(request)
        if parent is not None:
            child.request_id, child.sampling_params = parent.get_child_info(index)
        processor.add_request(child, None, parent, index)
        ids.append(child.request_id)
    outputs = []
    for i, token in enumerate(said):
        rows = [np.array([[token]]), np.array([[-float(first + i)]]), np.array([1])]
        logprobs = LogprobsLists(*rows) if p.logprobs is not None else None
        end = FinishReason[reason.upper()] if i == len(said) - 1 else None
        for id in ids:  # one at a time, as a step may end any of them
            core = EngineCoreOutput(id, [token], new_logprobs=logprobs, finish_reason=end)
            outputs += processor.process_outputs([core]).request_outputs
    return outputs


def cut(tokenizer, said: list[int], every: int, kind: str, prompt: list[int], text: bool = True, **options) -> list:
    """The outputs that a client sees of an answer ``said`` that ends by length and is cut after ``every`` tokens."""
    from mem_triton_vllm.answer_text import AnswerText
    from mem_triton_vllm.continuation import ContinuedAnswer

    p = params(kind, max_tokens=len(said), **options)
    answer = ContinuedAnswer(prompt, p, every, len(said), AnswerText(tokenizer, prompt, p) if text else None)
    seen = []
    while not answer.done:
        start, coming = len(answer.generated), answer.params()
        part = said[start : start + coming.max_tokens]
        for output in processed(tokenizer, answer.prompt_ids, coming, part, "length", start):
            seen += answer.take(output)
    return seen


def told(outputs: list, kind: str) -> tuple[str, list[str]]:
    """The text that a client has at the end, and its log-probabilities' texts."""
    parts = outputs if kind == "DELTA" else outputs[-1:]
    entries = [e for o in parts for e in o.outputs[0].logprobs or ()]
    return "".join(o.outputs[0].text for o in parts), [p.decoded_token for e in entries for p in e.values()]


@pytest.mark.parametrize("kind", ["FINAL_ONLY", "CUMULATIVE", "DELTA"])
@pytest.mark.parametrize("every", [1, 2, 3, 64])
def test_fault05_text_is_that_of_the_tokens_wherever_the_answer_is_cut(tokenizer, every, kind):
    prompt = tokenizer.encode("<|im_start|>user\nThe locker of Mara is falcon.<|im_end|>\n", add_special_tokens=False)
    texts = ["a 🙂 ok", "한국어 ok", "naïve 中文 🙂", "plain"]
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers += [random.Random(seed).choices(HALVES, k=40) for seed in range(8)]
    for said in answers:
        outputs = cut(tokenizer, said, every, kind, prompt)
        assert told(outputs, kind)[0] == tokenizer.decode(said)
        assert seen_tokens(outputs, kind) == said


def test_fault05_control_engine_requests_alone_print_the_prompt(tokenizer):
    prompt = tokenizer.encode("The locker of Mara is falcon.", add_special_tokens=False)
    said = tokenizer.encode("a 🙂 ok", add_special_tokens=False)
    text, _ = told(cut(tokenizer, said, 3, "FINAL_ONLY", prompt, text=False), "FINAL_ONLY")
    assert "locker" in text


@pytest.mark.parametrize("kind", ["FINAL_ONLY", "CUMULATIVE", "DELTA"])
def test_fault05_log_probabilities_keep_their_characters_and_their_sum(tokenizer, kind):
    prompt = tokenizer.encode("Say it.", add_special_tokens=False)
    said = tokenizer.encode("a 🙂 中 ok", add_special_tokens=False)
    whole = cut(tokenizer, said, 64, kind, prompt, logprobs=0)
    for every in (1, 2, 3, 5):
        seen = cut(tokenizer, said, every, kind, prompt, logprobs=0)
        assert told(seen, kind) == told(whole, kind)
        if kind != "DELTA":
            assert seen[-1].outputs[0].cumulative_logprob == whole[-1].outputs[0].cumulative_logprob


@pytest.mark.parametrize("kind", ["FINAL_ONLY", "CUMULATIVE", "DELTA"])
def test_fault05_a_prompt_that_ends_within_a_character_is_not_told(tokenizer, kind):
    half = tokenizer.encode("The locker is 🙂", add_special_tokens=False)[:-1]
    said = tokenizer.encode("a 🙂 ok", add_special_tokens=False)
    assert told(cut(tokenizer, said, 3, kind, half), kind)[0] == tokenizer.decode(said)


@pytest.mark.parametrize("kind", ["FINAL_ONLY", "CUMULATIVE", "DELTA"])
def test_fault04_every_answer_of_several_is_told_to_its_end(tokenizer, kind):
    from mem_triton_vllm.continuation import ContinuedAnswer

    p = params(kind, n=3, max_tokens=4)
    answer = ContinuedAnswer(PROMPT, p, 4, 4)
    outputs = processed(tokenizer, answer.prompt_ids, answer.params(), [100, 101, 102, 103], "length")
    seen = [merged for output in outputs for merged in answer.take(output)]
    assert answer.done and seen[-1].finished and not any(o.finished for o in seen[:-1])
    answers = {i: [] for i in range(3)}
    for output in seen:
        for answer in output.outputs:
            new = list(answer.token_ids)
            answers[answer.index] = answers[answer.index] + new if kind == "DELTA" else new
    assert answers == {i: [100, 101, 102, 103] for i in range(3)}
