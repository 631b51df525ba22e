"""The chat template of a model: it carries the prompt, writes every turn as it stands, and makes the token ids.

A template that carries the prompt puts the system prompt and the example turns before every conversation that has no
system turn of its own. So whoever asks a saved model (`pipeline`, Ollama, chat.py, evaluate.py, a later training) asks
it as it was trained: the prompt is part of the model's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import prompts
from engine.console import UserError, first_line, note
from engine.constants import is_a
from engine.numbers import TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a base model is asked: as plain text, for it knows no turns, and ended by its own end token. At this size that
# goes better than a chat template (simpleRL-Zoo, arXiv 2503.18892). The line break behind 回答： keeps a
# prompt's tokens the same whatever follows.
PLAIN_TEMPLATE = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ '问题：' + message['content'] + '\\n' }}
{%- else -%}{{ '回答：\\n' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '回答：\\n' }}{%- endif -%}
"""

# Plain ChatML. It takes the place of a ChatML template that rewrites turns, and is the demo's.
CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# It stands in front of a template that refuses a system turn: the system prompt then opens the first question.
SYSTEM_FIRST = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set question = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}
{%- set messages = [dict(messages[1], content=question)] + messages[2:] -%}
{%- endif %}
"""

# A carrying template is _BEFORE, the turns as JSON, _AFTER, and then the model's own template. That starts a line: else
# Jinja would write the white space before its first tag.
_BEFORE = "{%- if not messages or messages[0]['role'] != 'system' %}{%- set messages = "
_AFTER = " + messages %}{%- endif %}{#- the model's own template #}\n"


# -------------------------------------------------------------------------------------------- the prompt it carries
def prompt_turns(system: str, example: list[dict]) -> list[dict]:
    """The turns that stand before a question: the system prompt and the example."""
    return [{"role": "system", "content": system}, *example]


def todays_prompt() -> list[dict]:
    """Those of prompts.py."""
    return prompt_turns(prompts.SYSTEM_PROMPT, prompts.EXAMPLE)


def carry_prompt(template: str, turns: list[dict]) -> str:
    """The template, with `turns` in the place of those that it carried before, if any."""
    return _BEFORE + json.dumps(turns, ensure_ascii=False) + _AFTER + own_template(template)


def own_template(template: str) -> str:
    """The template without the turns that it carries."""
    return template.partition(_AFTER)[2] if template.startswith(_BEFORE) else template


def carried_prompt(template: str) -> list[dict] | None:
    """The turns that a template carries; None where it carries none. Raises UserError where they are no JSON."""
    if not template.startswith(_BEFORE):
        return None
    try:
        return json.loads(template.partition(_AFTER)[0].removeprefix(_BEFORE))
    except ValueError as error:  # somebody has edited them
        raise UserError(f"the prompt at the top of a chat_template.jinja is no JSON: {error}; mend it there") from error


# What others read of the recipe.json of a training, and its types.
READ = {"SYSTEM_PROMPT": str, "EXAMPLE": list[dict], "DATASET": str, "BF16": bool, "MAX_COMPLETION_TOKENS": int}


def trained_recipe(model: str) -> dict:
    """The recipe.json that training wrote into a model's folder, or above it for a checkpoint or an adapter; else {}.

    A note says where somebody else's file of that name, or a damaged one, is ignored.
    """
    folders = (Path(model), Path(model).parent) if Path(model).is_dir() else ()
    for path in (folder / "recipe" / "recipe.json" for folder in folders):
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            known = found and {key: is_a(found[key], kind) for key, kind in READ.items() if key in found}
            if known and all(known.values()):
                return found
            if path.is_file():
                raise ValueError("no training wrote it")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            note(f"{str(path)!r} is ignored: {first_line(error)}")
    return {}


# ----------------------------------------------------------------------------------------- does it leave our text alone
def fit_template(tokenizer: PreTrainedTokenizerBase, ends: set[int], name: str, free: bool = False) -> None:
    """Give a base model PLAIN_TEMPLATE, and any other model a template that leaves our text as it is.

    Args:
        ends: the ids of the tokens at which the model stops.
        name: of the model, for the messages.
        free: the model is asked without our format; its own template may do what it wants.

    Raises:
        UserError: no template makes it right; the message says what the model's own one does.
    """
    if why := base_because(tokenizer, ends):
        tokenizer.chat_template = PLAIN_TEMPLATE
        note(f"{name!r} is a base model ({why}): it gets a plain template that ends answers with {tokenizer.eos_token}")
    fault = None if free else fault_of(tokenizer, ends)
    if fault is None:
        return
    question = render(tokenizer, [{"role": "user", "content": "1+1="}])
    if "<|im_start|>user\n1+1=<|im_end|>\n" in question:
        begin = question.partition("<|im_start|>")[0]  # some models begin every text with a token
        replaced, remedy = begin + CHATML_TEMPLATE, "plain ChatML takes its place"
    else:
        replaced, remedy = SYSTEM_FIRST + tokenizer.get_chat_template(), "the system prompt opens the first question"
    tokenizer.chat_template = replaced
    if fault_of(tokenizer, ends) is not None:
        raise UserError(
            f"{name!r} cannot learn our format: {fault}; name another model, or put a chat_template.jinja beside it "
            "that writes every turn as it stands"
        )
    note(f"{name!r}: {fault}; {remedy}, and the model is saved so")


def fault_of(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    """What goes wrong when a model is asked behind the worked example and learns an answer; None if nothing does."""
    question, answer = "5分钟多少秒", "<think>\n5*60=300\n</think>\n<answer>\n300\n</answer>"
    before = prompt_turns(prompts.SYSTEM_PROMPT, prompts.WORKED_EXAMPLE)
    asked = [*before, {"role": "user", "content": question}]
    learned = [*asked, {"role": "assistant", "content": answer}]
    try:
        prompt, whole = render(tokenizer, asked), render(tokenizer, learned, complete=True)
    except Exception as error:  # whatever a template raises or runs into
        return f"its chat template refuses a system turn or an example ({first_line(error)})"
    prompt_ids, ids = tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True).strip()
    end = whole.removeprefix(prompt + answer)
    stops = tuple(tokenizer.convert_ids_to_tokens([*ends, tokenizer.eos_token_id]))
    faults = {
        "its chat template changes or drops turns": any(turn["content"].strip() not in prompt for turn in asked),
        "its chat template opens or closes a block before the answer": "think>" in prompt.rpartition(question)[2],
        "its chat template puts something between prompt and answer": not whole.startswith(prompt + answer),
        f"its chat template ends an answer with {end!r}, where the model does not stop": not end.startswith(stops),
        "its tokenizer joins the prompt's end to the answer": ids[: len(prompt_ids)] != prompt_ids,
        f"its tokenizer makes {back!r} of {answer!r}": back != answer,
    }
    return next((fault for fault, found in faults.items() if found), None)


def keep_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes our tags ordinary tokens, with the ids that they have: whoever decodes an answer drops special ones."""
    tokenizer.response_template = None  # by it TRL would take the thinking out of what the rewards read
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tokenizer.is_fast and not special.isdisjoint(TAGS):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] &= token["content"] not in TAGS
        tokenizer.backend_tokenizer.__setstate__(json.dumps(state).encode())  # added again they would stay special
        tokenizer.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if token not in TAGS]
        for role in [role for role, token in tokenizer.special_tokens_map.items() if token in TAGS]:
            setattr(tokenizer, role, None)
            tokenizer.init_kwargs.get("model_specific_special_tokens", {}).pop(role, None)  # what is saved


