"""The chat template of a model: it carries the prompt, writes every turn as it stands, and makes the token ids.

A template that carries a prompt puts the system prompt and the example turns before every conversation without a
system turn. So the prompt is part of the model's folder, and `pipeline`, Ollama, chat.py, evaluate.py and a later
training all ask a model as it was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import prompts
from engine.console import UserError, first_line, note
from engine.numbers import TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For base models: plain text that ends with the model's own end token. Small base models do better with it than with a
# chat template (simpleRL-Zoo, arXiv 2503.18892). Because of the line break behind 回答： the tokens of a prompt do not
# depend on what follows.
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

# Plain ChatML, for the demo and in place of a ChatML template that rewrites turns.
CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Put before a template that refuses system turns, it moves the system prompt into the first question.
SYSTEM_FIRST = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set question = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}
{%- set messages = [dict(messages[1], content=question)] + messages[2:] -%}
{%- endif %}
"""

# A template that carries a prompt is _BEFORE, the turns as JSON, _AFTER, and the model's own template. The last begins
# on a new line, or Jinja would write the white space before its first tag.
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
    """The template with these turns, in place of those that it carried before."""
    return _BEFORE + json.dumps(turns, ensure_ascii=False) + _AFTER + own_template(template)


def own_template(template: str) -> str:
    """The template without the turns that it carries."""
    return template.partition(_AFTER)[2] if template.startswith(_BEFORE) else template


def carried_prompt(template: str) -> list[dict] | None:
    """The turns that a template carries, or None. Raises UserError where somebody has edited them into no JSON."""
    if not template.startswith(_BEFORE):
        return None
    try:
        return json.loads(template.partition(_AFTER)[0].removeprefix(_BEFORE))
    except ValueError as error:
        raise UserError(f"the prompt at the top of a chat_template.jinja is no JSON: {error}; mend it there") from error


def trained_recipe(model: str) -> dict:
    """The recipe.json of the training that made a model folder, a checkpoint or an adapter; {} where there is none."""
    for folder in (Path(model), Path(model).parent) if Path(model).is_dir() else ():
        file = folder / "recipe" / "recipe.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                if {"SYSTEM_PROMPT", "DATASET", "MAX_COMPLETION_TOKENS"} & set(found):
                    return found
            except (OSError, ValueError, TypeError, RecursionError):
                pass
            note(f"{str(file)!r} is ignored: no training wrote it")
    return {}


# ------------------------------------------------------------------------------------- does it write our text verbatim
def fit_template(tokenizer: PreTrainedTokenizerBase, ends: set[int], name: str, free: bool = False) -> None:
    """Give a base model PLAIN_TEMPLATE, and any other model a template that writes our text as it stands.

    Args:
        ends: the ids of the tokens at which the model stops.
        name: of the model, for the messages.
        free: the model is not asked in our format, and keeps its own template.

    Raises:
        UserError: no template fits; the message says what the model's own does.
    """
    if why := base_because(tokenizer, ends):
        tokenizer.chat_template = PLAIN_TEMPLATE
        note(f"{name!r} is a base model ({why}): it gets a plain template that ends answers with {tokenizer.eos_token}")
    fault = None if free else fault_of(tokenizer, ends)
    if fault is None:
        return
    question = render(tokenizer, [{"role": "user", "content": "1+1="}])
    if "<|im_start|>user\n1+1=<|im_end|>\n" in question:
        begin = question.partition("<|im_start|>")[0]  # the token with which some models begin every text
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
    """What this template does wrong with the worked example, a question and an answer to learn; None if nothing."""
    question, answer = "5分钟多少秒", "<think>\n5*60=300\n</think>\n<answer>\n300\n</answer>"
    before = prompt_turns(prompts.SYSTEM_PROMPT, prompts.WORKED_EXAMPLE)
    asked = [*before, {"role": "user", "content": question}]
    learned = [*asked, {"role": "assistant", "content": answer}]
    try:
        prompt, whole = render(tokenizer, asked), render(tokenizer, learned, complete=True)
    except Exception as error:  # a template can raise anything
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
    """Make our tags ordinary tokens with the same ids, because special tokens are dropped when an answer is decoded."""
    tokenizer.response_template = None  # with it TRL would hide the thinking from the rewards
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tokenizer.is_fast and not special.isdisjoint(TAGS):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] &= token["content"] not in TAGS
        tokenizer.backend_tokenizer.__setstate__(json.dumps(state).encode())  # adding them again would not change them
        tokenizer.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if token not in TAGS]
        for role in [role for role, token in tokenizer.special_tokens_map.items() if token in TAGS]:
            setattr(tokenizer, role, None)
            tokenizer.init_kwargs.get("model_specific_special_tokens", {}).pop(role, None)  # what is saved


def base_because(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    """Why this is the tokenizer of a base model; None where it is not.

    Qwen's base models have the chat template of their instruction-tuned versions, but they have not learned to stop
    where it ends a turn.
    """
    if not tokenizer.chat_template:
        return "no chat template"
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    try:
        turn_end = render(tokenizer, turns, complete=True).rpartition("2")[2]
    except Exception as error:  # a template can raise anything
        name, said = tokenizer.name_or_path, first_line(error)
        raise UserError(f"the chat template of {name!r} takes no plain turns: {said}; name another model") from error
    if any(token in turn_end for token in tokenizer.convert_ids_to_tokens([*ends, tokenizer.eos_token_id])):
        return None
    return f"its chat template ends a turn with {turn_end.strip() or 'nothing'}, where the model does not stop"


# ------------------------------------------------------------------------------------------------------ token ids
def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], complete: bool = False
) -> list[list[int]]:
    """Token ids of prompts with the header of the assistant's turn, or of complete conversations."""
    ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=not complete, return_dict=True)
    return ids["input_ids"]


def render(tokenizer: PreTrainedTokenizerBase, conversation: list[dict], complete: bool = False) -> str:
    """The text of one conversation."""
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=not complete, tokenize=False)


def count_tokens(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[tuple[int, int]]:
    """The number of tokens of each row's `prompt` and `completion`."""
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    whole = encode(tokenizer, [row["prompt"] + row["completion"] for row in rows], complete=True)
    return [(len(prompt), len(both) - len(prompt)) for prompt, both in zip(prompts, whole, strict=True)]
