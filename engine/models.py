"""Where models compute, and how a model and its tokenizer are loaded and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.console import UserError, first_line, note, refuse_missing_folder
from engine.templates import (
    carried_prompt,
    carry_prompt,
    encode,
    fit_template,
    keep_tags,
    own_template,
    prompt_turns,
    todays_prompt,
    trained_recipe,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pick_device(cpu: bool, bf16: bool = True) -> tuple[torch.device, torch.dtype | None]:
    """The device to compute on, and the dtype of autocast there (None: float32 throughout).

    Args:
        cpu: stay on the CPU.
        bf16: autocast to bf16 where the device computes it in hardware. Emulated it is slower than float32, and fp16,
            which is all that a V100 or T4 has, overflows without loss scaling.
    """
    import torch

    if cpu or not torch.cuda.is_available():
        units = torch.cpu.get_capabilities()
        device, fast = torch.device("cpu"), units.get("avx512_bf16", False) or units.get("amx_bf16", False)
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new width, which takes half a second
        device, fast = torch.device("cuda"), torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if bf16 and fast else None


def load_model(
    name: str, dtype: torch.dtype | None = None, prompt: list[dict] | None = None, free: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a hub id, a saved model, a checkpoint or an adapter, which is merged.

    The chat template writes our texts as they stand (`templates.fit_template`) and carries the prompt of the training.

    Args:
        dtype: of the weights; buffers stay in float32. None: float32, because updates of 1e-6 vanish in bf16.
        prompt: the turns before a question, for a model that carries none; None: those of prompts.py.
        free: the model is asked without a prompt of ours, and keeps its own template.

    Raises:
        UserError: no loadable model there, missing weights, or a tokenizer or template that does not fit.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = _load(AutoModelForCausalLM, name, dtype)
    turns = carried_prompt(tokenizer.chat_template or "")
    if turns is None:
        old = trained_recipe(name)  # {}, or of a model that was trained before templates carried the prompt
        turns = prompt or todays_prompt()
        if "SYSTEM_PROMPT" in old:
            turns = prompt_turns(old["SYSTEM_PROMPT"], old.get("EXAMPLE", []))
        model.generation_config.max_new_tokens = old.get("MAX_COMPLETION_TOKENS")  # its own is meant for other prompts
    else:
        tokenizer.chat_template = own_template(tokenizer.chat_template)
    if prompt not in (None, turns):
        note(f"{name!r} is asked under the prompt of its training; prompts.py has another one")
    check_tokenizer(model, tokenizer, name, free)
    if not free:
        tokenizer.chat_template = carry_prompt(tokenizer.chat_template, turns)
    model.config.use_cache = True  # a Trainer writes False into its checkpoints
    rope = getattr(model.config, "rope_parameters", None) or {}
    if "rope_theta" in rope:  # Ollama and transformers 4 look for it at the top of config.json
        model.config.rope_theta = rope["rope_theta"]
    return model, tokenizer


def load_reward_model(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that gives a conversation one score, and its tokenizer. Raises UserError as `load_model` does."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = _load(AutoModelForSequenceClassification, name, dtype)
    tokenizer.chat_template = own_template(tokenizer.chat_template or "") or None  # without a prompt of ours
    check_tokenizer(model, tokenizer, name)
    if model.config.num_labels != 1:
        raise UserError(
            f"REWARD_MODEL {name!r} has {model.config.num_labels} outputs, and a reward model has one; name another"
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # the model reads the score at the last token before padding
    return model, tokenizer


def _load(kind: type, name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by one of transformers' AutoModel classes, and its tokenizer. Raises UserError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

    refuse_missing_folder(name, "the model")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = dtype or torch.float32
    safe = {"trust_remote_code": False, "use_safetensors": True}  # a script or a pickle could run anything
    wrong: list[str] = []
    base = fault = ""
    try:
        if kind is AutoModelForCausalLM and (Path(name) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM, PeftConfig

            base = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32, **safe).merge_and_unload()
            if Path(name, "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(name)
            for parameter in model.parameters():  # after the merge, because small updates would round away before it
                parameter.data = parameter.data.to(dtype)
        else:
            safe |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # for the message below
            model, found = kind.from_pretrained(name, dtype=dtype, **safe)
            wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
        base, fault = "", "its tokenizer is missing or damaged: "
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
    except Exception as error:  # the hub's, the weights' and the tokenizers' readers have no common base class
        where, remedy = "hub id", "Pass a local folder, or set HF_ENDPOINT=https://hf-mirror.com"
        if Path(name).is_dir():
            where, remedy = "folder", "Put all its files there (config, *.safetensors, tokenizer) or name another"
        if base and not Path(base).is_dir():
            where = f"adapter of {base!r}, no folder in {str(Path.cwd())!r}"
            remedy = "Mend base_model_name_or_path in its adapter_config.json, or set HF_ENDPOINT if that is a hub id"
        raise UserError(f"cannot load the model {name!r} ({where}): {fault}{first_line(error)}. {remedy}") from error
    if wrong:  # transformers has filled them with random numbers
        raise UserError(
            f"the weights of {name!r} do not make a {type(model).__name__}: {len(wrong)} are missing or of another "
            f"shape, such as {wrong[0]}; get the model again, or name another"
        )
    return model, tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, free: bool = False) -> None:
    """Give a tokenizer a fitting template, and a token for padding that is not its end token.

    Raises UserError if the tokenizer does not belong to this model.
    """
    ids, rows = set(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    ends = model.generation_config.eos_token_id if model.can_generate() else None  # None for a reward model
    ends = {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
    fault = ""
    if max(ids) >= rows:
        fault = f"its ids go up to {max(ids)}, and the model knows {rows} tokens"
    elif ends - ids:
        fault = f"the model ends with token {min(ends - ids)}, which it does not have"
    elif tokenizer.eos_token is None:
        fault = "it has no end token"
    if fault:
        raise UserError(f"the tokenizer of {name!r} is not this model's: {fault}; put the model's own beside it")
    if model.can_generate():
        keep_tags(tokenizer)
        fit_template(tokenizer, ends, name, free)
    elif not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name!r} has no chat template; name a reward model of conversations")
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # else the model does not learn to stop
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        others = [token for token in special if token != tokenizer.eos_token]
        if not others:
            raise UserError(f"the tokenizer of {name!r} has no special token but its end token; add one to pad with")
        old = tokenizer.pad_token
        tokenizer.pad_token = next((token for token in others if "pad" in token or "endoftext" in token), others[0])
        note(f"the tokenizer of {name!r} pads with {old}; here {tokenizer.pad_token} does")


def check_positions(model: PreTrainedModel, what: str, **tokens: int) -> None:
    """Raises UserError where the model, called `what`, has fewer positions than these numbers of tokens together."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < sum(tokens.values()):  # -1 means no limit
        longest = " + ".join(f"{name} {count}" for name, count in tokens.items())
        raise UserError(f"{what} reads at most {positions} tokens, fewer than {longest}; lower these, or name another")


def drop_long(questions: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, at_least: int) -> Dataset:
    """The questions whose prompts have at most `limit` tokens. Raises UserError if fewer than `at_least` are left."""
    prompts = encode(tokenizer, questions["prompt"][:])
    kept = questions.select([i for i, ids in enumerate(prompts) if len(ids) <= limit])
    if len(kept) < at_least:
        dropped = len(questions) - len(kept)
        raise UserError(
            f"{len(kept)} training questions are fewer than QUESTIONS_PER_STEP {at_least} ({dropped} longer than "
            f"MAX_PROMPT_TOKENS {limit} were dropped); change these in train_grpo.py, or pass a larger --dataset"
        )
    return kept
