"""An answer in several SGLang requests looks like one: tokens, text, counts, log-probabilities, whole and streamed.

The engine here is a stand-in that answers and decodes as SGLang does, byte by byte; real continued answers are
compared in ``test_memory_server``.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from mem_triton.systems.explicit.user_turn import UserTurns
from mem_triton_sglang.continuation import CUTTABLE, CUTTABLE_FIELDS, ContinuedAnswer, fixed, fixed_by_engine

PROMPT = list(b"tell: ")
TEXT = "naïve €5, 日本 🙂 end"
ANSWER = list(TEXT.encode())


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def engine(
    request: GenerateReqInput, incremental: bool, answer: list[int] = ANSWER, prompt_tokens: int = len(PROMPT)
) -> list[dict]:
    """Says ``answer``, whatever part of it is in the prompt already, one token an output if it streams, and stops."""
    start = len(request.input_ids) - prompt_tokens
    assert request.text is None and request.input_ids[prompt_tokens:] == answer[:start]
    said = answer[start : start + request.sampling_params["max_new_tokens"]]
    reason = {"type": "stop"} if start + len(said) == len(answer) else {"type": "length", "length": len(said)}
    tail = request.input_ids[-5:]
    outputs, sent, seen = [], "", 0
    for count in range(1, len(said) + 1):
        last = count == len(said)
        text = decode(tail + said[:count])[len(decode(tail)) :]
        if not last and text.endswith("\ufffd"):
            text = sent  # it waits for the rest of the character
        delta = request.stream and incremental
        meta = {
            "id": request.rid,
            "finish_reason": reason if last else None,
            "prompt_tokens": len(request.input_ids),
            "completion_tokens": count,
            "cached_tokens": start,
            "e2e_latency": 1.0,
            "output_token_logprobs": [[-1.0, t, None] for t in said[seen if delta else 0 : count]],
            "output_token_logprobs_length": count,
        }
        if request.stream or last:
            tokens, new = (said[seen:count], text[len(sent) :]) if delta else (said[:count], text)
            outputs.append({"text": new, "output_ids": tokens, "meta_info": meta})
            seen = count
        sent = text
    return outputs


def run(every: int, stream: bool = False, incremental: bool = False, limit: int = 100) -> list[dict]:
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": limit}, stream=stream, rid="r")
    answer, seen = ContinuedAnswer(obj, PROMPT, every, limit, incremental=incremental, decode=decode), []
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


def test_the_limit_ends_the_answer_within_a_request_and_at_its_edge():
    for limit in (1, 2, 3, 4, 5):
        (only,) = run(2, limit=limit)
        assert only["output_ids"] == ANSWER[:limit]
        assert only["meta_info"]["finish_reason"] == {"type": "length", "length": limit}


def test_an_abort_keeps_what_was_said():
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": 9})
    answer = ContinuedAnswer(obj, PROMPT, 4, 9, incremental=False, decode=decode)
    for out in engine(answer.request(), False):
        assert answer.take(out) is None
    ends = {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "completion_tokens": 0}}
    last = answer.take(ends)
    assert answer.done and last["output_ids"] == ANSWER[:4] and last["meta_info"]["completion_tokens"] == 4


@pytest.mark.parametrize("incremental", [False, True])
def test_an_answer_of_tokens_alone_gets_no_text(incremental):
    """--skip-tokenizer-init: SGLang's own outputs have no text either."""
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": 9}, stream=True)
    answer = ContinuedAnswer(obj, PROMPT, 4, 9, incremental=incremental, decode=None)
    while not answer.done:
        for out in engine(answer.request(), incremental):
            del out["text"]
            assert "text" not in answer.take(out)
    assert answer.generated == ANSWER[:9]


def test_a_seed_moves_on_with_the_requests():
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params={"max_new_tokens": 9, "sampling_seed": 5})
    answer = ContinuedAnswer(obj, PROMPT, 2, 9, incremental=False, decode=decode)
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
        ({}, {"custom_logit_processor": "x"}, "logits processors"),
        ({}, {"return_hidden_states": True}, "hidden states"),
        ({}, {"max_thinking_tokens": 0}, "a thinking budget"),
    ],
)
def test_what_a_continuation_would_start_over_keeps_one_piece(params, fields, reason):
    obj = GenerateReqInput(input_ids=PROMPT, sampling_params=params, **fields)
    obj.normalize_batch_and_arguments() if params.get("n") is None else setattr(obj, "logprob_start_len", -1)
    found = fixed(obj, params)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 2, 3, 64])
