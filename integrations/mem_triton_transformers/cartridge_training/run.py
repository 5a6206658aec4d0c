"""One run from a model's folder and a document to an adapter of peft that stands for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, get_peft_model, prompt_embeddings_from_past_key_values
from transformers import DynamicCache

from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.systems.explicit.cartridge_recipe import CartridgeRecipe
from mem_triton.write.chunking import Document, chunks_of
from mem_triton_transformers.cartridge_training.card import describe
from mem_triton_transformers.cartridge_training.decoding import reply_all
from mem_triton_transformers.cartridge_training.lessons import Chats, check_head, make_lessons, targets
from mem_triton_transformers.cartridge_training.questions import Question, ask, read_questions
from mem_triton_transformers.cartridge_training.trainer import CartridgeTrainer
from mem_triton_transformers.runs.folders import TrainingError, identity_of, load, prepare
from mem_triton_transformers.runs.journal import CURVE, LOG
from mem_triton_transformers.runs.statistics import wilson

QUESTION_TOKENS = 40
"""Most tokens in which the model asks."""
REPLIES = "replies.jsonl"
"""What was replied to each held-out question that has an answer, each way to ask."""


def train(
    folder: Path,
    document: Document,
    out: Path,
    recipe: CartridgeRecipe,
    *,
    questions: Path | None = None,
    held_out: Path | None = None,
    name: str = "",
    device: str | None = None,
    save_every: int = 50,
    evaluate_every: int = 25,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Train rows of keys and values for a document and write them to ``out``, or go on with the run that lies there.

    questions: a file of them, None for the model's own. held_out: a file of questions to evaluate on; without it one of
    so many questions is held out. stop: asked after each step. tell: gets the log's lines, say: sentences. Returns a
    report, None if the run was stopped before its end. Raises TrainingError, ValueError, OSError.
    """
    prepare(out)
    (out / "trainer").mkdir(exist_ok=True)
    model, tokenizer = load(folder, recipe.dtype, device)
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # short rows: several times as fast on a CPU as the fused form
    chats = Chats(tokenizer)
    chunks = [chunk.text for chunk in chunks_of(document, tokenizer, recipe.chunk_tokens)]
    own = _questions(model, chats, chunks, questions, recipe, out, say)
    aside = read_questions(held_out, chunks) if held_out else own[recipe.held_out - 1 :: recipe.held_out]
    own = own if held_out else [q for i, q in enumerate(own) if i % recipe.held_out != recipe.held_out - 1]
    lessons = make_lessons(model, chats, chunks, own, recipe.answers, recipe, out / "trainer" / "lessons.json", say)
    other = make_lessons(model, chats, chunks, aside, 1, recipe, out / "trainer" / "held_out.json", say)
    check_head(model, lessons[0])
    adapted = _adapted(model, recipe, name or folder.name)
    first = _first_rows(model, chats, document.text, recipe.rows)
    encoder = adapted.prompt_encoder[adapted.active_adapter]
    encoder.load_prompt_embeddings(first)
    digest = hashlib.sha256(json.dumps([document.text, [vars(q) for q in (*own, *aside)]]).encode()).hexdigest()
    identity = identity_of(recipe.model_dump(), model_fingerprint(folder).model_dump_json(), digest)
    say("the teacher reads its answers")
    trainer = CartridgeTrainer(
        adapted, recipe, lessons, targets(model, lessons), (other, targets(model, other)), out, identity
    )
    if trainer.step:
        say(f"going on from step {trainer.step} of {recipe.steps}")
    count = trainer.rows.numel()
    say(f"{count} numbers, {len(lessons)} lessons about {len(chunks)} chunk(s), {len(other)} held out")
    if not trainer.run(save_every, evaluate_every, stop, tell):
        return None
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    say("evaluating")
    asked = [q for q in aside if q.answer]
    alone = [chats.alone(q.text) for q in asked]
    told = [chats.with_chunk(chunks[q.chunk], q.text) for q in asked]
    reply = partial(reply_all, most_tokens=recipe.answer_tokens)
    replies = {"text in the context": reply(model, told), "cartridge": reply(adapted, alone)}
    divergence = {"cartridge": trainer.divergence()}
    encoder.load_prompt_embeddings(first)
    replies |= {"first rows": reply(adapted, alone), "nothing": reply(model, alone)}
    divergence |= {"first rows": trainer.divergence(), "nothing": trainer.divergence(alone=True)}
    texts = {way: tokenizer.batch_decode(said, skip_special_tokens=True) for way, said in replies.items()}
    lines = [
        {"question": q.text, "answer": q.answer, **{way: said[i] for way, said in texts.items()}}
        for i, q in enumerate(asked)
    ]
    (out / REPLIES).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    report = {
        "adapter": str(out),
        "rows": recipe.rows,
        "document_tokens": len(tokenizer.encode(document.text, add_special_tokens=False)),
        "numbers": count,
        "steps": recipe.steps,
        "seconds": round(trainer.seconds, 1),
        "cpu_seconds": round(trainer.cpu, 1),
        "lessons": len(lessons),
        "held_out": len(other),
        "divergence": {way: round(value, 4) for way, value in divergence.items()},
        "recall": _recall(asked, texts),
        "replies": str(out / REPLIES),
        "digest": digest,
        "log": str(out / LOG),
        "curve": str(out / CURVE),
    }
    describe(out, recipe, report, name or folder.name, document.source or document.name, command)
    return report


def _questions(
    model: Any,
    chats: Chats,
    chunks: Sequence[str],
    path: Path | None,
    recipe: CartridgeRecipe,
    out: Path,
    say: Callable[[str], None],
) -> list[Question]:
    if path is not None:
        return read_questions(path, chunks)
    kept = out / "questions.jsonl"
    if kept.exists():
        found = read_questions(kept, chunks)
        say(f"{len(found)} questions of an earlier run, from {kept}")
        return found
    found = ask(model, chats.tokenizer, chunks, recipe.asked, QUESTION_TOKENS, recipe.seed, chats.with_chunk, say)
    kept.write_text("".join(json.dumps({"question": q.text}, ensure_ascii=False) + "\n" for q in found))
    return read_questions(kept, chunks)


def _adapted(model: Any, recipe: CartridgeRecipe, name: str) -> Any:
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    config = CartridgeConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=recipe.rows,
        num_frozen_tokens=recipe.frozen,
        base_model_name_or_path=name,
        num_layers=model.config.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * size,
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted.eval()


@torch.no_grad()
def _first_rows(model: Any, chats: Chats, text: str, rows: int) -> torch.Tensor:
    """Keys and values of the first tokens of a chat with the document, [rows, numbers of a token]."""
    ids = chats.with_chunk(text, "")[:rows]
    if len(ids) < rows:
        raise TrainingError(f"--rows: {rows}, but document and chat have {len(ids)} tokens; give fewer")
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=rows).float()


def _recall(asked: Sequence[Question], texts: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """Share of replies that say the answer, each way to ask; None if no question has an answer."""
    if not asked:
        return None
    found: dict[str, Any] = {"questions": len(asked)}
    for way, said in texts.items():
        right = sum(_says(text, q.answer or "") for text, q in zip(said, asked, strict=True))
        found[way] = {"right": right, "interval": list(wilson(right, len(asked)))}
    return found


def _says(text: str, answer: str) -> bool:
    """Whether a reply holds the words of an answer, in their order."""
    said, asked = (" ".join(re.findall(r"\w+", one.casefold())) for one in (text, answer))
    return bool(asked) and f" {asked} " in f" {said} "
