"""What one forward call of the model means to its memory: valid tokens, write mode, and the states it will leave."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mem_triton_transformers.contexts import CACHES, Contexts, cache_of, length_of


class ModelCall:
    """Follows forward calls of the model from the outermost one, by hooks, and commits new states when it ends well.

    The outermost call matters for two reasons. It gets the caller's 2-D attention mask; a layer sees a 4-D mask whose
    meaning depends on the attention implementation (sdpa: True = attend, eager: 0 = attend), the confusion that makes
    the official code ignore every token of a later turn under sdpa. And a call that fails halfway must leave every
    layer's state as it was.
    """

    def __init__(self) -> None:
        self.write_enabled = True
        self.segments: dict[str, Tensor] | None = None  # for the next call: "message" and "sentence" ids [B, T]
        self.layers: dict[str, Any] = {}  # name -> DeltaLayer
        self.contexts = Contexts()
        self._signatures: dict[nn.Module, inspect.Signature] = {}
        self._running: list[nn.Module] = []  # the calls in progress, outermost first
        self._mask: Tensor | None = None  # [B, past + T], nonzero = valid; None = all valid
        self._token_mask: Tensor | None = None  # [B, T] of this call
        self._staged: dict[str, Tensor] = {}
        self._given: tuple[Tensor | None, Any, int | None] = (None, None, 0)  # tokens, cache and its length before

    def attach(self, module: nn.Module) -> list[Any]:
        """Follow calls of ``module``, a model or its decoder; returns the hooks' handles."""
        self._signatures[module] = inspect.signature(module.forward)
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def check_active(self, layer: str) -> None:
        """Raise unless the layer runs inside a call of the model."""
        if not self._running:
            raise RuntimeError(
                f"{layer} was run outside of a call of its model, so its tokens would be written to memory out of "
                "turn. Gradient checkpointing re-runs layers in this way: call model.gradient_checkpointing_disable()"
            )

    def token_mask(self, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Validity of this call's tokens, bool [B, T]; None = all valid."""
        if self._mask is None:
            return None
        if self._token_mask is None or self._token_mask.device != device:
            if self._mask.shape[0] != batch or self._mask.shape[1] < tokens:
                raise ValueError(
                    f"attention_mask has shape {tuple(self._mask.shape)}, expected ({batch}, at least {tokens})"
                )
            self._token_mask = self._mask[:, -tokens:].to(device) != 0  # a mask over past tokens too ends with ours
        return self._token_mask

    def segment_ids(self, granularity: str, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Id of the segment that each token belongs to [B, T], -1 = none; None = write token by token."""
        if granularity == "token" or self.segments is None:
            return None
        ids = self.segments["message"].to(device)
        if granularity == "sentence_mean":
            if "sentence" not in self.segments:
                return None
            ids = self.segments["sentence"].to(device).masked_fill(ids < 0, -1)
        if ids.shape != shape:
            raise ValueError(
                f"set_write_segments got ids of shape {tuple(ids.shape)}, but the next call has tokens of shape "
                f"{tuple(shape)}; pass the ids of exactly that call"
            )
        return ids

    def stage(self, layer: str, state: Tensor) -> None:
        """Remember a layer's new state until the call has ended well."""
        self._staged[layer] = state

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module in self._running:  # left over from a call that was interrupted, e.g. by Ctrl-C
            del self._running[self._running.index(module) :]
        self._running.append(module)
        if len(self._running) > 1:
            return
        self._mask, self._token_mask, self._staged = None, None, {}
        self._given = None, None, 0
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "cu_seq_lens_q: several sequences packed into one row would share a memory; give each a row of its own "
                "(padded, with an attention_mask), and use generate() rather than continuous batching"
            )
        given = self._signatures[module].bind_partial(*args, **kwargs).arguments
        mask = _argument(given, "attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError(
                "mem_triton needs the 2-D attention_mask [batch, tokens] to know which tokens are padding, got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. generate() makes "
                "such masks for static caches: leave cache_implementation at its default"
            )
        self._mask = mask
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        cache = next((c for name in CACHES if (c := _argument(given, name)) is not None), None)
        self._given = tokens, cache, length_of(cache)
        if self.write_enabled:
            self.contexts.check(tokens, cache)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in self._running:
            del self._running[self._running.index(module) :]
        if self._running:
            return
        if output is not None:  # None: the call raised
            for name, state in self._staged.items():
                self.layers[name].state = state
            self.segments = None
            if self._staged:
                tokens, cache, past = self._given
                self.contexts.commit(tokens, cache_of(output) if cache is None else cache, past)
        self._mask, self._token_mask, self._staged = None, None, {}
        self._given = None, None, 0


def _argument(given: Mapping[str, Any], name: str) -> Any:
    """An argument of a forward call by name, whether the method names it or takes it among its ``**kwargs``."""
    return given.get(name, given.get("kwargs", {}).get(name))
