"""What a finished run offers to others: docs/use.md's own data trained on, its model used by pipeline and by Ollama."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT, conversation_about, run_main
from huggingface_hub import ModelCard

import train_grpo
from engine.model_card import LAST_QUESTION, is_hub_id, model_card, modelfile
from engine.models import load_model
from engine.questions import load_splits, to_prompt
from engine.templates import carry_prompt, render
from prompts import SYSTEM_PROMPT, WORKED_EXAMPLE

USE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")


def block_with(text: str, page: str) -> str:
    """The one block of code on a page that holds this text."""
    [block] = [block for block in re.findall(r"^```\w+\n(.*?)^```", page, flags=re.M | re.S) if text in block]
    return block


@pytest.fixture(scope="module")
def run(demo_base, tmp_path_factory) -> SimpleNamespace:
    """One step of the demo's model on the data that docs/use.md pastes: its folder, data, recipe and results."""
    folder = tmp_path_factory.mktemp("own")
    paste = block_with("my_data/train.jsonl", USE).split("python ")[0]
    subprocess.run(["bash", "-euc", paste], cwd=folder, check=True)
    data, output = folder / "my_data", folder / "run"
    flags = ["--cpu", "--max-steps", 1, "--model", demo_base / "model", "--dataset", data, "--output", output]
    run_main(train_grpo.main, *flags, QUESTIONS_PER_STEP=2, MAX_COMPLETION_TOKENS=32, BF16=False)
    read = {name: json.loads((output / path).read_text(encoding="utf-8")) for name, path in RECORDS.items()}
    return SimpleNamespace(output=output, data=data, **read)


RECORDS = {"recipe": "recipe/recipe.json", "results": "results.json", "config": "config.json"}


def test_data_of_your_own(run):
    """Its rows are read as they stand there, four to train on, one to develop with, others to test with."""
    train, dev, test = load_splits(str(run.data), train_grpo.DEV_QUESTIONS)
    assert (len(train), len(dev)) == (4, 1) and all(label > 0 for label in train["answer"])
    asked = [question["content"] for rows in (train, dev, test) for [question] in rows["prompt"]]
    assert len(set(asked)) == len(asked)
    assert run.results["finished"] and run.results["steps"] == 1 and run.results["after"]["n"] == len(test)


# ------------------------------------------------------------------------------------------------------------- hub
def test_card(run):
    """What the hub reads at its top is valid and true; what people read has the run's own figures."""
    card = ModelCard.load(run.output / "README.md")
    data = card.data.to_dict()
    assert data == {
        "language": "zh",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "grpo"],
    }  # a model and data from folders have no page on the hub, and no licence is made up
    for when in ("before", "after"):
        figures = run.results[when]
        assert f"| {when} | {figures['strict']:.1%} | {figures['strict_ci95'][0]:.1%} to " in card.text
    settings = ["| QUESTIONS_PER_STEP | 2 |", "'correctness_reward'", "| SEED | 42 |", "'trl': '1.", "| steps | 1 |"]
    assert all(words in card.text for words in settings)
    assert str(run.output.parent) not in card.content  # folders of this machine are nobody else's business


def test_card_of_other_runs(run):
    """Names of the hub become metadata; supervised fine-tuning is called that and has no rewards; so with LoRA."""
    recipe = run.recipe | {"MODEL": train_grpo.MODEL, "DATASET": train_grpo.DATASET, "USE_LORA": True}
    card = ModelCard(model_card(recipe, run.results))
    assert card.data.base_model == train_grpo.MODEL and card.data.datasets == [train_grpo.DATASET]
    assert (
        "| LORA_RANK | 16 |" in card.text and f"| LORA_LEARNING_RATE | {train_grpo.LORA_LEARNING_RATE} |" in card.text
    )
    recipe = {name: value for name, value in recipe.items() if not name.startswith("REWARD")} | {"ROWS_PER_STEP": 16}
    card = ModelCard(model_card(recipe, run.results))
    assert card.data.tags == ["trl", "sft"] and "after SFT" in card.text and "reward" not in card.text
    assert is_hub_id("owner/name") and not any(map(is_hub_id, ["/a/b", "./a/b", "name", "a/b/c", str(run.output)]))


