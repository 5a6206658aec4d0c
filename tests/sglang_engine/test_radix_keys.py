"""Which prefixes requests share, in SGLang's own radix caches: those whose tokens and visible references agree."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from mem_triton.store.pool.plan import FOREVER, Attachment
from mem_triton.systems.payload import RequestPayload, Segment, SystemPayload
from mem_triton_sglang import identity, radix_keys
from mem_triton_sglang.hooks import HOOKS
from mem_triton_sglang.identity import MARK, extra_key_of, parse

TARGET = "sglang.srt.mem_cache.radix_cache.RadixKey.__init__"
STOCK = (RadixKey.__init__,)  # in a tuple, because the registry replaces what modules hold by name

CACHES = ("rust", "python", "simulated")
"""SGLang's default, what it falls back to, and the one that orders the requests of a waiting queue."""


@pytest.fixture(scope="module", autouse=True)
def hooked():
    """RadixKey as a scheduler with memory has it, by SGLang's own registry."""
    HookRegistry.register(TARGET, radix_keys.after_init, HookType.AFTER)
    HookRegistry.apply_hooks()
    assert RadixKey.__init__ is not STOCK[0]
    yield
    RadixKey.__init__ = STOCK[0]
    del HookRegistry._hooks[TARGET]
    HookRegistry._patched.discard(TARGET)


@dataclass(frozen=True)
class Request:
    """What a test asks. suffix: what SGLang appends, a LoRA adapter's id."""

    tokens: tuple[int, ...]
    plan: tuple[Attachment, ...] = ()
    client: str | None = None
    session: str | None = None
    bank: str | None = "bank"
    suffix: str = ""

    @property
    def namespace(self) -> tuple[str | None, ...]:
        return self.client, self.session, self.bank, self.suffix

    @property
    def extra_key(self) -> str | None:
        segments = tuple(Segment(a.ref, a.first, a.end) for a in self.plan)
        payload = self.bank and RequestPayload({"memory": SystemPayload(self.bank, segments=segments)})
        return (extra_key_of(self.client, self.session, payload) or "") + self.suffix or None

    def seen_at(self, position: int) -> list[str]:
        return sorted(a.ref for a in self.plan if a.first <= position < a.end)

    def page(self, end: int) -> tuple:
        """All that the KV of a page that ends at ``end`` depends on."""
        return (*self.namespace, *((self.tokens[i], *self.seen_at(i)) for i in range(end)))


class Cache:
    """One of SGLang's radix caches, as its scheduler uses it: by tokens and an extra key."""

    def __init__(self, kind: str, page_size: int) -> None:
        self.page_size = page_size
        if kind == "simulated":
            self.tree = RadixCache.create_simulated(page_size=page_size)
            return
        allocator = TokenToKVPoolAllocator(1 << 14, torch.float32, "cpu", None, need_sort=False)
        parts = (ComponentType.FULL,)
        self.tree = UnifiedRadixCache(
            CacheInitParams(False, None, allocator, page_size, tree_components=parts, tree_core_backend=kind)
        )
        assert type(self.tree.tree_core).__name__.startswith("Rust") == (kind == "rust")

    def insert(self, tokens: tuple[int, ...], extra_key: str | None, slots: list[int]) -> None:
        key = RadixKey(array("q", tokens), extra_key).page_aligned(self.page_size)
        self.tree.insert(InsertParams(key=key, value=torch.tensor(slots[: len(key)], dtype=torch.int64)))

    def shared(self, tokens: tuple[int, ...], extra_key: str | None) -> list[int]:
        """The slots that a new request finds."""
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), extra_key)))
        if isinstance(self.tree, RadixCache):
            slots, node = [], found.last_device_node
            while node is not self.tree.root_node:
                slots, node = node.value.tolist() + slots, node.parent
        else:  # as the scheduler reads them, which looks for the root by the request's own key
            root = self.tree.root_node_handle(extra_key)
            slots = self.tree.tree_core.collect_full_device_indices(found.last_device_node, root).tolist()
        assert len(slots) == found.device_prefix_len
        return slots


@pytest.fixture(params=CACHES, scope="module")
def kind(request) -> str:
    return request.param


attachments = st.builds(
    lambda ref, first, length: Attachment(ref, first, FOREVER if length is None else first + length),
    st.sampled_from(["a@1", "a@2", "b@1"]),
    st.sampled_from([0, 5, 16, 20, 32]),
    st.sampled_from([0, 3, 16, 40, None]),
)


@st.composite
def requests(draw) -> Request:
    """Requests that agree in much, so that they share a lot and part in every way."""
    tokens = [7] * draw(st.integers(0, 50))
    for position in draw(st.lists(st.integers(0, 49), max_size=1)):
        tokens[position : position + 1] = [8] if position < len(tokens) else []
    plan = draw(st.one_of(st.just(()), st.lists(attachments, max_size=3).map(tuple)))
    bank = "bank" if plan else draw(st.sampled_from(["bank", None]))
    session = draw(st.sampled_from([None, None, "s@1"]))
    return Request(
        tuple(tokens),
        plan,
        draw(st.sampled_from([None, None, "c"])),
        session,
        bank,
        draw(st.sampled_from(["", "", "lora"])),
    )