def base_because(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    """Why this is the tokenizer of a base model, whose `ends` are token ids; None where it is not.

    Qwen's base models come with the chat template of their instruction-tuned sisters, but nobody has taught them to
    stop where it ends a turn.
    """
    if not tokenizer.chat_template:
        return "no chat template"
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    try:
        turn_end = render(tokenizer, turns, complete=True).rpartition("2")[2]
    except Exception as error:  # whatever a template raises or runs into
        name, said = tokenizer.name_or_path, first_line(error)
        raise UserError(f"the chat template of {name!r} takes no plain turns: {said}; name another model") from error
    if any(token in turn_end for token in tokenizer.convert_ids_to_tokens([*ends, tokenizer.eos_token_id])):
        return None
    return f"its chat template ends a turn with {turn_end.strip() or 'nothing'}, where the model does not stop"


# ------------------------------------------------------------------------------------------------------ token ids
def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], complete: bool = False
) -> list[list[int]]:
    """Token ids of prompts, up to and with the header of the assistant's turn, or of complete conversations."""
    ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=not complete, return_dict=True)
    return ids["input_ids"]


def render(tokenizer: PreTrainedTokenizerBase, conversation: list[dict], complete: bool = False) -> str:
    """The same as text, of one conversation."""
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=not complete, tokenize=False)


def count_tokens(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[tuple[int, int]]:
    """Tokens of each row's `prompt`, with the header of the assistant's turn, and of its `completion`, with its end."""
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    whole = encode(tokenizer, [row["prompt"] + row["completion"] for row in rows], complete=True)
    return [(len(prompt), len(both) - len(prompt)) for prompt, both in zip(prompts, whole, strict=True)]
