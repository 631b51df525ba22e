"""How many held-out questions does a model answer correctly? Greedy, the whole test split, with a 95 % interval.

python evaluate.py output                        # what train_grpo.py saved
python evaluate.py output/checkpoint-200         # a checkpoint, or an adapter folder
python evaluate.py Qwen/Qwen2.5-0.5B-Instruct    # the model before training
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from prompts import UserError, first_line, load_questions, note, refuse_missing_folder, run, to_conversation
from rewards import extract_answer, find_numbers, parse_number, soft_format_reward

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rollout import PlainSampler, Sampler


def pick_device(cpu: bool) -> tuple[torch.device, torch.dtype | None]:
    """The device to compute on, and the dtype of autocast there (None: float32 throughout)."""
    import torch

    if cpu or not torch.cuda.is_available():
        return torch.device("cpu"), None
    # V100 and T4 have no bf16 units; fp16 would need loss scaling and overflows, so they compute in float32
    return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 and its tokenizer, from a hub id, a saved model, a checkpoint or a LoRA adapter folder.

    float32, although transformers would load bf16: updates of 1e-6 vanish in bf16 weights. An adapter is merged.

    Raises:
        UserError: nothing loadable there, weights missing, or a tokenizer that does not fit them or a conversation.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    refuse_missing_folder(name)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    safe = {"trust_remote_code": False, "use_safetensors": True}  # a script or a pickle could do anything
    wrong: list[str] = []
    try:
        if (Path(name) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32, **safe).merge_and_unload()
        else:
            safe |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # it would say less
            model, found = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **safe)
            wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
    except Exception as error:  # the hub's, the weights' and the tokenizers' readers have no common base class
        where, remedy = "hub id", "Pass a local folder, or set HF_ENDPOINT=https://hf-mirror.com"
        if Path(name).is_dir():
            where, remedy = "folder", "Put a whole model there (config, *.safetensors, tokenizer) or name another"
        raise UserError(f"cannot load the model {name!r} ({where}): {first_line(error)}. {remedy}") from error
    if wrong:  # they would be random numbers
        raise UserError(
            f"the weights of {name!r} do not fit its config.json: {len(wrong)} are missing or of another shape, "
            f"such as {wrong[0]}; get the model again"
        )
    check_tokenizer(model, tokenizer, name)
    model.config.use_cache = True  # a Trainer leaves False in the checkpoints that it writes
    return model, tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises UserError where the tokenizer cannot serve this model; where it would pad with its end token, mends it."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name!r} has no chat template; use an instruction-tuned model")
    ids, rows = set(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    ends = model.generation_config.eos_token_id
    unknown = {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None} - ids
    fault = ""
    if max(ids) >= rows:
        fault = f"its ids go up to {max(ids)}, and the model knows {rows} tokens"
    elif unknown:
        fault = f"the model ends with token {min(unknown)}, which it has not"
    elif tokenizer.eos_token is None:
        fault = "it has no end token"
    if fault:
        raise UserError(f"the tokenizer of {name!r} is not this model's: {fault}; put the model's own beside it")
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # padding would look like ends: the model forgets to stop
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        others = [token for token in special if token != tokenizer.eos_token]
        if not others:
            raise UserError(f"the tokenizer of {name!r} has no special token to pad with but its end token; add one")
        old = tokenizer.pad_token
        tokenizer.pad_token = next((token for token in others if "pad" in token or "endoftext" in token), others[0])
        note(f"the tokenizer of {name!r} pads with {old}; here {tokenizer.pad_token} does")


def encode(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]]) -> list[list[int]]:
    """Prompt token ids, up to and with the header of the assistant's turn."""
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]