def test_fault05_text_is_that_of_the_tokens_wherever_the_answer_is_cut(way, every):
    """Bytes at random: most of them are no characters, and some begin one that the next ones do not complete."""
    for seed in range(6):
        said = random.Random(seed).choices([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x41], k=40)
        for prompt in (PROMPT, [*PROMPT, 0xF0, 0x9F])[: 1 if every > 40 else 2]:  # one piece is SGLang's own
            obj = GenerateReqInput(input_ids=prompt, sampling_params={"max_new_tokens": 40}, rid="r")
            obj.stream = way != "whole"
            answer = ContinuedAnswer(obj, prompt, every, 41, incremental=way == "incremental", decode=decode)
            seen = []
            while not answer.done:
                for out in engine(answer.request(), way == "incremental", said, len(prompt)):
                    if (shown := answer.take(out)) is not None:
                        seen.append(shown)
            text = "".join(o["text"] for o in seen) if way == "incremental" else seen[-1]["text"]
            assert text == decode(said)


def test_fault05_a_stop_token_is_no_text():
    for stop, text in ((False, "na"), (True, "naï")):
        params = {"max_new_tokens": 9, "no_stop_trim": stop}
        answer = ContinuedAnswer(
            GenerateReqInput(input_ids=PROMPT, sampling_params=params),
            PROMPT,
            2,
            9,
            incremental=False,
            decode=lambda tokens: bytes(tokens).decode("latin-1"),
        )
        ends = {"type": "stop", "matched": 0xEF}
        for tokens, reason in (([*b"na"], {"type": "length", "length": 2}), ([0xEF], ends)):
            meta = {"finish_reason": reason, "completion_tokens": len(tokens)}
            last = answer.take({"text": "", "output_ids": tokens, "meta_info": meta})
        assert last["text"] == text and last["output_ids"] == [*b"na", 0xEF]


def test_fault06_every_parameter_and_field_is_either_known_to_be_cuttable_or_keeps_one_piece():
    """What a later SGLang adds keeps one piece until somebody has looked at it."""
    parameters = set(SamplingParams.__struct_fields__)
    assert parameters >= CUTTABLE
    plain = GenerateReqInput(input_ids=PROMPT, sampling_params={})
    plain.normalize_batch_and_arguments()
    for name in parameters - CUTTABLE:
        assert fixed(plain, {name: 7}), name
    fields = {f.name for f in dataclasses.fields(GenerateReqInput)}
    assert fields >= CUTTABLE_FIELDS
    for name in fields - CUTTABLE_FIELDS:
        obj = copy.copy(plain)
        setattr(obj, name, 7)
        assert fixed(obj, {}), name
    everyday = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "sampling_seed": 1, "logit_bias": {"5": 1}}
    everyday |= {"stop_token_ids": [2], "ignore_eos": True, "skip_special_tokens": False, "stop": [], "regex": None}
    assert fixed(plain, {**everyday, "custom_params": {"mem_top_k": 1}, "frequency_penalty": 0.0}) is None


def test_fault06_watermarks_of_a_server_keep_one_piece():
    assert fixed_by_engine(SimpleNamespace(enable_watermark=False)) is None
    assert fixed_by_engine(SimpleNamespace(enable_watermark=True)) == "watermarks"


def test_fault24_turns_are_learnt_from_the_tokenizers_template(monkeypatch):
    from mem_triton_sglang import tokenizer_manager as module
    from tests.support.models import tiny_tokenizer

    made = {}

    def front_end(config, shape, services, **more):
        made["render"] = services.render
        return SimpleNamespace()

    shape = SimpleNamespace(tp_size=1, pp_spans=((0, 2),))
    monkeypatch.setattr(module, "shape_of", lambda *_: shape)
    monkeypatch.setattr(module.MemoryFrontEnd, "of", front_end)
    manager = object.__new__(module.TokenizerManagerWithMemory)
    manager.server_args, manager.model_config = SimpleNamespace(max_loaded_loras=None), None
    manager.lora_ref_cache = {}
    manager.tokenizer = tiny_tokenizer()
    monkeypatch.setattr(module, "Client", lambda ranks: SimpleNamespace(call=print))
    monkeypatch.setenv(module.VARIABLE, "/nowhere")
    manager.start_memory(None)
    turns = UserTurns.of(made["render"])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who has the key?"}]
    assert turns.last(made["render"](chat)) == "Who has the key?"


@pytest.mark.parametrize("told", [{"input_embeds": [[0.0]]}, {"input_ids": [1]}], ids=["embeddings", "tokens"])
def test_fault27_prompts_given_as_embeddings_are_named_and_tokens_are_plain(told):
    """What a system refuses by name where memory would be read."""
    from mem_triton_sglang.tokenizer_manager import _unfit

    kind = _unfit(GenerateReqInput(sampling_params={}, **told))
    assert kind == ("prompts given as embeddings" if "input_embeds" in told else None)
