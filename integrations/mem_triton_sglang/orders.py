"""Calls that all schedulers carry out before the same forward pass (``runtime.worker.orders``): the front end's half.

SGLang's schedulers take the same requests in the same order, so a request of one token brings a call to all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from mem_triton.runtime.channel import FORGET, LEAVE, OUTCOME, ChannelError
from mem_triton.systems.payload import RequestPayload
from mem_triton_sglang.carrier import packed

LATE_SECONDS = 60.0
"""Seconds after the end of the request that brings a call, within which it is carried out."""


class BetweenSteps:
    """call: of the channel. generate: runs one of SGLang's requests. Example::

    answers = await between_steps("memoryllm", "write", ids)      # one a worker; ChannelError
    """

    def __init__(
        self,
        call: Callable[..., Awaitable[list[Any]]],
        generate: Callable[[GenerateReqInput, Any], AsyncGenerator[Any, None]],
    ) -> None:
        self._call, self._generate = call, generate

    async def __call__(self, *call: Any) -> list[Any]:
        order = uuid.uuid4().hex
        try:
            await self._call(LEAVE, order, *call)
            outcome = asyncio.ensure_future(self._call(OUTCOME, order))
            try:
                await self._bring(order)
                return await asyncio.wait_for(outcome, LATE_SECONDS)
            except TimeoutError:
                raise ChannelError(f"{call[1]}: no step has brought it in {LATE_SECONDS:.0f} s") from None
            finally:
                outcome.cancel()
        finally:
            with contextlib.suppress(ChannelError):
                await self._call(FORGET, order)

    async def _bring(self, order: str) -> None:
        """Run a request of one token, which takes the call to the workers with its step."""
        carried = packed(None, RequestPayload({}, order=order))
        params = {"max_new_tokens": 1, "temperature": 0.0, "custom_params": carried}
        obj = GenerateReqInput(input_ids=[0], sampling_params=params, rid=uuid.uuid4().hex, extra_key=order)
        obj.normalize_batch_and_arguments()
        async with contextlib.aclosing(self._generate(obj, None)) as outputs:
            async for _ in outputs:
                pass
