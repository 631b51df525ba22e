"""Base models: recognised and none else, given a plain template and an end, and the ones that the demo makes."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, conversation_about, run_main
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import evaluate
import prompts
import train_grpo
from engine import demo, models, pretraining
from engine.questions import to_prompt
from engine.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, carry_prompt, encode, own_template, render, todays_prompt
from prompts import SYSTEM_PROMPT

QWEN = ROOT.parent / "shared" / "data" / "qwen2.5_tokenizer"
needs_qwen = pytest.mark.skipif(not QWEN.is_dir(), reason="needs the real tokenizer beside the project")
TRACE = "<think>\n5*60=300\n</think>\n<answer>\n300\n</answer>"


@pytest.fixture(scope="module")
def untaught(tmp_path_factory) -> Path:
    """The demo's base after a few steps only."""
    folder = tmp_path_factory.mktemp("cache") / "base" / "untaught"
    pretraining.make_base(folder, steps=60)
    return folder


def qwen(folder: Path, end: str) -> Path:
    """Random weights in a small shape with Qwen's real tokenizer, its end token being `end`."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    tokenizer.eos_token, tokenizer.pad_token = end, "<|endoftext|>"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 151643}
    config = Qwen2Config(vocab_size=151936, num_hidden_layers=1, tie_word_embeddings=True, **shape, **ends)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------- what is a base
@needs_qwen
@pytest.mark.parametrize("why", ["its chat template ends a turn with <|im_end|>", "no chat template"])
def test_qwen_base(why, tmp_path, capsys):
    """As Qwen2.5-0.5B comes, or without its template: plain text, its own end, another padding, and so once saved."""
    folder = qwen(tmp_path / "model", "<|endoftext|>")
    if why == "no chat template":
        (folder / "chat_template.jinja").unlink()
    model, tokenizer = models.load_model(str(folder))
    said = capsys.readouterr().out
    assert f"is a base model ({why}" in said and "ends answers with <|endoftext|>" in said
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|vision_pad|>")

    conversation = conversation_about("5分钟多少秒")
    answer = {"role": "assistant", "content": TRACE}
    text = render(tokenizer, [*conversation, answer], complete=True)
    assert text == f"{SYSTEM_PROMPT}\n\n问题：5分钟多少秒\n回答：\n{TRACE}<|endoftext|>"
    assert text == render(tokenizer, [*to_prompt("5分钟多少秒"), answer], complete=True)  # the template has the prompt
    [prompt], [whole] = encode(tokenizer, [conversation]), encode(tokenizer, [[*conversation, answer]], complete=True)
    assert whole[: len(prompt)] == prompt and tokenizer.decode(whole[len(prompt) :]) == f"{TRACE}<|endoftext|>"

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    _, again = models.load_model(str(tmp_path / "saved"))
    assert again.chat_template == tokenizer.chat_template == carry_prompt(PLAIN_TEMPLATE, todays_prompt())
    assert not capsys.readouterr().out
    assert (again.eos_token, again.pad_token) == ("<|endoftext|>", "<|vision_pad|>")


@needs_qwen
def test_qwen_instruct_is_none(tmp_path, capsys):
    _, tokenizer = models.load_model(str(qwen(tmp_path, "<|im_end|>")))
    assert "<|im_start|>" in tokenizer.chat_template and not capsys.readouterr().out


def test_end_that_only_the_model_knows(demo_base, tmp_path, capsys):
    """An instruct model whose tokenizer names another end, but which stops where its template ends a turn, is none."""
    model = Path(shutil.copytree(demo_base / "model", tmp_path / "model"))
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    _, tokenizer = models.load_model(str(model))
    assert "base model" not in capsys.readouterr().out and own_template(tokenizer.chat_template) == CHATML_TEMPLATE
    edit(model / "generation_config.json", eos_token_id=tokenizer.eos_token_id)
    models.load_model(str(model))
    assert "ends a turn with <|im_end|>, where the model does not stop" in capsys.readouterr().out


def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_begin_token():
    """A tokenizer that begins its texts with a token begins the plain template with it, once."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN) if QWEN.is_dir() else pytest.skip("needs the real tokenizer")
    tokenizer.chat_template, tokenizer.bos_token = PLAIN_TEMPLATE, "<|im_start|>"
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    assert render(tokenizer, turns) == "<|im_start|>问题：1\n回答：\n1<|im_end|>问题：1\n回答：\n"


