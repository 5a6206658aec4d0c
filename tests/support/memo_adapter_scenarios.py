"""The shipped memory adapter on a real engine against the model into whose weights it was merged (fact D1): tests that
each engine's file imports.

The engine's file has the fixture ``server``, which serves SmolLM2 as "m" and the adapter as "memo", both in fp32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memo.rows import chosen
from mem_triton.systems.memo.merging.arithmetic import MergeRecipe
from mem_triton.systems.memo.merging.into_base import merge_into_base
from tests.support.checkout import ROOT
from tests.support.real_model import smollm2

SHIPPED = ROOT / "benchmarks" / "memo" / "adapters"
TOKENS = 32


class Merged:
    """The merged model, as ``mem-triton memo merge --into-base`` writes it, in transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        merge_into_base(MergeRecipe("linear"), [SHIPPED / "memory"], smollm2(), folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def would_say(self, question: str, text: str) -> bool:
        """Whether greedy decoding says just this: seen by one forward call where the text's own tokens are those."""
        prompt, answer = self._prompt(question), self.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = [*answer, self.tokenizer.eos_token_id]
        logits = self.model(torch.cat([prompt, torch.tensor([answer])], 1)).logits[0, prompt.shape[1] - 1 : -1]
        return logits.argmax(-1).tolist() == answer or self.says(question) == text

    def _prompt(self, question: str) -> torch.Tensor:
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )

    @torch.inference_mode()
    def says(self, question: str) -> str:
        ids = self._prompt(question)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("merged") / "model")


def said(server: Any, model: str, questions: list[str]) -> list[str]:
    """Greedy answers, four at a time."""

    def ask(question: str) -> str:
        answer = server.chat(question, TOKENS, model=model)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, questions))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.real])])
def test_d1_the_unmerged_adapter_says_what_the_merged_model_says(server: Any, merged: Merged, count: int) -> None:
    """D1: greedy text in fp32, on questions of every kind."""
    questions = [one.text for one in chosen(count)]
    texts = said(server, server.adapted("memo"), questions)
    others = [(q, t, merged.says(q)) for q, t in zip(questions, texts, strict=True) if not merged.would_say(q, t)]
    assert others == [], f"{len(others)} of {count}"
    base = said(server, "m", questions[:8])
    assert not set(base) & set(texts[:8]), "negative control: the base says something else"
