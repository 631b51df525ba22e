"""Models as everything here uses them: where they compute, how they are loaded and checked, how a prompt is encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from engine.console import UserError, first_line, note, refuse_missing_folder
from engine.numbers import TAGS
from engine.questions import to_conversation
from prompts import WORKED_EXAMPLE

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

# ChatML as it is, where a model's own template makes more of it; the demo's template too
CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# In front of a template that takes no system turn: its text opens the first question
SYSTEM_FIRST = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set question = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}
{%- set messages = [dict(messages[1], content=question)] + messages[2:] -%}
{%- endif %}"""

# Around a template that takes thinking out or writes tags of its own: it meets no think tag, and its prompt is what it
# writes in front of an answer. Private characters stand for the tags and for that answer meanwhile.
VERBATIM = """\
{%- set asked, add_generation_prompt, ours = add_generation_prompt, false, namespace(turns=[]) -%}
{%- for message in messages + ([{'role': 'assistant', 'content': '\ue001'}] if asked else []) -%}
{%- set ours.turns = ours.turns + [dict(message, content=message['content'] | replace('think>', 'think\ue000'))] -%}
{%- endfor -%}
{%- set messages = ours.turns -%}
{%- set text %}OWN{% endset -%}
{{- (text.split('\ue001')[0] if asked else text) | replace('think\ue000', 'think>') -}}
"""

TRACE = "<think>\n5*60=300\n</think>\n<answer>\n300\n</answer>"  # an answer in the format


def pick_device(cpu: bool, bf16: bool = True) -> tuple[torch.device, torch.dtype | None]:
    """The device to compute on, and the dtype of autocast there (None: float32 throughout).

    Args:
        cpu: stay on the CPU (--cpu).
        bf16: autocast where the device has units for it (BF16). Emulated it would be slower than float32; and fp16,
            all that a V100 or T4 has, would need loss scaling and overflows.
    """
    import torch

    if cpu or not torch.cuda.is_available():
        units = torch.cpu.get_capabilities()
        device, fast = torch.device("cpu"), units.get("avx512_bf16", False) or units.get("amx_bf16", False)
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each width: half a second every time
        device, fast = torch.device("cuda"), torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if bf16 and fast else None


def describe_precision(device: torch.device, autocast: torch.dtype | None, bf16: bool) -> str:
    """What `pick_device` chose, and why, for a person."""
    if autocast:
        return "float32 weights, bf16 autocast (it has units for that)"
    if not bf16:
        return "float32 (BF16 = False)"
    return "float32 (no bf16 units" + ("; fp16 would overflow)" if device.type == "cuda" else ")")


