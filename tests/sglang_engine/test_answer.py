"""An answer in several SGLang requests looks like one: tokens, text, counts, log-probabilities, whole and streamed.

The engine here is a stand-in that answers and decodes as SGLang does, byte by byte; real answers in segments are
compared in ``test_memory_server``.
"""

from __future__ import annotations

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from mem_triton_sglang.answer import Answer, fixed

PROMPT = list(b"tell: ")
TEXT = "naïve €5, 日本 🙂 end"
ANSWER = list(TEXT.encode())


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def engine(request: GenerateReqInput, incremental: bool) -> list[dict]:
    """Says ANSWER, whatever part of it is in the prompt already, one token an output if it streams, and then stops."""
    start = len(request.input_ids) - len(PROMPT)
    assert request.text is None and request.input_ids == PROMPT + ANSWER[:start]
    said = ANSWER[start : start + request.sampling_params["max_new_tokens"]]
    reason = {"type": "stop"} if start + len(said) == len(ANSWER) else {"type": "length", "length": len(said)}
    tail = request.input_ids[-5:]
    outputs, sent, seen = [], "", 0
    for count in range(1, len(said) + 1):
        last = count == len(said)
        text = decode(tail + said[:count])[len(decode(tail)) :]
        if not last and text.endswith("\ufffd"):
            text = sent  # it waits for the rest of the character
        delta = request.stream and incremental
        meta = {
            "id": request.rid, "finish_reason": reason if last else None, "prompt_tokens": len(request.input_ids),
            "completion_tokens": count, "cached_tokens": start, "e2e_latency": 1.0,
            "output_token_logprobs": [[-1.0, t, None] for t in said[seen if delta else 0 : count]],
            "output_token_logprobs_length": count,
        }  # fmt: skip
        if request.stream or last:
            tokens, new = (said[seen:count], text[len(sent) :]) if delta else (said[:count], text)
            outputs.append({"text": new, "output_ids": tokens, "meta_info": meta})
            seen = count
        sent = text
    return outputs


def run(every: int, stream: bool = False, incremental: bool = False, limit: int = 100) -> list[dict]:
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": limit}, stream=stream, rid="r")
    answer, seen = Answer(obj, PROMPT, every, limit, incremental=incremental, decode=decode), []
    while not answer.done:
        for out in engine(answer.request(), incremental):
            if (shown := answer.take(out)) is not None:
                seen.append(shown)
    return seen


WAYS = {"whole": {}, "stream": {"stream": True}, "incremental": {"stream": True, "incremental": True}}


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 7, 10, 24, 100])
@pytest.mark.parametrize("way", WAYS)
def test_the_client_sees_one_answer(every, way):
    seen = run(every, **WAYS[way])
    last, meta = seen[-1], seen[-1]["meta_info"]
    if way == "whole":
        assert len(seen) == 1
    if way == "incremental":
        assert [t for out in seen for t in out["output_ids"]] == ANSWER
        assert "".join(out["text"] for out in seen) == TEXT
        assert [t for out in seen for _, t, _ in out["meta_info"]["output_token_logprobs"]] == ANSWER
    else:
        assert last["output_ids"] == ANSWER and last["text"] == TEXT
        assert [t for _, t, _ in meta["output_token_logprobs"]] == ANSWER
        assert all(TEXT.startswith(out["text"]) for out in seen), "nothing is taken back"
    assert [out["meta_info"]["finish_reason"] for out in seen] == [None] * (len(seen) - 1) + [{"type": "stop"}]
    assert meta["completion_tokens"] == meta["output_token_logprobs_length"] == len(ANSWER)
    assert (meta["prompt_tokens"], meta["cached_tokens"]) == (len(PROMPT), 0)
    assert meta["e2e_latency"] == -(-len(ANSWER) // every)


def test_the_limit_ends_the_answer_within_a_segment_and_at_its_edge():
    for limit in (1, 2, 3, 4, 5):
        (only,) = run(2, limit=limit)
        assert only["output_ids"] == ANSWER[:limit]
        assert only["meta_info"]["finish_reason"] == {"type": "length", "length": limit}


def test_an_abort_keeps_what_was_said():
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": 9})
    answer = Answer(obj, PROMPT, 4, 9, incremental=False, decode=decode)
    for out in engine(answer.request(), False):
        assert answer.take(out) is None
    ends = {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "completion_tokens": 0}}
    last = answer.take(ends)
    assert answer.done and last["output_ids"] == ANSWER[:4] and last["meta_info"]["completion_tokens"] == 4


@pytest.mark.parametrize("incremental", [False, True])
def test_an_answer_of_tokens_alone_gets_no_text(incremental):
    """--skip-tokenizer-init: SGLang's own outputs have no text either."""
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": 9}, stream=True)
    answer = Answer(obj, PROMPT, 4, 9, incremental=incremental, decode=None)
    while not answer.done:
        for out in engine(answer.request(), incremental):
            del out["text"]
            assert "text" not in answer.take(out)
    assert answer.generated == ANSWER[:9]


def test_a_seed_moves_on_with_the_segments():
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": 9, "sampling_seed": 5})
    answer = Answer(obj, PROMPT, 2, 9, incremental=False, decode=decode)
    assert answer.request().sampling_params == {"max_new_tokens": 2, "sampling_seed": 5}
    for out in engine(answer.request(), False):
        answer.take(out)
    assert answer.request().sampling_params["sampling_seed"] == 6
    assert obj.sampling_params["sampling_seed"] == 5, "the client's own stay as they are"


@pytest.mark.parametrize(
    ("params", "fields", "reason"),
    [
        ({}, {}, None),
        ({"sampling_seed": 3, "temperature": 0.5, "stop_token_ids": [2], "n": 2}, {"return_logprob": True}, None),
        ({"stop": "."}, {}, "stop strings"),
        ({"stop_regex": "a+"}, {}, "stop strings"),
        ({"json_schema": "{}"}, {}, "structured outputs"),
        ({"presence_penalty": 0.5}, {}, "penalties"),
        ({"repetition_penalty": 1.1}, {}, "penalties"),
        ({"repetition_penalty": 1.0, "frequency_penalty": 0}, {}, None),
        ({"min_new_tokens": 2}, {}, "min_new_tokens"),
        ({}, {"return_logprob": True, "logprob_start_len": 0}, "prompt log"),
        ({}, {"custom_logit_processor": "x"}, "logit processors"),
        ({}, {"return_hidden_states": True}, "hidden states"),
    ],
)
def test_what_a_continuation_would_start_over_keeps_one_piece(params, fields, reason):
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params=params, **fields)
    obj.normalize_batch_and_arguments() if params.get("n") is None else setattr(obj, "logprob_start_len", -1)
    found = fixed(obj, params)
    assert found is None if reason is None else reason in found
