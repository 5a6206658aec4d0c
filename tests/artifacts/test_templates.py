"""The chat template for cartridges begins with the user's turn: neither with BOS nor with a default system message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import refused, run
from tests.memory3.support import RECALL
from tests.support.models import save_tiny_model, tiny_tokenizer
from tests.support.trained import chance_cache, load_model, save_cartridge

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none and tools %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Knowledge until: December 2023\\nToday: " + date_string + "\\n\\n" }}
{{- system }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou help, and never say that it\\'s hard.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = {  # template, BOS, the user's header, the end of a turn; in SmolLM2 BOS is what every turn begins with
    "Llama-3": (LLAMA, "<|begin_of_text|>", "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "Qwen": (QWEN, None, "<|im_start|>user\n", "<|im_end|>\n"),
    "SmolLM2": (SMOLLM2, "<|im_start|>", "<|im_start|>user\n", "<|im_end|>\n"),
}
ASK, SYSTEM = {"role": "user", "content": "Who has the key?"}, {"role": "system", "content": "Be brief."}


def model_of(family: str, folder: Path) -> tuple[Path, Any]:
    """A model whose tokenizer has the family's marks, as tokens of their own, and its template."""
    from transformers import AutoTokenizer

    template, bos, _, _ = FAMILIES[family]
    save_tiny_model(folder, "llama")
    tokenizer = tiny_tokenizer()
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, **({"bos_token": bos} if bos else {})})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_ids_begin_with_the_users_turn(family, tmp_path):
    folder, tokenizer = model_of(family, tmp_path / "model")
    _, _, user, end = FAMILIES[family]
    file = save_cartridge(tmp_path / "c.pt", *chance_cache(load_model(folder), 5))
    run("import", file, tmp_path / "bank", "--model", folder, "--chat-template", tmp_path / "out.jinja")
    template = (tmp_path / "out.jinja").read_text()

    def ids(*messages: dict[str, str], own: bool = False, **options: Any) -> list[int]:
        chosen = {} if own else {"chat_template": template}
        return tokenizer.apply_chat_template(list(messages), return_dict=False, **chosen, **options)

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    turn = encoded(user) + encoded(ASK["content"]) + encoded(end)
    assert ids(ASK) == turn
    stock = ids(ASK, own=True)
    assert stock != turn and stock[-len(turn) :] == turn, "the control: the stock template says more before it"
    assert ids(ASK, add_generation_prompt=True)[: len(turn)] == turn
    assert len(ids(ASK, add_generation_prompt=True)) > len(turn)
    talk = [ASK, {"role": "assistant", "content": "Hugo."}, ASK]
    assert ids(*talk) == ids(*talk, own=True)[len(stock) - len(turn) :]
    with_system = ids(SYSTEM, ASK)
    kept = ids(SYSTEM, ASK, own=True)
    begins = tokenizer.bos_token_id is not None and family == "Llama-3"
    assert with_system == kept[1 if begins else 0 :], "what somebody wrote stays; BOS goes"
    if family != "SmolLM2":
        assert tokenizer.bos_token_id not in with_system


def test_the_shipped_models_own_template(tmp_path):
    from transformers import AutoTokenizer

    from mem_triton.systems.explicit.cartridge_template import cartridge_template

    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    rendered = tokenizer.apply_chat_template([ASK], chat_template=cartridge_template(tokenizer), tokenize=False)
    assert tokenizer.apply_chat_template([ASK], tokenize=False).endswith(rendered) and ASK["content"] in rendered


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "cannot be taken apart"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for", "cannot be taken apart"),
    ],
)
def test_templates_that_cannot_be_derived_are_refused_before_anything_is_written(tmp_path, template, message):
    folder = save_tiny_model(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    file = save_cartridge(tmp_path / "c.pt", *chance_cache(load_model(folder), 5))
    line = refused("import", file, tmp_path / "bank", "--model", folder, "--chat-template", tmp_path / "out.jinja")
    assert "--chat-template" in line and message in line
    assert not (tmp_path / "bank").exists() and not (tmp_path / "out.jinja").exists()