@pytest.mark.parametrize("page", ["use.md", "card"])
def test_pipeline(run, page, monkeypatch, capsys):
    """The lines for transformers' pipeline, as docs/use.md and the card have them, give the run's own greedy answer:
    the folder knows the prompt, the limit of 32 tokens and that nothing is sampled. They import nothing of ours."""
    text = USE if page == "use.md" else (run.output / "README.md").read_text(encoding="utf-8")
    code = block_with("pipeline(", text)
    monkeypatch.chdir(run.output if page == "card" else run.output.parent)
    capsys.readouterr()
    assert "prompts" not in code and "max_new_tokens" not in code
    exec(code.replace('"output/grpo"', '"run"'), {})
    assert capsys.readouterr().out.strip() == run.results["probe"]["after"].strip()


def test_saved_for_other_programs(run):
    """The rope's base stands where Ollama and transformers 4 look, and nothing samples or punishes by default."""
    assert run.config["rope_theta"] == run.config["rope_parameters"]["rope_theta"]
    model, tokenizer = load_model(str(run.output))
    assert model.config.rope_parameters["rope_theta"] == run.config["rope_theta"]
    generation = json.loads((run.output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id and generation["do_sample"] is False
    assert generation["max_new_tokens"] == 32
    assert not {"temperature", "top_p", "top_k", "repetition_penalty"} & generation.keys()


# ---------------------------------------------------------------------------------------------------------- Ollama
def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Its commands and their values, as Ollama's parser finds them."""
    return [
        (name, quoted or plain.strip('"'))
        for name, quoted, plain in re.findall(
            r'^(FROM|TEMPLATE|PARAMETER \w+) (?:"""(.*?)"""|(.*?))$', text, flags=re.M | re.S
        )
    ]


def test_modelfile(run):
    """Ollama sends what chat.py sends, greedily, and stops where it stops."""
    text = (run.output / "Modelfile").read_text(encoding="utf-8")
    commands = dict(parse_modelfile(text))
    _, tokenizer = load_model(str(run.output))
    assert len(commands) == len(parse_modelfile(text)) == 6 and commands["FROM"] == "."
    assert commands["PARAMETER stop"] == tokenizer.eos_token == "<|im_end|>"
    assert [commands[f"PARAMETER {name}"] for name in ("temperature", "repeat_penalty", "num_predict")] == [
        "0",
        "1",
        "32",
    ]
    template = commands["TEMPLATE"]
    assert template.startswith(LAST_QUESTION)
    question = "5分钟多少秒"
    filled = template.removeprefix(LAST_QUESTION).replace("{{ $question }}", question)
    assert SYSTEM_PROMPT in filled and filled == render(tokenizer, to_prompt(question))
    assert filled == render(tokenizer, conversation_about(question))


def test_example_goes_along(run):
    """Asked behind an example in training, the model is so by Ollama."""
    _, tokenizer = load_model(str(run.output))
    asked = conversation_about("5分钟多少秒", example=WORKED_EXAMPLE)
    expected = render(tokenizer, asked)  # a system turn of its own: the template adds nothing
    tokenizer.chat_template = carry_prompt(tokenizer.chat_template, asked[:-1])
    template = dict(parse_modelfile(modelfile(tokenizer, 32)))["TEMPLATE"].removeprefix(LAST_QUESTION)
    assert len(asked) == 4 and template.replace("{{ $question }}", "5分钟多少秒") == expected


def test_folder_is_what_ollama_reads(run):
    """Ollama takes the weights by the name model*.safetensors, and the tokenizer by those of its files."""
    names = {path.name for path in run.output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "Modelfile"} <= names
    assert run.config["architectures"] == ["Qwen2ForCausalLM"]
