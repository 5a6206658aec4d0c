"""A chat template for cartridges: the model's own, without BOS and without the default system message.

A cartridge stands where the system message stood, and was trained with text that begins with the user's turn
(https://github.com/HazyResearch/cartridges, ``cartridges/datasets.py``). Under the stock template it would be read
before a second BOS and a default system message.
"""

from __future__ import annotations

from typing import Any

from mem_triton.store.errors import ArtifactError

_ASKED, _SAID, _AGAIN = "mem0asked0", "mem0said0", "mem0again0"

_AROUND = """{{% set mem_triton_chat %}}{original}{{%+ endset %}}
{{%- set mem_triton_user = '{user}' -%}}
{{%- set mem_triton_parts = mem_triton_chat.split(mem_triton_user, 1) -%}}
{{%- if messages[0]['role'] != 'system' and not tools and mem_triton_parts|length > 1 -%}}
{{{{ mem_triton_user + mem_triton_parts[1] }}}}
{{%- elif mem_triton_chat.startswith('{bos}') -%}}
{{{{ mem_triton_chat[{bos_length}:] }}}}
{{%- else -%}}
{{{{ mem_triton_chat }}}}
{{%- endif -%}}
"""


def cartridge_template(tokenizer: Any) -> str:
    """The template that is derived from a tokenizer's own, in Jinja.

    A chat with a system message of its own, or with tools, keeps it and loses BOS alone. The user's turn is learnt by
    rendering a chat of known words. Raises ArtifactError for a tokenizer whose template cannot be taken apart.
    """
    original = getattr(tokenizer, "chat_template", None)
    if isinstance(original, dict):
        original = original.get("default")
    if not isinstance(original, str):
        raise ArtifactError("--chat-template: the model has no chat template; leave it out, and send plain prompts")
    try:
        user = _user_turn(tokenizer)
        bos = getattr(tokenizer, "bos_token", None) or ""
        if user.startswith(bos):  # where each turn begins with what is called BOS, it is no second one
            bos = ""
        derived = _AROUND.format(
            original=original.removesuffix("\n"), user=_quoted(user), bos=_quoted(bos), bos_length=len(bos)
        )
        asked = [{"role": "user", "content": _ASKED}]
        rendered = tokenizer.apply_chat_template(asked, chat_template=derived, tokenize=False)
    except Exception as error:  # templates raise what they like about a chat that they do not want
        raise ArtifactError(f"--chat-template: the model's own template cannot be taken apart: {error}") from None
    if not rendered.startswith(user + _ASKED):
        raise ArtifactError("--chat-template: the model's own template has no user's turn that could be told apart")
    return derived


def _user_turn(tokenizer: Any) -> str:
    """What a user's turn begins with."""

    def render(*said: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    whole, answered = render(_ASKED, _SAID, _AGAIN), render(_ASKED, _SAID)
    ends = answered[answered.rindex(_SAID) + len(_SAID) :]
    between = whole[whole.rindex(_SAID) + len(_SAID) : whole.rindex(_AGAIN)]
    user = between.removeprefix(ends)
    if not user.strip():
        raise ValueError("nothing marks the user's turn")
    return user


def _quoted(text: str) -> str:
    return text.encode("unicode_escape").decode().replace("'", "\\'")
