"""Forward calls over sessions: states go from request to request, and long requests are walked in chunks.

A chunk is one call of the model, a function of its tokens, of the keys and values before it and of the states; with
``recompute`` nothing inside it is kept for the backward pass, which computes it again (torch.utils.checkpoint). So
memory grows with a chunk, and with the keys and values, not with the activations of a conversation, and gradients are
those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import DynamicCache, PreTrainedModel

from mem_triton.systems.delta_mem.training.tokens import Request, padded
from mem_triton_transformers.attach import memory_of
from mem_triton_transformers.memory import reset_memory, set_memory, set_memory_write

States = tuple[Tensor, ...]
"""One [B, H, r, r] a layer with memory, in the layers' order."""


class Replies(NamedTuple):
    """What predicts the replies of a batch: logits fp32 [N, vocab], labels [N], the row of each [N]."""

    logits: Tensor
    labels: Tensor
    rows: Tensor

    def losses(self) -> Tensor:
        """Negative log likelihood of each label [N]."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")

    def exact(self, count: int) -> Tensor:
        """Which of ``count`` rows have the label as the likeliest token throughout, as greedy decoding would give."""
        wrong = self.rows[self.logits.argmax(-1) != self.labels]
        return torch.ones(count, dtype=torch.bool, device=wrong.device).index_fill(0, wrong, False)


class SessionRunner:
    """Runs requests of several sessions through a model with a trainable adapter.

    chunk_tokens: most tokens of one call. pad: id that fills short rows up. recompute: keep nothing of a call for the
    backward pass. gate_target: ``tell`` then measures the write gates above it.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int, pad: int = 0) -> None:
        self.model, self.chunk_tokens, self.pad = model, chunk_tokens, pad
        self.memory = memory_of(model)
        self.names = list(self.memory.layers)
        self.modules = dict(model.named_modules())
        indices = [int(part) for name in self.names for part in name.split(".") if part.isdecimal()]
        self.last_layer = max(indices) + 1  # layers behind it cannot matter to the states
        self.recompute = False
        self.gate_target: float | None = None
        self.excess: list[tuple[Tensor, int]] = []  # of each call of ``tell``: sum above the target, and of how many

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.get_input_embeddings().weight.device

    def zeros(self, rows: int) -> States:
        """Empty states."""
        spec, weight = self.memory.config.spec, self.model.get_input_embeddings().weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        shape = (rows, spec.heads, spec.rank, spec.rank)
        return tuple(torch.zeros(shape, dtype=exact, device=weight.device) for _ in self.names)

    def tell(self, told: Sequence[Sequence[Request]], states: States | None = None) -> States:
        """The states after all requests of each row, one after the other. told: one list a row, of any lengths."""
        states = self.zeros(len(told)) if states is None else states
        self.excess = []
        for turn in range(max(map(len, told), default=0)):
            rows = [i for i, requests in enumerate(told) if len(requests) > turn]
            index = torch.tensor(rows, device=self.device)
            ids = [told[i][turn].ids for i in rows]
            _, after = self.run(ids, tuple(s[index] for s in states), write=True, layers=self.last_layer)
            states = tuple(s.index_copy(0, index, new) for s, new in zip(states, after, strict=True))
        return states

    def gate_excess(self) -> Tensor:
        """Mean of the write gates above ``gate_target`` over all tokens and layers of the last ``tell``."""
        return sum(total for total, _ in self.excess) / max(1, sum(count for _, count in self.excess))

    def ask(self, requests: Sequence[Request], states: States | None, write: bool) -> Replies:
        """Logits of the replies. states: None with ``write`` off is the frozen model, bit for bit."""
        hidden, _ = self.run([request.ids for request in requests], states, write)
        rows, columns, labels = [], [], []
        for i, request in enumerate(requests):
            count = len(request.ids) - request.reply
            rows += [i] * count
            columns += range(request.reply - 1, len(request.ids) - 1)
            labels += request.ids[request.reply :]
        row, column = torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device)
        logits = self.model.get_output_embeddings()(hidden[row, column])
        exact = torch.promote_types(logits.dtype, torch.float32)
        return Replies(logits.to(exact), torch.tensor(labels, device=self.device), row)

    def run(
        self, rows: Sequence[Sequence[int]], states: States | None, write: bool, layers: int | None = None
    ) -> tuple[Tensor, States]:
        """Hidden states [B, T, d] of one request a row, and the states after it.

        layers: only so many of the model's; what comes out is then no hidden state of use.
        """
        ids, mask = (torch.tensor(x, device=self.device) for x in padded(rows, self.pad))
        target = self.gate_target if layers is not None else None  # of now, also where a call is computed again
        cuts = range(0, ids.shape[1], self.chunk_tokens)
        hidden, past = [], []  # past: for each chunk, keys and values of each layer in turn
        for begin in cuts:
            end = begin + self.chunk_tokens
            call = partial(
                self._call,
                ids[:, begin:end],
                mask[:, :end],
                write,
                layers,
                target,
                len(cuts) > 1,
                len(past),
                states is None,
            )
            given = (*(states or ()), *(tensor for chunk in past for tensor in chunk))
            if self.recompute and torch.is_grad_enabled():
                with set_checkpoint_early_stop(False):  # a call is left by its end, so that its hooks do not lose track
                    out = checkpoint(call, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                out = call(*given)
            hidden.append(out[0])
            new, past_of_call = out[2 : 2 + len(self.names)], out[2 + len(self.names) :]
            states = tuple(new) if write or states is not None else None
            past.append(tuple(past_of_call))
            if target is not None:
                self.excess.append((out[1], int(mask[:, begin:end].sum()) * len(self.names)))
        return torch.cat(hidden, 1), states if states is not None else self.zeros(len(rows))

    def _call(
        self,
        ids: Tensor,
        mask: Tensor,
        write: bool,
        layers: int | None,
        target: float | None,
        keep: bool,
        chunks: int,
        empty: bool,
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        """One call of the model: hidden states, the gates' excess, the states after it, keys and values if ``keep``."""
        count = 0 if empty else len(self.names)
        states, past = given[:count], given[count:]
        reset_memory(self.model)
        if not empty:
            set_memory(self.model, dict(zip(self.names, states, strict=True)))
        set_memory_write(self.model, write)
        cache, before = DynamicCache() if keep else None, 0
        if past:
            each = len(past) // chunks
            for i in range(each // 2):
                keys, values = (torch.cat(past[2 * i + j :: each], dim=2) for j in (0, 1))
                cache.update(keys, values, i)
            before = cache.get_seq_length()
        with first_layers(self.model, layers), self._gates(target, mask[:, -ids.shape[1] :]) as excess:
            hidden = self.model.base_model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=keep
            ).last_hidden_state
        after = [self.memory.layers[name].state for name in self.names]
        if any(state is None for state in after):
            after = list(self.zeros(len(ids)))
        kept = [t[:, :, before:] for layer in cache.layers for t in (layer.keys, layer.values)] if keep else []
        total = torch.stack(excess).sum() if excess else hidden.new_zeros(())
        return (hidden, total, *after, *kept)

    @contextmanager
    def _gates(self, target: float | None, valid: Tensor) -> Any:
        """Collect each layer's sum of the write gates above a target meanwhile, if there is one. valid: [B, T]."""
        found: list[Tensor] = []

        def collect(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            weight, bias = module.beta_proj.to(hidden.dtype), module.beta_bias
            gates = torch.sigmoid(F.linear(hidden, weight).to(bias.dtype) + bias)
            found.append((F.relu(gates - target).mean(-1) * valid).sum())

        modules = [self.modules[n] for n in self.names] if target is not None else []
        handles = [module.register_forward_pre_hook(collect, with_kwargs=True) for module in modules]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def first_layers(model: PreTrainedModel, count: int | None) -> Any:
    """Let the model run only its first ``count`` layers meanwhile, where its code goes by the configured number."""
    config = model.base_model.config
    before = config.num_hidden_layers
    config.num_hidden_layers = count or before
    try:
        yield
    finally:
        config.num_hidden_layers = before


def another(states: States) -> States:
    """Each row's states replaced by those of the row before."""
    return tuple(state.roll(1, 0) for state in states)


def chosen(states: States, rows: Sequence[int]) -> States:
    """The states of some rows."""
    return tuple(state[list(rows)] for state in states)
