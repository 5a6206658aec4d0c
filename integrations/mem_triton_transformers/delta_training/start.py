"""A start for the adapter from the frozen model's own activations, in closed form.

Where a reply needs a token that only the memory can know, the position before it asks, and the token's last place in
what was told answers. Keys and queries start as the linear maps under which these two agree best (canonical
correlation), gates as a classifier of such places, values as random codes of the token, and the correction of o as the
way back from the codes to the tokens' embeddings. Gradients do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem_triton.systems.delta_mem import DeltaMemConfig
from mem_triton.systems.delta_mem.training.tokens import Session, padded
from mem_triton.systems.recipes import RecipeError

SESSIONS, ROWS = 512, 32
GATE_THERE, GATE_ELSEWHERE = -3.9, -8.0
"""Of the gates, before the sigmoid: .02 and .0003. Every write also fades the older ones."""
VALUE_SIZE, SHARED_DIMS, OUTPUT_SIZE = 12.0, 48, 4.0


class CodedPairs:
    """Activations of one layer. asking, there: [N, d] each; tokens: [N]; told: [M, d], places: which of them hold
    something that is asked for."""

    def __init__(self) -> None:
        self.asking: list[Tensor] = []
        self.there: list[Tensor] = []
        self.told: list[Tensor] = []
        self.places: list[Tensor] = []
        self.tokens: list[int] = []


@torch.no_grad()
def closed_form(
    model: PreTrainedModel,
    config: DeltaMemConfig,
    sessions: Sequence[Session],
    seed: int,
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Set an adapter's fresh parameters, by their official names. Raises RecipeError if nothing can be recalled."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    useful = [s for s in sessions if any(s.recalled)][:SESSIONS]
    if not useful:
        raise RecipeError("--start: closed_form needs replies that repeat a token of what was told; use fresh")
    for name, pairs in _pairs(model, names, useful).items():
        generator = torch.Generator().manual_seed(seed)  # the same codes and mixtures in every layer
        for key, value in _tensors(model, config, pairs, len(names), generator).items():
            if f"{name}.{key}" in parameters:
                parameters[f"{name}.{key}"].copy_(value)


def _tensors(
    model: PreTrainedModel, config: DeltaMemConfig, pairs: CodedPairs, layers: int, generator: torch.Generator
) -> dict[str, Tensor]:
    asking, there = torch.stack(pairs.asking), torch.stack(pairs.there)
    heads, rank, width = config.num_state_heads, config.rank, asking.shape[-1]
    to_key, to_query, strength = agreeing_maps(there, asking)
    shared = min(max(SHARED_DIMS, rank), width)
    weight = strength[:shared].clamp_min(0).sqrt()[:, None]
    to_key, to_query = to_key[:shared] * weight, to_query[:shared] * weight
    mix = torch.cat([torch.linalg.qr(torch.randn(shared, rank, generator=generator))[0].T for _ in range(heads)])
    words, which = torch.tensor(pairs.tokens).unique(return_inverse=True)
    code = torch.randn(len(words), heads * rank, generator=generator).sign()
    told, places = torch.cat(pairs.told), torch.cat(pairs.places)
    gates = torch.where(places, GATE_THERE, GATE_ELSEWHERE) - config.beta_bias_init
    every = torch.where(places, 5.0, 1.0)[:, None]  # places are few
    gate = ridge(told * every, gates[:, None] * every)
    rows = config.spec.gate_width
    embedding = model.get_output_embeddings().weight[words.to(model.device)].float().cpu()
    word = F.normalize(embedding - embedding.mean(0), dim=-1) if len(words) > 1 else F.normalize(embedding, dim=-1)
    read = VALUE_SIZE * torch.sigmoid(torch.tensor(GATE_THERE)) * 0.6  # size of a code when it is read back
    return {
        "memory_k_proj": 0.8 * mix @ to_key,
        "memory_q_proj": 0.8 * mix @ to_query,
        "memory_v_proj": VALUE_SIZE * ridge(there, code[which]),
        "beta_proj": gate.expand(rows, width).clone(),
        "delta_o_proj": OUTPUT_SIZE / layers * word.T @ code / (heads * rank * read) / (config.alpha / rank),
    }


def _pairs(model: PreTrainedModel, names: Sequence[str], sessions: Sequence[Session]) -> dict[str, CodedPairs]:
    """What asks and what answers, in the inputs of the attention of each named layer."""
    found = {name: CodedPairs() for name in names}
    for begin in range(0, len(sessions), ROWS):
        batch = sessions[begin : begin + ROWS]
        told = [request.ids for session in batch for request in session.told]
        owner = [i for i, session in enumerate(batch) for _ in session.told]
        heard, asked = _inputs(model, names, told), _inputs(model, names, [s.asked.ids for s in batch])
        places: dict[int, set[int]] = {row: set() for row in range(len(told))}
        wanted = []  # session, position that asks, row of what was told, place in it, token
        for i, session in enumerate(batch):
            for j, recalled in enumerate(session.recalled):
                token = session.asked.ids[session.asked.reply + j]
                rows = [row for row, mine in enumerate(owner) if mine == i and token in told[row]] if recalled else []
                if rows:
                    place = len(told[rows[-1]]) - 1 - told[rows[-1]][::-1].index(token)
                    wanted.append((i, session.asked.reply + j - 1, rows[-1], place, token))
                    places[rows[-1]].add(place)
        for name, pairs in found.items():
            for i, position, row, place, token in wanted:
                pairs.asking.append(asked[name][i, position])
                pairs.there.append(heard[name][row, place])
                pairs.tokens.append(token)
            for row, ids in enumerate(told):
                pairs.told.append(heard[name][row, : len(ids)])
                pairs.places.append(torch.tensor([place in places[row] for place in range(len(ids))]))
    return found


def _inputs(model: PreTrainedModel, names: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Layer name -> its attention's input fp32 [B, T, d] on the CPU, of the frozen model."""
    found: dict[str, Tensor] = {}
    modules, handles = dict(model.named_modules()), []
    for name in names:

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            found[name] = hidden.float().cpu()

        handles.append(modules[name].register_forward_pre_hook(note, with_kwargs=True))
    ids, mask = (torch.tensor(x, device=model.device) for x in padded(rows, 0))
    try:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def ridge(x: Tensor, target: Tensor, strength: float = 1e-3) -> Tensor:
    """Linear map [out, d] from x [N, d] to target [N, out]."""
    x, target = x.double(), target.double()
    gram = x.T @ x / len(x)
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, x.T @ target / len(x)).T.float()


def agreeing_maps(a: Tensor, b: Tensor, strength: float = 1e-2) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical correlation analysis without intercepts: maps [d, d] of a and of b, and the correlations [d]."""
    roots, centred = [], []
    for x in (a.double(), b.double()):
        x = x - x.mean(0)
        gram = x.T @ x / len(x)
        gram += strength * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
        roots.append(torch.linalg.cholesky(gram))
        centred.append(x)
    cross = centred[0].T @ centred[1] / len(a)
    cross = torch.linalg.solve_triangular(roots[0], cross, upper=False)
    cross = torch.linalg.solve_triangular(roots[1], cross.T, upper=False).T
    left, strengths, right = torch.linalg.svd(cross)
    maps = []
    for x, root, basis in ((a, roots[0], left.T), (b, roots[1], right)):
        found = torch.linalg.solve_triangular(root.T, basis.T, upper=True).T.float()
        ones = ridge(x, torch.ones(len(x), 1))  # the projections have no bias: a direction that is constant stands in
        maps.append(found - (found @ x.mean(0))[:, None] * ones)
    return *maps, strengths.float()