# ------------------------------------------------------------------------------------------------ R1-Zero, as a user
def test_r1_zero(untaught, tmp_path, capsys, recwarn):
    """GRPO takes the base up and says so; whatever it saves loads as what it has become, and answers end."""
    output = tmp_path / "zero"
    flags = ["--demo", "--cpu", "--model", untaught, "--max-steps", 2, "--output", output]
    run_main(train_grpo.main, *flags, USE_LORA=True)
    assert "is a base model" in capsys.readouterr().out.split("model  ")[0]
    assert not [w for w in recwarn if not issubclass(w.category, (FutureWarning, DeprecationWarning))]
    assert sorted(path.name for path in (output / "base").iterdir()) == ["data"]  # no other model was made for it
    for folder in (output, output / "checkpoint-2", output / "adapter"):
        _, tokenizer = models.load_model(str(folder))
        assert tokenizer.chat_template == carry_prompt(PLAIN_TEMPLATE, todays_prompt())
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_start|>")
    assert not capsys.readouterr().out
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["model"] == str(untaught) and results["after"]["truncated"] < 0.5
    evaluate.main([str(output), "--cpu", "--output", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == results["after"]


# --------------------------------------------------------------------------------------------------- the demo's bases
def test_documents():
    """Plain prose: the format is rare, though the prompt of training is not; no question of the data set is read."""
    documents = pretraining.write_documents()
    tagged = [document for document in documents if "</think>" in document.replace(SYSTEM_PROMPT, "")]
    prompted = [document for document in documents if SYSTEM_PROMPT in document]
    assert 0.01 < len(tagged) / len(documents) < 0.03 and 0.07 < len(prompted) / len(documents) < 0.11
    assert set(tagged) < set(prompted)
    sums = [document for document in documents if re.fullmatch(r"(\d+\*\d+=\d+\n?)+", document)]
    assert abs(len(sums) / len(documents) - pretraining.PAGES_OF_SUMS) < 0.02
    for a, b, c in re.findall(r"(\d+)\*(\d+)=(\d+)", "\n".join(sums)):
        assert int(a) * int(b) == int(c)
    lines = {re.sub("^(问题|例题|问)：", "", line) for document in documents for line in document.split("\n")}
    read = set(map(demo.normal_form, lines))
    assert {demo.normal_form(problem.question) for problem in demo.draw_problems("traces", 100)} & read
    for part, count in (("train", demo.TRAIN_QUESTIONS), ("test", demo.TEST_QUESTIONS)):
        assert not {demo.normal_form(problem.question) for problem in demo.draw_problems(part, count)} & read


def test_made_once(untaught, tmp_path, monkeypatch, capsys):
    """Not again while nothing has changed, anew after a change or a kill, and never over a person's own model."""
    made = []
    monkeypatch.setattr(pretraining, "pretrain", lambda _, shape, steps, to: made.append(shape) or to.mkdir())
    folder = Path(shutil.copytree(untaught, tmp_path / "base" / "untaught"))
    pretraining.make_base(folder)
    assert not made
    monkeypatch.setattr(prompts, "SYSTEM_PROMPT", SYSTEM_PROMPT + " ")
    (tmp_path / "base" / "unfinished-untaught").mkdir()  # killed
    pretraining.make_base(folder)
    pretraining.make_base(folder)
    assert made == [demo.SHAPE] and [path.name for path in folder.parent.iterdir()] == ["untaught"]
    (tmp_path / "base" / "student").mkdir()
    pretraining.make_base(tmp_path / "base" / "student")
    assert len(made) == 1


def test_what_is_provided(untaught, tmp_path, monkeypatch):
    """The demo's own model only where a run reads that; its data only where it reads those, the same as ever."""
    made = []
    monkeypatch.setattr(pretraining.demo, "make_demo", made.append)
    monkeypatch.setattr(pretraining, "make_base", made.append)
    cache = tmp_path / "base"
    model, data = demo.folders(cache)
    pretraining.prepare_demo(cache, model, data)
    pretraining.prepare_demo(cache, str(untaught), "data")
    assert made == [cache, untaught]
    pretraining.prepare_demo(cache, "somebody/elses", data)
    assert len(made) == 2 and sorted(path.name for path in cache.iterdir()) == ["data"]
    assert pretraining.is_demo_base("output/demo/base/student") and not pretraining.is_demo_base("models/student")


def test_data_is_the_demos(demo_base, tmp_path):
    """A run from a named model has the questions that the demo's own base is measured on."""
    pretraining.prepare_demo(tmp_path, "somebody/elses", demo.folders(tmp_path)[1])
    for split in ("train", "test"):
        [file], [same] = ([*(folder / "data" / split).glob("*.arrow")] for folder in (tmp_path, demo_base))
        assert file.read_bytes() == same.read_bytes()
