"""δ-mem's half of the front end: a request's session, its lease, and the commit of its last state.

Workers keep no session: the state that a request starts from travels with it, and its last state is fetched when it has
ended normally.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from mem_triton.config import MemTritonConfig
from mem_triton.delta_mem import DeltaMemAdapter
from mem_triton.runtime import counters
from mem_triton.runtime.request import MemoryRequest, RequestError
from mem_triton.runtime.sessions import Lease, SessionStore, StateLayout, layer_order

logger = init_logger("vllm.mem_triton")

NORMAL_ENDS = ("stop", "length")


def architecture_fingerprint(vllm_config: VllmConfig) -> str:
    """sha256 of the model's architecture and sizes: what a session state must have been made with."""
    fields = vllm_config.model_config.hf_text_config.to_dict()
    sizes = {k: v for k, v in fields.items() if isinstance(v, (int, float, str, list)) and not k.startswith("_")}
    for unstable in ("transformers_version", "dtype", "torch_dtype", "name_or_path"):
        sizes.pop(unstable, None)
    return hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()


class SessionFrontEnd:
    """Opens and closes the session of each request; one per engine front end."""

    def __init__(self, vllm_config: VllmConfig, config: MemTritonConfig, adapter: DeltaMemAdapter) -> None:
        names = sorted(adapter.layers, key=layer_order)
        layout = StateLayout(
            tuple(names), adapter.config.spec.heads, adapter.config.spec.rank, adapter.fingerprint,
            architecture_fingerprint(vllm_config),
        )  # fmt: skip
        self.store = SessionStore(layout, config.session_dir, config.max_sessions)
        self._session_obstacle = self._find_session_obstacle(vllm_config)
        self._aborted: deque[str] = deque(maxlen=4096)  # workers forget old states by themselves, too

    @staticmethod
    def _find_session_obstacle(vllm_config: VllmConfig) -> str | None:
        parallel = vllm_config.parallel_config
        if parallel.data_parallel_size > 1:
            return "sessions need --data-parallel-size 1: each data-parallel engine has a front end of its own"
        if getattr(parallel, "_api_process_count", 1) > 1:
            return "sessions need --api-server-count 1: each API server would keep versions of its own"
        if vllm_config.speculative_config is not None:
            return "sessions do not work with speculative decoding: a rejected draft would be committed"
        if vllm_config.model_config.enable_prompt_embeds:
            return "sessions do not work with --enable-prompt-embeds: such prompts have no tokens to count"
        return None

    def open(self, request: MemoryRequest, prompt: Any, params: SamplingParams) -> Lease:
        """The request's lease; plain requests get one too, of a memory that starts empty. Raises RequestError."""
        if request.session is not None:
            self._check_session(prompt, params)
        return self.store.open(request)

    def carried(self, lease: Lease) -> dict[str, Any]:
        """What the workers need: nothing for a plain request."""
        carried: dict[str, Any] = {} if lease.request.write else {"write": 0}
        if lease.request.session is not None:
            carried |= {"write": int(lease.request.write), "lease": lease.id, "state": lease.start.data}
        return carried

    def _check_session(self, prompt: Any, params: SamplingParams) -> None:
        if self._session_obstacle:
            raise RequestError("mem_session", self._session_obstacle)
        if params.n != 1:
            raise RequestError("mem_session", f"a session takes one answer at a time: set n to 1, got {params.n}")
        if isinstance(prompt, AsyncGenerator):
            raise RequestError("mem_session", "streaming inputs cannot use a session")

    def abort(self, lease: Lease | None) -> None:
        """End a request that commits nothing; workers forget its state at the next commit."""
        if lease is None:
            return
        if lease.request.session and lease.request.write:
            self._aborted.append(lease.id)
        self.store.close(lease)

    def commits(self, lease: Lease | None, output: RequestOutput) -> bool:
        """Whether this finished output ends a request that writes its session."""
        writes = lease is not None and lease.request.session is not None and lease.request.write
        return writes and output.finished and output.outputs[0].finish_reason in NORMAL_ENDS

    def take_arguments(self, lease: Lease, output: RequestOutput, generated: int) -> tuple[str, int, list[str]]:
        """Arguments of ``TAKE_STATE``: the lease, the position of its last processed token, and leases to forget.

        The last sampled token was never fed to the model, so it is not part of the state.
        """
        forget = list(self._aborted)
        self._aborted.clear()
        prompt_tokens = len(output.prompt_token_ids or ())
        return lease.id, max(prompt_tokens - 1, prompt_tokens + generated - 2), forget

    def commit(self, lease: Lease, position: int, parts: list[dict[str, Any]]) -> None:
        """Put the workers' layers together and commit them. parts: one answer per worker, ranks repeat layers."""
        try:
            layers = {i: part["states"][i] for part in parts for i in part["states"]}
            reached = max(part["position"] for part in parts)
            states = b"".join(layers[str(i)] for i in range(len(self.store.layout.layers)))
            version = self.store.commit(lease, states, tokens=reached + 1)
        except Exception:
            counters.COMMIT_FAILURES.inc()
            raise
        finally:
            self.store.close(lease)
        counters.COMMITS.inc()
        if reached != position:
            counters.LATE_COMMITS.inc()
        logger.debug("session %s: version %d, %d tokens", lease.request.session, version, reached + 1)