@pytest.mark.parametrize("page_size", [1, 16])
@settings(max_examples=150, deadline=None)
@given(earlier=st.lists(requests(), min_size=1, max_size=4), new=requests())
def test_requests_share_exactly_the_pages_that_agree(kind, page_size, earlier, new):
    cache, owned = Cache(kind, page_size), {}
    for number, request in enumerate(earlier):
        slots = list(range(1 + 64 * number, 1 + 64 * number + len(request.tokens)))
        cache.insert(request.tokens, request.extra_key, slots)
        for end in range(page_size, len(slots) + 1, page_size):
            owned.setdefault(request.page(end), slots[end - page_size : end])
    expected = []
    for end in range(page_size, len(new.tokens) + 1, page_size):
        if new.page(end) not in owned:
            break
        expected += owned[new.page(end)]
    assert cache.shared(new.tokens, new.extra_key) == expected


PROMPT = tuple(range(100, 164))
ALICE = (Attachment("alice@1"),)
BOB = (Attachment("alice@1", end=32), Attachment("bob@1", first=32))
"""As alice up to its 32nd token."""


def shared_by(kind: str, first: Request, second: Request) -> int:
    cache = Cache(kind, 16)
    cache.insert(first.tokens, first.extra_key, list(range(1, 65)))
    return len(cache.shared(second.tokens, second.extra_key))


def test_a_prefix_is_shared_up_to_where_references_part(kind):
    assert shared_by(kind, Request(PROMPT, ALICE), Request(PROMPT, BOB)) == 32
    assert shared_by(kind, Request(PROMPT, ALICE), Request(PROMPT, ALICE)) == 64


def test_without_the_digests_a_prefix_would_be_shared_that_must_not_be(kind, monkeypatch):
    """Negative control of the token keys."""
    monkeypatch.setattr(radix_keys, "seen_tokens", lambda token_ids, stretches: token_ids)
    assert shared_by(kind, Request(PROMPT, ALICE), Request(PROMPT, BOB)) == 64


def test_without_the_hook_no_wrong_prefix_is_shared_but_no_right_one_either(kind, monkeypatch):
    """The extra key is whole by itself: a scheduler without the hook only computes what it could have shared."""
    monkeypatch.setattr(RadixKey, "__init__", STOCK[0])
    assert shared_by(kind, Request(PROMPT, ALICE), Request(PROMPT, BOB)) == 0
    assert shared_by(kind, Request(PROMPT, ALICE), Request(PROMPT, ALICE)) == 64


@pytest.mark.parametrize("seen_by_the_cache", [False, True])
def test_a_client_cannot_imitate_a_key(kind, seen_by_the_cache):
    """Neither the key that the front end made nor the namespace that the cache makes of it."""
    alice = Request(PROMPT, ALICE, session="alice@3")
    imitated = parse(alice.extra_key)[0] if seen_by_the_cache else alice.extra_key
    mallory = Request(PROMPT, client=imitated, bank=None)
    assert shared_by(kind, alice, mallory) == 0
    cache = Cache(kind, 16)
    tokens = radix_keys.seen_tokens(array("q", PROMPT), parse(alice.extra_key)[1] if seen_by_the_cache else ((0, 0),))
    cache.insert(alice.tokens, alice.extra_key, list(range(1, 65)))
    assert len(cache.shared(tuple(tokens), imitated)) == 64, "negative control: unquoted, it would reach alice's KV"


def test_plain_requests_are_left_alone():
    """The same objects, whatever key the client gave."""
    for given_key in (None, "mine", '{"mem_triton": 1}'):
        tokens, extra_key = array("q", PROMPT), extra_key_of(given_key)
        key = RadixKey(tokens, extra_key, False, 5, cache_salt="salt")
        assert extra_key == given_key and key.token_ids is tokens
        assert (key.extra_key, key.limit, key.cache_salt) == (given_key, 5, "salt")


def test_a_turned_key_keeps_its_limit_and_salt_and_the_request_its_tokens():
    tokens = array("q", PROMPT)
    key = RadixKey(tokens, Request(PROMPT, BOB).extra_key, limit=40, cache_salt="salt")
    assert list(tokens) == list(PROMPT) and len(key) == 40 and key.cache_salt == "salt"
    assert not key.extra_key.startswith(MARK) and all(0 <= token < 2**63 for token in key.token_ids)
    assert key[16:32].token_ids == key.token_ids[16:32] and key[16:32].extra_key == key.extra_key, "not turned again"


def test_digests_differ_between_front_ends(monkeypatch):
    """A client who knows names cannot look for references whose digests collide."""
    first = Request(PROMPT, ALICE).extra_key
    monkeypatch.setattr(identity, "_SECRET", b"another process")
    assert Request(PROMPT, ALICE).extra_key != first


def test_the_hook_is_in_the_table():
    assert HOOKS[TARGET] == ("mem_triton_sglang.radix_keys:after_init", HookType.AFTER)
