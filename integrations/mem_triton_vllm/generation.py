"""A request with memory, from its first await to its last output: the same for both of vLLM's engines.

An engine hands in how it runs one request of its own. A request whose references change while it answers is served by
several of those.
"""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from mem_triton.runtime.frontend.continuation import NORMAL_ENDS
from mem_triton.runtime.frontend.memory import Opened
from mem_triton.systems.base import Outcome
from mem_triton_vllm.front_end import VLLMFrontEnd, add_report, count_tokens, tokens_so_far, with_tokens

Run = Callable[[Any, Any, str], AsyncGenerator[RequestOutput, None]]
"""run(prompt, params, request_id) -> the outputs of one engine request."""


async def generate(
    memory: VLLMFrontEnd,
    run: Run,
    prompt: Any,
    prompt_ids: list[int],
    params: SamplingParams,
    request_id: str,
    opened: Opened,
    prepared: Callable[[], None] = lambda: None,
) -> AsyncGenerator[RequestOutput, None]:
    """Outputs of the whole answer; the last one comes after the commit, so that the next request finds all free.

    prompt_ids: the prompt's tokens, needed of requests that wait. prepared: called when nothing that the request says
    can be at fault any more, and it only waits for what others do. Raises RequestError before anything runs,
    MemoryLoadError and MemoryLostError; what the request asked for besides and did not get is ``opened.failure``.
    """
    if opened.unscheduled:
        outputs = _unscheduled(memory, prompt_ids, params, request_id, opened, prepared)
    elif opened.waits:
        outputs = _pieces(memory, run, prompt, prompt_ids, params, request_id, opened, prepared)
    else:
        outputs = run(*memory.carry(prompt, params, opened), request_id)
    generated, answer, ended = 0, [], False
    try:
        async for output in outputs:
            memory.check(request_id, output.finished)
            generated = count_tokens(output, params.output_kind, generated)
            if opened.reads_answer:
                answer = tokens_so_far(output, params.output_kind, answer)
            if output.finished:
                normal, asked = output.outputs[0].finish_reason in NORMAL_ENDS, output.prompt_token_ids or ()
                read = functools.partial(_read, memory, run, prompt)
                ended = True
                await memory.end(opened, Outcome(normal, len(asked), generated, asked, answer), read)
                add_report(output, opened)
            yield output
    finally:
        try:
            await outputs.aclose()  # first: the engine may still read the request's pages
        finally:
            memory.close(opened) if ended else memory.abandon(opened)


async def _unscheduled(
    memory: VLLMFrontEnd,
    prompt_ids: list[int],
    params: SamplingParams,
    request_id: str,
    opened: Opened,
    prepared: Callable[[], None],
) -> AsyncGenerator[RequestOutput, None]:
    """Give the one output of a request that the engine does not run; what it asks for is done at its end."""
    await memory.prepare(opened, prompt_ids)
    prepared()
    logprobs = None if params.logprobs is None else []
    answer = CompletionOutput(0, "", [], None, logprobs, finish_reason="stop")
    yield RequestOutput(request_id, None, prompt_ids, None, [answer], finished=True, num_cached_tokens=0)


async def _pieces(
    memory: VLLMFrontEnd,
    run: Run,
    prompt: Any,
    prompt_ids: list[int],
    params: SamplingParams,
    request_id: str,
    opened: Opened,
    prepared: Callable[[], None],
) -> AsyncGenerator[RequestOutput, None]:
    """Serve a request in as many engine requests as what it reads changes."""
    await memory.prepare(opened, prompt_ids)
    prompt_ids = prompt_ids[opened.dropped :]
    answer = memory.cut_answer(opened, prompt_ids, params)
    prepared()
    while True:
        await memory.ready(opened)
        continued = with_tokens(prompt, answer.prompt_ids)
        carried = memory.carry(continued, answer.params(), opened, answer.place)
        async with contextlib.aclosing(run(*carried, request_id)) as outputs:
            async for output in outputs:
                for merged in answer.take(output):
                    yield merged
        if answer.done:
            return
        await memory.advance(opened, len(prompt_ids), answer.generated)


async def _read(memory: VLLMFrontEnd, run: Run, prompt: Any, ids: list[int], opened: Opened) -> None:
    """Run the engine request that reads text which is kept, in the prefix cache of the one that said it."""
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else getattr(prompt, "cache_salt", None)
    prompt = {"type": "token", "prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})}
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    request_id = f"mem_triton-capture-{uuid.uuid4().hex}"
    async with contextlib.aclosing(run(*memory.carry(prompt, params, opened), request_id)) as outputs:
        async for output in outputs:
            memory.check(request_id, output.finished)
