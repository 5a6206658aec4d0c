"""Keys of vLLM's KV blocks, from its own function: what a block's tokens saw, and of which bank. No engine starts."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.v1.core import kv_cache_utils

from mem_triton.store.pool.plan import Attachment
from mem_triton.systems.payload import RequestPayload, Segment, SystemPayload, encode
from mem_triton.systems.request import CARRIER
from mem_triton_vllm import block_keys


@pytest.fixture
def extra_keys():
    """vLLM's function as an engine with memory has it; gives a request's keys of block 16..31."""
    with ExitStack() as undo:
        block_keys.install(undo)

        def keys(carried: object, salt: str | None = None) -> tuple:
            request = SimpleNamespace(
                request_id="r",
                mm_features=[],
                lora_request=None,
                cache_salt=salt,
                prompt_embeds=None,
                sampling_params=SamplingParams(extra_args={CARRIER: carried} if carried else None),
            )
            found, next_image = kv_cache_utils.generate_block_hash_extra_keys(request, 16, 32, 0)
            assert next_image == 0
            return found

        yield keys


def memory(bank: str, *plan: Attachment) -> bytes:
    segments = tuple(Segment(a.ref, a.first, a.end) for a in plan)
    return encode(RequestPayload({"memory": SystemPayload(bank, segments=segments)}))


def test_fault29_blocks_that_saw_another_bank_or_other_references_are_not_shared(extra_keys):
    alice = Attachment("alice@1")
    carried = [
        memory("one", alice),
        memory("other", alice),
        memory("one", Attachment("bob@1")),
        memory("one"),
        memory("other"),
        memory("one", alice, Attachment("bob@1", 16, 24)),
        None,
    ]
    assert len({extra_keys(each) for each in carried}) == len(carried)
    assert extra_keys(carried[0]) == extra_keys(memory("one", alice)), "the same memory shares its blocks"
    assert extra_keys(memory("one", alice, Attachment("bob@1", 64))) == extra_keys(carried[0]), "what comes later"
    assert extra_keys(None) is None, "plain requests keep vLLM's keys"


def test_fault29_a_memory_that_cannot_be_read_shares_its_blocks_with_nobody(extra_keys):
    """The scheduler goes on, and what it cannot tell apart it keeps apart."""
    broken = extra_keys(b"no msgpack")
    assert broken not in (None, extra_keys(memory("one")), extra_keys(memory("one", Attachment("?"))))
    assert "r" in broken[-1]
