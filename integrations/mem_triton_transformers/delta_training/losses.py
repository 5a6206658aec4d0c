"""The losses of one batch of sessions, as a recipe weighs them (arXiv 2605.12357 and its official training script)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.systems.delta_mem.training.recipe import Recipe
from mem_triton.systems.delta_mem.training.tokens import Request, Session
from mem_triton_transformers.delta_training.forward import Replies, SessionRunner, States, another


@dataclass(frozen=True)
class BatchLoss:
    """loss: a scalar with its graph. recalled: mean loss of tokens that only the memory can know, None without any.
    exact: which rows' replies are right throughout [B]; None where that says nothing."""

    loss: Tensor
    recalled: float | None = None
    exact: Tensor | None = None


def memory_loss(runner: SessionRunner, recipe: Recipe, rng: random.Random, sessions: Sequence[Session]) -> BatchLoss:
    """Loss of replies to questions about what was told: from the state alone, or with all of it in the prompt too.

    With it in the prompt, the state is one's own or empty, half each. The losses that compare memories apply to the
    state alone.
    """
    told, count = [session.told for session in sessions], len(sessions)
    state_only, write = rng.random() < recipe.state_only, rng.random() < 0.5
    empty, replies = rng.random() < 0.5, rng.random() < recipe.keep_replies
    if not state_only:
        states = runner.zeros(count) if empty else runner.tell(told)
        answers = runner.ask([session.context or session.asked for session in sessions], states, True)
        return BatchLoss(answers.losses().mean())
    runner.gate_target = recipe.sparsity_target if recipe.sparsity else None
    states = runner.tell(told)
    runner.gate_target = None
    answers = runner.ask([session.asked for session in sessions], states, write)
    losses = answers.losses()
    only = torch.tensor([r for session in sessions for r in session.recalled], device=losses.device)
    loss, recalled = losses.mean(), losses[only].mean() if only.any() else None
    if recalled is not None and recipe.recalled_weight:
        loss = loss + recipe.recalled_weight * recalled
    if replies and recipe.keep:
        loss = loss + recipe.keep * kept(runner, [requests[0] for requests in told], runner.zeros(count), True)
    loss = loss + comparisons(runner, recipe, sessions, states, write, answers)
    if recipe.sparsity:
        loss = loss + recipe.sparsity * runner.gate_excess()
    return BatchLoss(loss, None if recalled is None else recalled.item(), answers.exact(count))


def comparisons(
    runner: SessionRunner, recipe: Recipe, sessions: Sequence[Session], states: States, write: bool, own: Replies
) -> Tensor:
    """The losses that compare one's own memory with an empty one, another session's, and the whole text."""
    asked = [session.asked for session in sessions]
    mine, total = own.losses().mean(), own.logits.new_zeros(())
    if recipe.contrast:
        gap = runner.ask(asked, runner.zeros(len(asked)), write).losses().mean() - mine
        total = total + recipe.contrast * below(gap, recipe.margin)
    if recipe.causal and len(asked) > 1:
        others = tuple(state.detach() for state in another(states))
        gap = runner.ask(asked, others, write).losses().mean() - mine
        total = total + recipe.causal * below(gap, recipe.margin)
    if recipe.anchor or recipe.kl:
        full = [session.context or session.asked for session in sessions]
        with torch.no_grad():
            teacher = runner.ask(full, None, write=False)
        total = total + recipe.kl * divergence(teacher.logits, own.logits)
        gap = mine - teacher.losses().mean()
        total = total + recipe.anchor * F.softplus((gap - recipe.anchor_margin) / recipe.anchor_margin)
    return total


def keep_loss(
    runner: SessionRunner, recipe: Recipe, plain: Sequence[Session], others: Sequence[Session] | None
) -> BatchLoss:
    """How far replies that have nothing to do with the memory move from the frozen model's.

    others: sessions whose told requests fill the memory before; None for an empty one.
    """
    states = runner.zeros(len(plain)) if others is None else runner.tell([session.told for session in others])
    return BatchLoss(recipe.keep * kept(runner, [session.asked for session in plain], states, True))


def kept(runner: SessionRunner, requests: Sequence[Request], states: States | None, write: bool) -> Tensor:
    """Divergence of the replies' tokens from the frozen model's, per token."""
    requests = [request for request in requests if request.reply < len(request.ids)]
    if not requests:
        return torch.zeros((), device=runner.device)
    with torch.no_grad():
        frozen = runner.ask(requests, None, write=False).logits
    return divergence(frozen, runner.ask(requests, states, write).logits)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) per token. Logits [N, vocab] each."""
    wanted = teacher.log_softmax(-1)
    return F.kl_div(student.log_softmax(-1), wanted, reduction="batchmean", log_target=True)


def below(gap: Tensor, margin: float) -> Tensor:
    """softplus((margin - gap) / margin): small once the gap is well above the margin."""
    return F.softplus((margin - gap) / margin)