def answer(
    sampler: Sampler | PlainSampler, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int
) -> str:
    """The model's greedy answer to one question, as text."""
    ids = sampler.generate(encode(tokenizer, [to_conversation(question)]), max_new_tokens)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def wilson_interval(share: float, n: int) -> list[float]:
    """95 % interval of a share seen in n trials (Wilson 1927); within [0, 1] even at 0 and 1."""
    z = 1.959964
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [(center + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]


def grade(completion: str, label: int) -> dict:
    """strict: the one answer block holds the label. flexible: that number or, without one, the last in the text."""
    extracted = extract_answer(completion)
    number = None if extracted is None else parse_number(extracted)
    numbers = find_numbers(completion) if number is None else [number]
    return {"strict": number == label, "flexible": bool(numbers) and numbers[-1] == label}


def evaluate(
    sampler: Sampler | PlainSampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    max_new_tokens: int,
    batch_size: int,
    title: str | None = None,
) -> tuple[dict, list[dict]]:
    """Answer every question greedily and grade the answers.

    Args:
        questions: the columns `prompt` and `answer` of `prompts.load_questions`.
        max_new_tokens: where an answer is cut off.
        batch_size: questions answered at a time.
        title: of the progress bar; None shows none.

    Returns:
        the figures `{n, strict, flexible, format, mean_tokens, truncated, strict_ci95}` (shares, and tokens),
        and a row `{question, completion, label, strict, flexible}` for every question, in their order.
    """
    from tqdm import tqdm

    prompts, labels = list(questions["prompt"]), list(questions["answer"])
    ids = encode(tokenizer, prompts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths share a batch: less padding
    completion_ids: list[list[int]] = [[] for _ in ids]
    with tqdm(total=len(ids), desc=title, unit=" questions", disable=title is None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, new in zip(batch, sampler.generate([ids[i] for i in batch], max_new_tokens), strict=True):
                completion_ids[i] = new
            bar.update(len(batch))
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    rows = [
        {"question": prompt[-1]["content"], "completion": text, "label": label, **grade(text, label)}
        for prompt, text, label in zip(prompts, texts, labels, strict=True)
    ]
    n = len(rows)
    formats = soft_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    strict = sum(row["strict"] for row in rows) / n
    ended = sum(bool(new) and new[-1] in sampler.eos for new in completion_ids)
    figures = {
        "n": n,
        "strict": strict,
        "flexible": sum(row["flexible"] for row in rows) / n,
        "format": sum(value > 0 for value in formats) / n,
        "mean_tokens": sum(map(len, completion_ids)) / n,
        "truncated": 1 - ended / n,
        "strict_ci95": wilson_interval(strict, n),
    }
    return figures, rows


def describe(figures: dict) -> str:
    """One line for a person."""
    low, high = figures["strict_ci95"]
    return (
        f"strict {figures['strict']:.1%} (95 % interval {low:.1%} to {high:.1%}), flexible {figures['flexible']:.1%}, "
        f"format {figures['format']:.1%}, {figures['mean_tokens']:.0f} tokens, {figures['truncated']:.1%} cut off, "
        f"{figures['n']} questions"
    )


def report(
    sampler: Sampler | PlainSampler,
    tokenizer: PreTrainedTokenizerBase,
    test: Dataset,
    recipe: SimpleNamespace,
    title: str,
) -> tuple[dict, str]:
    """Evaluate on all of `test` and print a line; returns the figures, and the answer to the probe."""
    figures, _ = evaluate(sampler, tokenizer, test, recipe.MAX_COMPLETION_TOKENS, recipe.EVAL_BATCH, title)
    print(f"{title:<11}{describe(figures)}", flush=True)
    return figures, answer(sampler, tokenizer, recipe.PROBE_QUESTION, recipe.MAX_COMPLETION_TOKENS)


def find_beside(model: str, name: str) -> dict | None:
    """A JSON file that training wrote into a model's folder, or above it for a checkpoint or an adapter."""
    for folder in (Path(model), Path(model).parent):
        if Path(model).is_dir() and (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    return None


def trained_recipe(model: str) -> dict:
    """The constants that a model was trained under; those of train_grpo.py for a model from elsewhere."""
    import train_grpo  # it imports this file, so not at the top

    constants = vars(train_grpo.make_recipe(train_grpo.parse_flags([])))
    return constants | (find_beside(model, "recipe/recipe.json") or {})


def main() -> None:
    from rollout import make_sampler

    parser = argparse.ArgumentParser(description="accuracy on held-out questions", allow_abbrev=False)
    parser.add_argument("model", help="hub id, saved model, checkpoint or adapter folder")
    parser.add_argument("--dataset", help="hub id or folder (default: what the model was trained on)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="the first so many questions only")
    parser.add_argument("--output", help="folder for eval.json and eval.jsonl (default: the model's)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    flags = parser.parse_args()
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit}: at least 1 question is needed")

    recipe = trained_recipe(flags.model)
    model, tokenizer = load_model(flags.model)
    dataset = flags.dataset or (find_beside(flags.model, "results.json") or recipe).get("dataset", recipe["DATASET"])
    questions = load_questions(dataset, flags.split)
    questions = questions.select(range(min(flags.limit or len(questions), len(questions))))
    device, autocast = pick_device(flags.cpu)
    sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
    figures, rows = evaluate(
        sampler, tokenizer, questions, recipe["MAX_COMPLETION_TOKENS"], recipe["EVAL_BATCH"], title="evaluating"
    )

    folder = Path(flags.output or flags.model)
    if not flags.output and not folder.is_dir():  # a hub id
        folder = Path(recipe["OUTPUT_DIR"], flags.model.replace("/", "--"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    low, high = figures.pop("strict_ci95")
    print(f"{'model':<14}{flags.model}\n{'data set':<14}{dataset}, split {flags.split}")
    for name, value in figures.items():
        interval = f"  (95 % interval {low:.1%} to {high:.1%})" if name == "strict" else ""
        text = f"{value:.1%}" if name in ("strict", "flexible", "format", "truncated") else f"{value:g}"
        print(f"{name:<14}{text}{interval}")
    print(f"{'written':<14}{folder / 'eval.json'}, {folder / 'eval.jsonl'}")


if __name__ == "__main__":
    run(main)
