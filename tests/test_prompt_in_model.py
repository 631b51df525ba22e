"""A model's folder carries the prompt of its training: whoever asks the model asks it as it was trained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import conversation_about, run_main
from datasets import load_from_disk
from test_checkpoints import SMALL
from test_templates import BUNDLED, QUESTION, QWEN, TRACE, WAYS, ends_of, make_tokenizer, write_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase, pipeline

import chat
import evaluate
import prompts
import train_grpo
from engine.console import UserError
from engine.models import load_model
from engine.rollout import make_sampler
from engine.runs import load_policy
from engine.templates import (
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    carried_prompt,
    carry_prompt,
    encode,
    fit_template,
    own_template,
    prompt_turns,
    render,
    todays_prompt,
)
from prompts import SYSTEM_PROMPT, WORKED_EXAMPLE

# What could end a text of JSON or of Jinja, or begin something there
SPECIAL = """\
'一' "二" \\ \\n \\u0041 {{ messages }} {% raw %} {%- endif %} {# 注 #} #} -%} }}{% endraw %} \\" \\' \x07\t😀\u2028
第二行\r
 + messages %}{%- endif %}{#- the model's own template #}
<|im_end|> </s>
"""
SPECIAL_TURNS = [
    {"role": "system", "content": SPECIAL},
    {"role": "user", "content": SPECIAL + "?"},
    {"role": "assistant", "content": SPECIAL + "!"},
]
USER = [{"role": "user", "content": QUESTION}]
ANSWERED = [*USER, {"role": "assistant", "content": TRACE}]
TOKENS = 5  # of an answer: so few that every answer is cut off


def rewrite_template(folder: Path, rewrite) -> Path:
    """The folder, with another chat template."""
    file = folder / "chat_template.jinja"
    file.write_text(rewrite(file.read_text(encoding="utf-8")), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bare(demo_base, tmp_path_factory) -> Path:
    """The tests' model in a folder that carries no prompt."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(demo_base / "model", folder)
    return rewrite_template(folder, own_template)


def asked_under(tokenizer: PreTrainedTokenizerBase, bare: Path, turns: list[dict]) -> bool:
    """Whether the question alone becomes the tokens that it has behind these turns in the model without a prompt."""
    return encode(tokenizer, [USER]) == encode(AutoTokenizer.from_pretrained(bare), [turns + USER])


# --------------------------------------------------------------------------------------------- the turns in a template
@pytest.mark.parametrize("example", [[], WORKED_EXAMPLE], ids=["without example", "with example"])
@pytest.mark.parametrize("kind", ["ChatML", "Qwen", "plain", "refuses a system turn"])
def test_a_question_is_asked_under_the_prompt(kind, example, tmp_path, monkeypatch):
    """A model from a folder without a prompt asks a question as its own template writes it behind the system prompt and
    the example, to the token; so does plain transformers once the model is saved. A system turn of one's own is left
    alone."""
    monkeypatch.setattr(prompts, "EXAMPLE", example)
    if kind == "Qwen":
        if not QWEN.is_dir():
            pytest.skip("needs the real tokenizer beside the project")
        before = AutoTokenizer.from_pretrained(QWEN)
    else:
        templates = {"ChatML": CHATML_TEMPLATE, "plain": "", "refuses a system turn": BUNDLED["gemma"]}
        before = make_tokenizer(templates[kind])
    _, tokenizer = load_model(str(write_model(tmp_path / "model", before)))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    before.chat_template = before.chat_template or PLAIN_TEMPLATE

    other = [{"role": "system", "content": "你是诗人。"}]
    for end in (USER, ANSWERED):
        complete = end is ANSWERED
        for turns, asked in (([*todays_prompt(), *end], end), (other + end, other + end)):
            if kind == "refuses a system turn":  # the system prompt opens the first question
                first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
                turns = [first, *turns[2:]]
            wanted = render(before, turns, complete), encode(before, [turns], complete)
            for each in (tokenizer, saved):
                assert (render(each, asked, complete), encode(each, [asked], complete)) == wanted


@pytest.mark.parametrize("white", ["", "\n  "], ids=["", "white space"])
def test_every_template_that_fits_can_carry(white, capsys):
    """The turns change nothing in what follows, in any template that TRL knows and that fits, also where white space
    stands before its first tag."""
    for name, template in BUNDLED.items():
        tokenizer = make_tokenizer(white + template)
        if WAYS[name] == "refused":
            continue
        try:
            fit_template(tokenizer, ends_of(tokenizer), "mine")
        except UserError:  # the white space makes the difference to one that was replaced
            continue
        own = tokenizer.chat_template
        turns = conversation_about(QUESTION, example=WORKED_EXAMPLE)[:-1]
        for end in (USER, ANSWERED, [*ANSWERED, *USER]):
            wanted = render(tokenizer, turns + end)
            tokenizer.chat_template = carry_prompt(own, turns)
            assert render(tokenizer, end) == wanted == render(tokenizer, turns + end), name
            tokenizer.chat_template = own


def test_special_characters_survive():
    """Whatever characters a prompt has, they come back from the template, and the template writes them as they are."""
    tokenizer = make_tokenizer(CHATML_TEMPLATE)
    wanted = render(tokenizer, SPECIAL_TURNS + USER)
    assert all(f"\n{turn['content']}<|im_end|>" in wanted for turn in SPECIAL_TURNS)
    tokenizer.chat_template = carry_prompt(CHATML_TEMPLATE, SPECIAL_TURNS)
    assert render(tokenizer, USER) == wanted
    assert carried_prompt(tokenizer.chat_template) == SPECIAL_TURNS
    assert own_template(tokenizer.chat_template) == CHATML_TEMPLATE


def test_a_prompt_is_replaced():
    """New turns take the place of the old ones: there is one prompt and one own template, however often it is done."""
    once = carry_prompt(CHATML_TEMPLATE, todays_prompt())
    assert carry_prompt(carry_prompt(CHATML_TEMPLATE, SPECIAL_TURNS), todays_prompt()) == once
    assert own_template(once) == own_template(CHATML_TEMPLATE) == CHATML_TEMPLATE
    assert carried_prompt(CHATML_TEMPLATE) is None


def test_a_prompt_that_somebody_damaged(bare, tmp_path):
    """Turns that are edited by hand and are no JSON any more end in one line that says where they stand."""
    folder = Path(shutil.copytree(bare, tmp_path / "model"))
    rewrite_template(folder, lambda own: carry_prompt(own, todays_prompt()).replace('"role": "system"', "role: system"))
    with pytest.raises(UserError, match="prompt at the top of a chat_template.jinja is no JSON: .*; mend it there"):
        load_model(str(folder))


# ------------------------------------------------------------------------------------------------------------ trained
@pytest.fixture(scope="module")
def runs(demo_base, bare, tmp_path_factory) -> tuple[Path, Path]:
    """A run of one step under a prompt of special characters, and a second with LoRA that begins with what it saved,
    while prompts.py and the constants have other prompts."""
    folder = tmp_path_factory.mktemp("runs")
    data = load_from_disk(demo_base / "data")
    for split, count in (("train", 10), ("test", 3)):
        data[split] = data[split].select(range(count))
    data.save_to_disk(folder / "data")
    constants = SMALL | {"COMPLETIONS_PER_QUESTION": 2, "MICRO_BATCH": 4, "DEV_QUESTIONS": 2}
    constants |= {"MAX_COMPLETION_TOKENS": TOKENS, "MAX_PROMPT_TOKENS": 2000}
    flags = ["--cpu", "--dataset", folder / "data", "--max-steps", 1]
    special = {"SYSTEM_PROMPT": SPECIAL, "EXAMPLE": SPECIAL_TURNS[1:]}
    run_main(train_grpo.main, *flags, "--model", bare, "--output", folder / "run", **constants, **special)
    again = constants | {"USE_LORA": True, "SYSTEM_PROMPT": "别的"}
    run_main(train_grpo.main, *flags, "--model", folder / "run", "--output", folder / "again", **again)
    return folder / "run", folder / "again"


FOLDERS = ["run", "run/checkpoint-1", "again", "again/adapter", "again/checkpoint-1"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_trained_model_keeps_its_prompt(name, runs, bare, monkeypatch):
    """Every folder that a training writes carries the prompt of its training, to the character, and keeps it whatever
    prompts.py or a caller says; a training that begins with it does so too, and records it."""
    folder = runs[0].parent / name
    monkeypatch.setattr(prompts, "SYSTEM_PROMPT", "按格式")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert own_template(template) == CHATML_TEMPLATE and carried_prompt(template) == SPECIAL_TURNS
    assert asked_under(AutoTokenizer.from_pretrained(folder), bare, SPECIAL_TURNS)
    _, tokenizer = load_model(str(folder), prompt=todays_prompt())
    assert tokenizer.chat_template == template
    recorded = json.loads((runs[1] / "recipe/recipe.json").read_text(encoding="utf-8"))
    assert [recorded["SYSTEM_PROMPT"], *recorded["EXAMPLE"]] == [SPECIAL, *SPECIAL_TURNS[1:]]


def test_a_model_of_the_hub_keeps_its_prompt(runs, bare, tmp_path):
    """So does one whose template is not in a file of its own, and a training of it records that prompt."""
    folder = Path(shutil.copytree(runs[0], tmp_path / "model", ignore=shutil.ignore_patterns("recipe", "checkpoint-*")))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load_model(str(folder))
    assert asked_under(tokenizer, bare, SPECIAL_TURNS) and model.generation_config.max_new_tokens == TOKENS
    assert prompt_in_recipe(folder) == SPECIAL_TURNS


def prompt_in_recipe(model: Path) -> list[dict]:
    """The prompt that a training of this model records."""
    recipe = SimpleNamespace(**train_grpo.default_recipe() | {"MODEL": str(model)})
    load_policy(recipe)
    return prompt_turns(recipe.SYSTEM_PROMPT, recipe.EXAMPLE)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_length_of_answers_is_saved(name, runs, run_chat, tmp_path):
    """generation_config.json says how long answers may get, and evaluate.py and chat.py let them get so long."""
    folder = runs[0].parent / name
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == TOKENS and saved["do_sample"] is False
    evaluate.main([str(folder), "--cpu", "--questions", ":2", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["tokens"] for row in rows] == [TOKENS] * 2 and all(row["truncated"] for row in rows)
    said = run_chat(folder, "--cpu", stdin=f"{rows[0]['question']}\n")
    assert said.strip() == rows[0]["completion"].strip() != ""


def test_an_untrained_model_has_no_limit(bare, tmp_path):
    """The limit that a model brings which was not trained here is meant for other prompts, and is ignored."""
    folder = Path(shutil.copytree(bare, tmp_path / "model"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"max_new_tokens": 7}))
    model, _ = load_model(str(folder))
    assert model.generation_config.max_new_tokens is None


def test_pipeline_asks_as_in_training(runs, bare, monkeypatch):
    """transformers' pipeline, given the folder and a user turn and nothing else, asks under the prompt, answers as
    evaluate.py does, and stops at the length of the training."""
    ask = pipeline("text-generation", str(runs[0]))
    seen, generate = [], ask.model.generate

    def spy(**given):
        made = generate(**given)
        seen.append((given["input_ids"].tolist(), made.tolist()))
        return made

    monkeypatch.setattr(ask.model, "generate", spy)
    answer = ask(USER)[0]["generated_text"][-1]
    [([prompt], [whole])] = seen
    assert [prompt] == encode(AutoTokenizer.from_pretrained(bare), [SPECIAL_TURNS + USER])
    assert len(whole) == len(prompt) + TOKENS and answer["role"] == "assistant"
    model, tokenizer = load_model(str(runs[0]))
    (greedy,) = make_sampler(model.eval(), tokenizer).generate([prompt], TOKENS)
    assert greedy == whole[len(prompt) :] and answer["content"] == tokenizer.decode(greedy, skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------- written by old code
@pytest.mark.parametrize("example", [WORKED_EXAMPLE, None], ids=["with example", "before there were examples"])
def test_a_folder_of_the_old_code(example, bare, demo_base, run_chat, tmp_path, monkeypatch):
    """Where recipe.json has the prompt and the template has none, the model and its checkpoints are asked under that
    prompt and with that length of answers, and a training that begins there goes on with it."""
    model = Path(shutil.copytree(bare, tmp_path / "model"))
    shutil.copytree(bare, model / "checkpoint-7")
    recipe = {"SYSTEM_PROMPT": "按格式", "MAX_COMPLETION_TOKENS": 3} | ({"EXAMPLE": example} if example else {})
    (model / "recipe").mkdir()
    (model / "recipe/recipe.json").write_text(json.dumps(recipe))
    turns = [{"role": "system", "content": "按格式"}, *(example or [])]
    for folder in (model, model / "checkpoint-7"):
        loaded, tokenizer = load_model(str(folder), prompt=todays_prompt())
        assert asked_under(tokenizer, bare, turns) and loaded.generation_config.max_new_tokens == 3
        assert prompt_in_recipe(folder) == turns

        flags = ["--cpu", "--questions", ":2", "--output", str(tmp_path), "--dataset", str(demo_base / "data")]
        evaluate.main([str(folder), *flags])
        rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["tokens"] for row in rows] == [3, 3]
        monkeypatch.setattr(chat, "MAX_TOKENS", 20)  # of models that were not trained here
        assert run_chat(folder, "--cpu", stdin=f"{rows[0]['question']}\n").strip() == rows[0]["completion"].strip()
    assert SYSTEM_PROMPT != "按格式"
