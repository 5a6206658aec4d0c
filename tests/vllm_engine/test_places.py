"""Answers in pieces under saturation: newcomers do not overtake them at a refresh. vLLM's real scheduler, no model."""

from __future__ import annotations

import pytest

from mem_triton.systems.payload import Place, RequestPayload, encode
from mem_triton.systems.request import CARRIER

BLOCK, PIECE = 16, 4


class Scheduled:
    """vLLM's scheduler of ``seats`` running requests and ``blocks`` KV blocks, and a model that says 7 again and again.

    The front end's part is played by tests: ``ended`` holds the pieces that are over.
    """

    def __init__(self, model: str, seats: int = 2, blocks: int = 64, policy: str = "fcfs") -> None:
        import torch
        from vllm.config import (
            CacheConfig,
            DeviceConfig,
            ModelConfig,
            ParallelConfig,
            SchedulerConfig,
            VllmConfig,
        )
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from mem_triton_vllm import register

        register()
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        config = VllmConfig(
            model_config=ModelConfig(model=model, dtype="float32", skip_tokenizer_init=True, max_model_len=512),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=seats,
                max_num_batched_tokens=512,
                max_model_len=512,
                is_encoder_decoder=False,
                policy=policy,
            ),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
        )
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = Scheduler(config, kv, StructuredOutputManager(config), block_size=BLOCK)
        self.requests, self.ended, self.cached = {}, [], {}

    def add(self, name: str, prompt: list[int], tokens: int, place: Place | None = None) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        extra = {CARRIER: encode(RequestPayload({}, place=place))} if place else None
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra)
        request = Request(name, prompt, params, None, block_hasher=self.hasher)
        self.requests[name] = request
        self.scheduler.add_request(request)

    def step(self) -> list[str]:
        """One step; names of the requests that ran."""
        from vllm.v1.outputs import ModelRunnerOutput

        planned = self.scheduler.schedule()
        for new in planned.scheduled_new_reqs:
            self.cached[new.req_id] = new.num_computed_tokens
        ran = list(planned.num_scheduled_tokens)
        said = [[7] for _ in ran]
        output = ModelRunnerOutput(
            req_ids=ran,
            req_id_to_index={name: i for i, name in enumerate(ran)},
            sampled_token_ids=said,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        self.scheduler.update_from_output(planned, output)
        self.ended += [name for name in ran if self.requests[name].is_finished()]
        return ran

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


@pytest.fixture
def model(tmp_path):
    from tests.support.models import save_tiny_model

    return str(save_tiny_model(tmp_path / "model"))


def saturated(model: str, thinks: int, pieces: int = 3, places: bool = True, **more) -> tuple[list[str], Scheduled]:
    """One answer in pieces and one whole, and newcomers behind them; the order in which they end.

    thinks: steps that the front end takes between two pieces.
    """
    served = Scheduled(model, **more)
    prompt, index, pause = list(range(100, 140)), 0, 0
    place = lambda i: Place("answer", i > 0, i < pieces - 1) if places else None  # noqa: E731
    served.add("answer.0", prompt, PIECE, place(0))
    served.add("other", list(range(200, 220)), 60)
    for i in range(6):
        served.add(f"newcomer.{i}", list(range(300 + 20 * i, 320 + 20 * i)), 10)
    for _ in range(200):
        served.step()
        if f"answer.{index}" in served.ended and index < pieces - 1:
            if pause < thinks:
                pause += 1
                continue
            index, pause = index + 1, 0
            served.add(f"answer.{index}", prompt + [7] * PIECE * index, PIECE, place(index))
        if len(served.ended) == pieces + 7:
            return served.ended, served
    raise AssertionError(served.ended)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("thinks", [0, 1, 3])
def test_newcomers_do_not_overtake_an_answer_at_its_refreshes(model, thinks, policy):
    ended, served = saturated(model, thinks, policy=policy)
    assert ended[:3] == ["answer.0", "answer.1", "answer.2"], ended
    assert [name for name in ended if "newcomer" in name] == [f"newcomer.{i}" for i in range(6)]
    assert served.cached["answer.1"] == 32 and served.cached["answer.2"] == 32, "its prefix is found"


def test_control_without_a_place_all_newcomers_overtake_it(model):
    ended, _ = saturated(model, 0, places=False)
    assert ended.index("answer.1") > ended.index("newcomer.4"), ended


def test_control_the_front_of_the_queue_alone_is_not_enough(model, monkeypatch):
    from mem_triton_vllm import places

    monkeypatch.setattr(places, "RESERVED_SECONDS", -1.0)
    ended, _ = saturated(model, 3)
    assert ended.index("answer.1") > ended.index("newcomer.0"), ended


def test_its_prefix_stays_where_newcomers_take_all_other_blocks(model):
    """13 blocks: the answer's 3 are all that is left when the others run."""
    for places, cached in ((True, 32), (False, 0)):
        served = Scheduled(model, seats=3, blocks=10)
        prompt = list(range(100, 140))
        served.add("answer.0", prompt, PIECE, Place("answer", False, True) if places else None)
        while "answer.0" not in served.ended:
            served.step()
        for i in range(4):  # they take whatever is free
            served.add(f"newcomer.{i}", list(range(300 + 40 * i, 340 + 40 * i)), 20)
        for _ in range(30):
            served.step()
        served.add("answer.1", prompt + [7] * PIECE, PIECE, Place("answer", True, False) if places else None)
        while "answer.1" not in served.ended:
            served.step()
        assert served.cached["answer.1"] == cached


@pytest.mark.parametrize("why", ["its client has left", "it ended by itself"])
def test_a_place_that_nobody_claims_is_given_up(model, why, monkeypatch):
    from vllm.v1.request import RequestStatus

    from mem_triton_vllm import places

    served = Scheduled(model)
    free = served.free_blocks
    served.add("answer.0", list(range(100, 140)), PIECE, Place("answer", False, True))
    if why == "it ended by itself":
        served.step()
        served.scheduler.finish_requests("answer.0", RequestStatus.FINISHED_STOPPED)
        assert served.free_blocks == free
        return
    while "answer.0" not in served.ended:
        served.step()
    assert served.free_blocks == free - 3
    now = places.time.monotonic() + places.RESERVED_SECONDS
    monkeypatch.setattr(places.time, "monotonic", lambda: now)
    served.step()
    assert served.free_blocks == free and served.scheduler.max_num_active_reqs == 2
    assert not served.scheduler.requests


def test_a_prefix_cache_can_be_reset_between_two_pieces(model):
    served = Scheduled(model)
    served.add("answer.0", list(range(100, 140)), PIECE, Place("answer", False, True))
    while "answer.0" not in served.ended:
        served.step()
    assert served.scheduler.reset_prefix_cache()


def test_a_scheduler_without_such_answers_stays_stock(model):
    served = Scheduled(model)
    served.add("plain", [1, 2, 3], 2)
    served.step()
    assert not {"schedule", "_free_blocks", "reset_prefix_cache", "_mem_triton"} & vars(served.scheduler).keys()
