"""Save the prompt format of training as the chat template of the tokenizer, so that any chat client makes the prompts.

Saved directories and exported files hold a tokenizer whose chat template makes the whole prompt: the template of the
data, the begin token, the prefix of every answer. This package itself uses the tokenizer's original template, kept in
``prompt_format.json``, and ``PromptFormat``; before writing, both are checked to make the same prompts.
"""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shadowtune.config.data import parse_template
from shadowtune.data.examples import user_message
from shadowtune.data.prompt_format import FILE, PromptFormat
from shadowtune.data.segments import PROBE, begin_tokens
from shadowtune.errors import DataError

logger = logging.getLogger(__name__)

_REFUSAL = (
    "this model was trained on single requests: send one message of role user, without system message and history"
)
_SINGLE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('" + _REFUSAL + "') }}"
    "{%- endif -%}"
)
_FILL_LAST = (
    "{%- set shadowtune = namespace(messages=[], last=-1) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set shadowtune.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if loop.index0 == shadowtune.last -%}"
    "{%- set shadowtune_prompt -%}PROMPT{%- endset -%}"
    "{%- set shadowtune.messages = shadowtune.messages + [{'role': 'user', 'content': shadowtune_prompt}] -%}"
    "{%- else -%}{%- set shadowtune.messages = shadowtune.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = shadowtune.messages -%}"
)
"""Puts the last message of role user through the template of the data, which replaces PROMPT."""


def add_chat_template(
    tokenizer: PreTrainedTokenizerBase, form: PromptFormat
) -> tuple[PreTrainedTokenizerBase, PromptFormat]:
    """Return a tokenizer whose chat template makes the prompts of a format, and the format that keeps the original.

    If the template of the data has several fields and no main one, a message is the whole, already filled prompt.

    Args:
        tokenizer: with its original chat template, or as returned by this function for this format.
        form: of the prompts.

    Returns:
        The arguments, unchanged, if the tokenizer's own chat template already makes these prompts.
    """
    original: Any = form.tokenizer_chat_template if form.baked else tokenizer.chat_template
    plain = restore_chat_template(copy.deepcopy(tokenizer), form)
    unbaked = replace(form, baked=False, tokenizer_chat_template=None)
    if not form.answers:
        return plain, unbaked
    whole = form.template is not None and form.text_field is None
    shown = replace(form, template=None, optional_fields=()) if whole else form
    text = _chat_template(plain, shown)
    if text is None:
        return plain, unbaked
    baked = copy.deepcopy(plain)
    baked.chat_template = text
    difference = _difference(baked, plain, shown)
    if difference is not None:
        logger.warning("the saved chat template does not make the prompts of training: %s", difference)
        return plain, unbaked
    return baked, replace(form, baked=True, tokenizer_chat_template=_as_text(original))


def restore_chat_template(tokenizer: PreTrainedTokenizerBase, form: PromptFormat) -> PreTrainedTokenizerBase:
    """Give a tokenizer saved beside a format its original chat template again, in place."""
    if form.baked:
        tokenizer.chat_template = form.tokenizer_chat_template
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, form: PromptFormat, directory: Path) -> PromptFormat:
    """Write the tokenizer of ``add_chat_template`` and ``prompt_format.json``; return the format as written."""
    baked, form = add_chat_template(tokenizer, form)
    baked.save_pretrained(str(directory))
    form.save(directory)
    return form


def load_tokenizer_and_format(directory: str, **kwargs: Any) -> tuple[PreTrainedTokenizerBase, PromptFormat]:
    """Load a tokenizer, with its original chat template, and the format beside it.

    Args:
        directory: a directory or Hub id.
        **kwargs: of ``AutoTokenizer.from_pretrained``.

    Raises:
        DataError: if ``prompt_format.json`` is damaged.
        OSError, ValueError: of transformers, if there is no tokenizer.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **kwargs)
    form = PromptFormat.load(Path(directory))
    return restore_chat_template(tokenizer, form), form


def has_prompt_format(directory: Path) -> bool:
    """Whether a directory holds ``prompt_format.json``."""
    return (directory / FILE).is_file()


def _chat_template(tokenizer: PreTrainedTokenizerBase, form: PromptFormat) -> str | None:
    """Return Jinja text that makes the format's prompts; None if the tokenizer's own does."""
    if not form.takes_conversations(tokenizer):
        begin = "{{ bos_token }}" if begin_tokens(tokenizer) else ""
        return _SINGLE + begin + _prompt(form, "messages[0]['content']")
    original = str(tokenizer.get_chat_template())
    parts = [_setting(name, value) for name, value in form.template_kwargs.items()]
    if form.template is not None:
        parts.append(_FILL_LAST.replace("PROMPT", _prompt(form, "message['content']")))
    if not parts and not form.answer_prefix:
        return None
    after = ""
    if form.answer_prefix:
        condition = "add_generation_prompt"
        if "enable_thinking" in original:  # false makes the template put the empty block there by itself
            condition += " and not (enable_thinking is defined and enable_thinking is false)"
        after = "{% if " + condition + " %}{{ " + _quoted(form.answer_prefix) + " }}{% endif %}"
    return "".join(parts) + original.removesuffix("\n") + after  # Jinja drops one line break at the very end


def _prompt(form: PromptFormat, text: str) -> str:
    """Return Jinja text that fills the format's template; ``text`` is the main field, other fields are variables."""
    if form.template is None:
        return "{{ " + text + " }}"
    made = ""
    for literal, name in parse_template(form.template):
        written = "{{ " + _quoted(literal) + " }}" if literal else ""
        if name is None:
            made += written
        elif name == form.text_field:
            made += written + "{{ " + text + " }}"
        elif name in form.optional_fields:
            made += "{%- if " + name + " is defined and " + name + " -%}" + written + "{{ " + name + " }}{%- endif -%}"
        else:
            missing = _quoted(f"the prompt needs the field {name}: give it among chat_template_kwargs")
            made += "{%- if " + name + " is not defined -%}{{ raise_exception(" + missing + ") }}{%- endif -%}"
            made += written + "{{ " + name + " }}"
    return made


def _setting(name: str, value: Any) -> str:
    """Return Jinja text that sets a variable, even if the caller sets it: llama.cpp gives every template its own."""
    literal = _quoted(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    literal = "none" if value is None else literal
    return "{%- set " + name + " = " + literal + " -%}"


def _quoted(text: str) -> str:
    """Return a text as a literal that Jinja2 and llama.cpp parse alike."""
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "'" + "".join(escapes.get(letter, letter) for letter in text) + "'"


def _difference(baked: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase, form: PromptFormat) -> str | None:
    """Describe how the prompts of the saved tokenizer and of the format differ; None if they are equal."""
    needed = [name for name in form.fields if name != form.text_field and name not in form.optional_fields]
    fields: dict[str, Any] = {name: f"{PROBE} {name}" for name in needed}
    try:
        found = baked.apply_chat_template(
            [dict(user_message(PROBE))], tokenize=False, add_generation_prompt=True, **fields
        )
        ids = form.encode([user_message(PROBE)], plain, fields=fields)
        ours = baked(str(found), add_special_tokens=False)["input_ids"]
    except (DataError, TemplateError, TypeError) as error:
        return " ".join(str(error).split())
    return None if ours == ids else f"{found!r} instead of {plain.decode(ids)!r}"


def _as_text(template: Any) -> str | None:
    """Return the default one of several chat templates, or the only one."""
    return template.get("default") if isinstance(template, dict) else template