def load_model(
    name: str, dtype: torch.dtype | None = None, free: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a hub id, a saved model, a checkpoint or a LoRA adapter folder, which is merged.

    Its chat template is one that leaves our texts as they are (`settle_template`).

    Args:
        dtype: of the weights, read as that, without a copy in another; buffers stay in float32, for positions would be
            rounded. None: float32, although transformers would load bf16, in which updates of 1e-6 vanish.
        free: the model is only asked, and not in our format: its own template may do what it wants.

    Raises:
        UserError: nothing loadable there, weights missing, or a tokenizer or template that does not fit.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = _load(AutoModelForCausalLM, name, dtype)
    check_tokenizer(model, tokenizer, name, free)
    model.config.use_cache = True  # a Trainer leaves False in the checkpoints that it writes
    rope = getattr(model.config, "rope_parameters", None) or {}
    if "rope_theta" in rope:  # saved once more where Ollama and transformers 4 look for it, at the top of config.json
        model.config.rope_theta = rope["rope_theta"]
    return model, tokenizer


def load_reward_model(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that gives a conversation one score, and its tokenizer, from a hub id or a folder.

    Raises:
        UserError: as in `load_model`; a causal model among them, whose scores would be random.
    """
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = _load(AutoModelForSequenceClassification, name, dtype)
    check_tokenizer(model, tokenizer, name)
    if model.config.num_labels != 1:
        raise UserError(
            f"REWARD_MODEL {name!r} sorts into {model.config.num_labels} classes, a reward model gives one score; "
            "name another"
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # the score is read at the last token that is not this one
    return model, tokenizer


def _load(kind: type, name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by one of transformers' AutoModel classes, and its tokenizer. Raises UserError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    refuse_missing_folder(name, "the model")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = dtype or torch.float32
    safe = {"trust_remote_code": False, "use_safetensors": True}  # a script or a pickle could do anything
    wrong: list[str] = []
    try:
        if kind is AutoModelForCausalLM and (Path(name) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32, **safe).merge_and_unload()
            for parameter in model.parameters():  # no sooner: small updates would round away before they are added
                parameter.data = parameter.data.to(dtype)
        else:
            safe |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # it would say less
            model, found = kind.from_pretrained(name, dtype=dtype, **safe)
            wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
    except Exception as error:  # the hub's, the weights' and the tokenizers' readers have no common base class
        where, remedy = "hub id", "Pass a local folder, or set HF_ENDPOINT=https://hf-mirror.com"
        if Path(name).is_dir():
            where, remedy = "folder", "Put a whole model there (config, *.safetensors, tokenizer) or name another"
        raise UserError(f"cannot load the model {name!r} ({where}): {first_line(error)}. {remedy}") from error
    if wrong:  # they would be random numbers
        raise UserError(
            f"the weights of {name!r}, a {' or '.join(model.config.architectures or ['model'])}, do not make a "
            f"{type(model).__name__}: {len(wrong)} are missing or of another shape, such as {wrong[0]}; get the model "
            "again, or name another"
        )
    return model, tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, free: bool = False) -> None:
    """Gives a tokenizer a fitting template, and one that pads with its end token another token for that.

    Raises:
        UserError: the tokenizer cannot serve this model.
    """
    ids, rows = set(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    ends = model.generation_config.eos_token_id if model.can_generate() else None  # a reward model does not
    ends = {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
    fault = ""
    if max(ids) >= rows:
        fault = f"its ids go up to {max(ids)}, and the model knows {rows} tokens"
    elif ends - ids:
        fault = f"the model ends with token {min(ends - ids)}, which it has not"
    elif tokenizer.eos_token is None:
        fault = "it has no end token"
    if fault:
        raise UserError(f"the tokenizer of {name!r} is not this model's: {fault}; put the model's own beside it")
    if model.can_generate():
        keep_tags(tokenizer)
        settle_template(tokenizer, ends, name, free)
    elif not tokenizer.chat_template:  # a reward model reads what it judges through its own template, or not at all
        raise UserError(f"the tokenizer of {name!r} has no chat template; name a reward model of conversations")
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # padding would look like ends: the model forgets to stop
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        others = [token for token in special if token != tokenizer.eos_token]
        if not others:
            raise UserError(f"the tokenizer of {name!r} has no special token to pad with but its end token; add one")
        old = tokenizer.pad_token
        tokenizer.pad_token = next((token for token in others if "pad" in token or "endoftext" in token), others[0])
        note(f"the tokenizer of {name!r} pads with {old}; here {tokenizer.pad_token} does")


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


def settle_template(tokenizer: PreTrainedTokenizerBase, ends: set[int], name: str, free: bool = False) -> None:
    """Gives a base model PLAIN_TEMPLATE and, unless `free`, another one a template that leaves our text as it is.

    It is saved with whatever is trained. `ends` are ids of tokens. Raises UserError where no template is right.
    """
    if why := base_because(tokenizer, ends):
        tokenizer.chat_template = PLAIN_TEMPLATE
        note(f"{name!r} is a base model ({why}): it gets a plain template that ends answers with {tokenizer.eos_token}")
    fault = None if free else fault_of(tokenizer, ends)
    if fault is None:
        return
    own = tokenizer.get_chat_template()
    remedies = {SYSTEM_FIRST + own: "the system prompt opens the first question"}
    wrapped = [VERBATIM.replace("OWN", template) for template in (own, SYSTEM_FIRST + own)]
    remedies |= dict.fromkeys(wrapped, "a template around it undoes that")
    question = render(tokenizer, [{"role": "user", "content": "1+1="}])
    if "<|im_start|>user\n1+1=<|im_end|>\n" in question:
        begin = question.partition("<|im_start|>")[0]  # a token, with which some begin every text
        begin = begin and f"{{{{- {begin!r} -}}}}"
        remedies = {begin + CHATML_TEMPLATE: "plain ChatML takes its place"}
    for template, remedy in remedies.items():
        tokenizer.chat_template = template
        if fault_of(tokenizer, ends) is None:
            return note(f"{name!r}: {fault}; {remedy}, and the model is saved so")
    raise UserError(
        f"{name!r} cannot learn our format: {fault}; name another model, or put a chat_template.jinja beside it that "
        "writes every turn as it stands"
    )


def fault_of(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    """What goes wrong when a model is asked behind the worked example, and learns an answer; None if nothing does."""
    question = "5分钟多少秒"
    asked = to_conversation(question, example=WORKED_EXAMPLE)
    learned = [*asked, {"role": "assistant", "content": TRACE}]
    try:
        prompt, whole = render(tokenizer, asked), render(tokenizer, learned, complete=True)
    except Exception as error:  # whatever a template raises or runs into
        return f"its chat template refuses a system turn or an example ({first_line(error)})"
    prompt_ids, ids = tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True).strip()
    end = whole.removeprefix(prompt + TRACE)
    stops = tuple(tokenizer.convert_ids_to_tokens([*ends, tokenizer.eos_token_id]))
    faults = {
        "its chat template changes or drops turns": any(turn["content"].strip() not in prompt for turn in asked),
        "its chat template opens or closes a block before the answer": "think>" in prompt.rpartition(question)[2],
        "its chat template puts something between prompt and answer": not whole.startswith(prompt + TRACE),
        f"its chat template ends an answer with {end!r}, where the model does not stop": not end.startswith(stops),
        "its tokenizer joins the prompt's end to the answer": ids[: len(prompt_ids)] != prompt_ids,
        f"its tokenizer makes {back!r} of {TRACE!r}": back != TRACE,
    }
    return next((fault for fault, found in faults.items() if found), None)


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


def check_positions(model: PreTrainedModel, what: str, **tokens: int) -> None:
    """Raises UserError where a model, called `what`, has fewer positions than texts may have `tokens` in all."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < sum(tokens.values()):  # some say -1 where they have no limit
        longest = " + ".join(f"{name} {count}" for name, count in tokens.items())
        raise UserError(f"{what} reads at most {positions} tokens, fewer than {longest}; lower these, or name another")


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


def drop_long(questions: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, at_least: int) -> Dataset:
    """The questions whose prompts have at most `limit` tokens (MAX_PROMPT_TOKENS).

    Raises:
        UserError: fewer than `at_least` (QUESTIONS_PER_STEP) are left, too few for a single step.
    """
    kept = questions.filter(lambda prompt: len(encode(tokenizer, [prompt])[0]) <= limit, input_columns="prompt")
    if len(kept) < at_least:
        dropped = len(questions) - len(kept)
        raise UserError(
            f"{len(kept)} training questions are fewer than QUESTIONS_PER_STEP {at_least} ({dropped} longer than "
            f"MAX_PROMPT_TOKENS {limit} were dropped); change these in train_grpo.py, or pass a larger --dataset "
            "(for a larger `sifted` the same make_traces.py with a higher --limit)"
        )
    return kept


def find_beside(model: str, name: str) -> dict:
    """A JSON file that training wrote into a model's folder, or above it for a checkpoint or an adapter; else {}."""
    for folder in (Path(model), Path(model).parent):
        if Path(model).is_dir() and (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    return {}
