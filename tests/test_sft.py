"""train_sft.py: it learns completions only and whole, says a bad file in a line, and loses nothing by a stop."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FORK, conversation_about, error_line, names_read, run_main, run_script
from datasets import load_from_disk
from safetensors.torch import load_file

import evaluate
import train_grpo
import train_sft
from engine import checkpoints, models, pretraining
from engine.console import UserError
from engine.constants import constants_of
from engine.curves import read_history
from engine.demo import CAREFUL, SFT_RECIPE, draw_problems
from engine.templates import PLAIN_TEMPLATE, carry_prompt, encode, todays_prompt
from engine.trainer import LeanSFTTrainer

SMALL = {"ROWS_PER_STEP": 8, "MICRO_BATCH": 4, "LEARNING_RATE": 1e-3, "SAVE_EVERY": 1, "SAVE_LIMIT": 9}
SMALL |= {"MAX_COMPLETION_TOKENS": 96, "DEV_QUESTIONS": 8, "BF16": False}  # these are train_grpo.py's
RESULT_KEYS = set(
    "model dataset seed steps device before after probe best finished train_seconds trained_tokens_per_second "
    "step_seconds peak_memory_gb".split()
)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def trace(question: str, completion: str, answer: object = None) -> dict:
    """A line as make_traces.py writes it."""
    message = {"role": "assistant", "content": completion}
    return {"prompt": conversation_about(question), "completion": [message], "answer": answer, "right": 1, "samples": 8}


def chat(*texts: str) -> dict:
    """A conversation whose turns alternate."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.fixture(scope="module")
def careful() -> list[dict]:
    """Careful, right and tidy traces."""
    return [
        trace(problem.question, problem.trace, problem.answer)
        for problem in draw_problems("traces", 1200)
        if problem.trace.startswith(f"<think>\n{CAREFUL}")
        and problem.trace.endswith(f"\n</think>\n<answer>\n{problem.answer}\n</answer>")
    ]


@pytest.fixture(scope="module")
def train(demo_base, careful, tmp_path_factory):
    """Runs main() in this process on 20 traces and returns its trainer: train(output, "--resume", USE_LORA=True)."""
    folder = tmp_path_factory.mktemp("data")
    data = load_from_disk(demo_base / "data")
    data["test"] = data["test"].select(range(8))
    data.save_to_disk(folder / "data")
    traces = write(folder / "traces.jsonl", careful[:20])
    common = ["--model", demo_base / "model", "--dataset", folder / "data", "--cpu", "--max-steps", "5"]

    def run(output: Path, *flags: object, traces: Path = traces, **constants: object) -> LeanSFTTrainer:
        flags = [*common, "--traces", traces, "--output", output, *flags]
        return run_main(train_sft.main, *flags, **SMALL | constants)

    return run


@pytest.fixture(scope="module")
def whole_run(train, tmp_path_factory):
    """The folder of a run of five steps that nothing interrupted, and its trainer. An epoch has three."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return SimpleNamespace(output=output, trainer=train(output))


# ---------------------------------------------------------------------------------------------------------- learning
def test_it_learns_as_a_user(demo_output, demo_base, careful, run_chat):
    """Two epochs on careful traces: the loss halves, unseen questions come out right, and all files are there."""
    write(demo_output / "traces.jsonl", careful)  # where make_traces.py --demo writes them
    done = run_script("train_sft.py", "--demo", "--cpu", "--output", demo_output)
    assert "Warning" not in done.stderr
    header = done.stdout.split("step  1/")[0]
    for words in (f"{len(careful)} traces of", "0 conversations", "CPU, float32", "16 rows", "240 test questions"):
        assert words in header
    assert done.stdout.count("  loss ") == 2 * -(-len(careful) // train_sft.ROWS_PER_STEP)
    losses = [row["training/loss"] for row in read_history(demo_output) if row["step"]]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2

    results = json.loads((demo_output / "results.json").read_text(encoding="utf-8"))
    assert set(results) == RESULT_KEYS and results["finished"] and results["steps"] == len(losses)
    assert results["before"]["n"] == results["after"]["n"] == 240
    assert results["before"]["strict_ci95"][1] < results["after"]["strict_ci95"][0]  # far beyond chance
    assert results["after"]["format"] > 0.9
    for name in ("model.safetensors", "tokenizer.json", "runs", "curves.png", "README.md", f"checkpoint-{len(losses)}"):
        assert (demo_output / name).exists(), name
    assert "after SFT" in (demo_output / "README.md").read_text(encoding="utf-8")
    recipe = json.loads((demo_output / "recipe" / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["LEARNING_RATE"] == SFT_RECIPE["LEARNING_RATE"] and recipe["EPOCHS"] == train_sft.EPOCHS
    assert recipe["TRACES"] == str(demo_output / "traces.jsonl") and "BETA" not in recipe
    before, after = load_file(demo_base / "model" / "model.safetensors"), load_file(demo_output / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(not torch.equal(before[name], after[name]) for name in before)

    evaluate.main([str(demo_output), "--cpu", "--output", str(demo_output / "again")])
    assert json.loads((demo_output / "again" / "eval.json").read_text()) == results["after"]
    assert run_chat(demo_output, stdin="5分钟多少秒\n").strip() == results["probe"]["after"].strip()


def test_only_completions_are_learned(whole_run, careful):
    """Every prompt token is masked; the completion is learned whole, with the token that ends it."""
    tokenizer = whole_run.trainer.processing_class
    assert len(whole_run.trainer.train_dataset) == 20
    for row, line in zip(whole_run.trainer.train_dataset, careful, strict=False):
        prompt = encode(tokenizer, [line["prompt"]])[0]
        assert row["labels"][: len(prompt)] == [-100] * len(prompt) and row["input_ids"][: len(prompt)] == prompt
        learned = row["labels"][len(prompt) :]
        assert learned == row["input_ids"][len(prompt) :] and tokenizer.eos_token_id in learned
        assert tokenizer.decode(learned) == line["completion"][0]["content"] + "<|im_end|>\n"
    batch = next(iter(whole_run.trainer.get_train_dataloader()))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_base_learns_its_own_end(train, careful, tmp_path):
    """From a base model without a template: every completion ends in the end token, and nothing after it."""
    pretraining.make_base(tmp_path / "base" / "untaught", steps=2)
    trainer = train(tmp_path / "run", "--model", tmp_path / "base" / "untaught")
    tokenizer = trainer.processing_class
    learned = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset]
    assert learned == [line["completion"][0]["content"] + "<|endoftext|>" for line in careful[:20]]
    assert models.load_model(str(tmp_path / "run"))[1].chat_template == carry_prompt(PLAIN_TEMPLATE, todays_prompt())


def test_schedule(whole_run):
    """From the peak down to a tenth of it, and not to zero."""
    rates = [row["training/learning_rate"] for row in read_history(whole_run.output) if row["step"]]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1e-3)
    assert whole_run.trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-4)


def test_lora(train, demo_base, tmp_path):
    """The adapter lies beside a merged model, and only what it adapts has moved."""
    train(tmp_path / "run", USE_LORA=True, LORA_LEARNING_RATE=1e-2)
    before, merged = (load_file(folder / "model.safetensors") for folder in (demo_base / "model", tmp_path / "run"))
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], merged[name])}
    assert moved == set(train_grpo.LORA_MODULES)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == train_grpo.LORA_RANK


# ---------------------------------------------------------------------------------------------------------- stopping
def test_interrupted_run_ends_bit_identical(train, whole_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C in step 1 and again in step 4, of the second epoch: the same weights to the last bit, one history."""
    output = tmp_path / "run"

    def press(self, args, state, control, **kwargs):
        if state.global_step in (0, 3) and not (output / f"checkpoint-{state.global_step + 1}").exists():
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.StopSignals, "on_step_begin", press, raising=False)
        patch.setattr("sys.argv", ["train_sft.py", "--output", "my run"])
        for step, flags in ((1, []), (4, ["--resume"])):
            with pytest.raises(SystemExit) as left:
                train(output, *flags)
            assert left.value.code == 130
            assert f"continue checkpoint-{step} with\n    python train_sft.py --output" in capsys.readouterr().out
    train(output, "--resume")
    for file in ("model.safetensors", "checkpoint-5/optimizer.pt", "checkpoint-5/scheduler.pt"):
        assert (output / file).read_bytes() == (whole_run.output / file).read_bytes(), file
    whole, resumed = read_history(whole_run.output), read_history(output)
    assert [row["step"] for row in resumed] == list(range(6))
    for tag in ("training/loss", "training/token_accuracy", "heldout/strict"):
        assert [row.get(tag) for row in resumed] == [row.get(tag) for row in whole]
    assert json.loads((output / "results.json").read_text())["finished"]


def test_kill_9(train, whole_run, tmp_path):
    """kill -9 after its first save and after a later one: it goes on from a whole checkpoint to the same end."""
    output = tmp_path / "run"
    for kill in range(2):  # of five steps
        begun = len(list(output.glob("checkpoint-*")))
        killed = FORK.Process(target=train, args=(output, *["--resume"] * (begun > 0)))
        killed.start()
        while not (output / f"checkpoint-{begun + 1}").exists() and killed.is_alive():
            time.sleep(0.005)
        time.sleep(0.03 * kill)
        killed.kill()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL and not (output / "model.safetensors").exists()  # on the way
    train(output, "--resume")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (whole_run.output / "model.safetensors").read_bytes()


def test_what_does_not_belong_together(train, whole_run, demo_base, careful, tmp_path):
    """Other traces, or train_grpo.py, do not go on with what these traces began; and no run is overwritten."""
    with pytest.raises(UserError, match="already holds a run"):
        train(whole_run.output)
    with pytest.raises(UserError, match="TRACES was .*--output"):
        train(whole_run.output, "--resume", traces=write(tmp_path / "other.jsonl", careful[:8]))
    flags = ["--cpu", "--resume", "--output", str(whole_run.output), "--model", str(demo_base / "model")]
    with pytest.raises(UserError, match="TRACES was .* and is None"):
        train_grpo.main([*flags, "--dataset", str(demo_base / "data")])


def test_other_rows_under_the_same_name(train, careful, tmp_path, capsys):
    """What has changed in the traces or the mix is named when a run is resumed, and recorded; a field that is not
    learned may change."""
    traces, mix, output = tmp_path / "traces.jsonl", tmp_path / "mix.jsonl", tmp_path / "run"

    def start(lines: list[dict], conversations: list[dict], *flags: object) -> list[str]:
        train(output, "--mix", write(mix, conversations), *flags, traces=write(traces, lines))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: from checkpoint")]

    start(careful[:16], [chat("你好", "你好")], "--max-steps", 1)
    assert not [line for line in start([line | {"right": 2} for line in careful[:16]], [chat("你好", "你好")],
                                       "--resume", "--max-steps", 2) if "MAX_STEPS" not in line]  # fmt: skip
    notes = start(careful[:15], [chat("你好", "再见")], "--resume", "--max-steps", 3)
    assert [line.split(" is ")[0] for line in notes] == [
        f"note: from checkpoint-2 on {name}" for name in ("MAX_STEPS", "MIX_READ", "TRACES_READ")
    ]
    assert "'15 rows, sha256 " in notes[2] and "no longer '16 rows, sha256 " in notes[2]
    recipes = [json.loads((output / "recipe" / f"{name}.json").read_text()) for name in ("recipe-until-2", "recipe")]
    assert [recipe["TRACES_READ"][:7] for recipe in recipes] == ["16 rows", "15 rows"]


# ------------------------------------------------------------------------------------------------------------ the rows
def test_what_is_dropped_and_mixed_in(train, careful, demo_base, tmp_path, capsys):
    """Too long and test questions are dropped aloud, not cut; the mix is a share of the rows, of its last answers."""
    question = load_from_disk(demo_base / "data")["test"]["question_zh-cn"][0]
    bad = [trace("5分钟多少秒", "想" * 300, 300), trace("想" * 3000, "300", 300), trace(question, "300", 1)]
    traces = write(tmp_path / "traces.jsonl", bad + careful[:9])
    mix = [chat("你好", f"你好，{i}", "再见", f"再见，{i}", "好") for i in range(6)]
    other = {"role": "system", "content": "说一句话"}  # a prompt is used as it stands
    mix[0]["messages"].insert(0, other)
    trainer = train(
        tmp_path / "run", "--mix", write(tmp_path / "mix.jsonl", mix + [chat("问", "答" * 300)]), traces=traces,
        MIX_SHARE=0.4,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "--traces: 3 of 12 rows dropped: 2 longer than MAX_TOKENS 1024 or MAX_COMPLETION_TOKENS 96, 1 on te" in said
    assert "--mix: 1 of 7 rows dropped: 1 longer" in said and "6 conversations mixed in" in said
    tokenizer = trainer.processing_class
    learned = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset]
    assert learned[:9] == [line["completion"][0]["content"] + "<|im_end|>\n" for line in careful[:9]]
    assert sorted(learned[9:]) == [f"再见，{i}<|im_end|>\n" for i in range(6)]
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert [text.startswith("<|im_start|>system\n说一句话<|im_end|>") for text in texts].count(True) == 1
    plain = [text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>") for text in texts]
    assert plain.count(True) == 5 and plain[:9] == [False] * 9  # ours would demand a number of a conversation


def test_share(capsys):
    """Of 80 traces and a share of 0.2 come 20 conversations, the same for a seed; too few are all taken, aloud."""
    mix = [{"number": i} for i in range(100)]
    drawn = train_sft.draw_mix(mix, 80, 0.2, seed=1)
    assert len(drawn) == 20 and drawn == train_sft.draw_mix(mix, 80, 0.2, seed=1) != train_sft.draw_mix(mix, 80, 0.2, 2)
    assert train_sft.draw_mix(mix, 80, 0.0, seed=1) == [] and not capsys.readouterr().out
    assert len(train_sft.draw_mix(mix[:5], 80, 0.2, seed=1)) == 5 and "asks for 20" in capsys.readouterr().out


GOOD = json.dumps(trace("5分钟多少秒", "300", 300))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: .*No such file"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("nonsense", "line 1: Expecting value"),
        (f"{GOOD}\n{GOOD[:50]}", "line 2: "),
        ("5", "line 1: no list of messages under 'prompt'"),
        ("[" * 100_000, "line 1: "),
        (b"\xff\xfe", "is not UTF-8: "),
        (json.dumps(chat("a", "b")), "line 1: no list of messages under 'prompt'"),
        ('{"prompt": "a", "completion": "b"}', "line 1: no list of messages under 'prompt'"),
        (GOOD.replace('"assistant"', '"user"'), "line 1: not a prompt that ends with the user"),
        (GOOD.replace('"user"', '"tool"'), "line 1: a message under 'prompt' without"),
        (f"{GOOD}\n" + json.dumps(trace("a", "b", "300 秒")), "line 2: answer is '300 秒', not an integer"),
        (json.dumps(trace("a", "b", 1.5)), "line 1: answer is 1.5"),
        (json.dumps(trace("a", "b", True)), "line 1: answer is True"),
        (json.dumps(trace("a", "长" * 300, 1)), "none of 1 rows can be learned: 1 longer than MAX_TOKENS"),
    ],
)
def test_bad_traces(content, words, train, tmp_path):
    """What the user can mend is one line with file and line number, and nothing is written."""
    traces = tmp_path / "traces.jsonl"
    if content is not None:
        traces.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"--traces.*{words}"):
        train(tmp_path / "run", traces=traces)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line", [GOOD, json.dumps(chat("a")), json.dumps({"messages": chat("a", "b")["messages"][1:]})]
)
def test_bad_mix(line, train, tmp_path):
    """A conversation without an answer to learn is named by its line."""
    (tmp_path / "mix.jsonl").write_text(json.dumps(chat("a", "b")) + f"\n{line}\n")
    with pytest.raises(UserError, match="--mix .*line 2: no "):
        train(tmp_path / "run", "--mix", tmp_path / "mix.jsonl")


def test_one_line_as_a_user(tmp_path):
    """Exit code 2 and one line: without --traces, with a file that is not there."""
    with pytest.raises(UserError, match="--traces FILE is missing"):
        train_sft.main(["--cpu"])
    line = error_line(run_script("train_sft.py", "--demo", "--output", tmp_path / "run", expect=2))
    assert str(tmp_path / "run" / "traces.jsonl") in line and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- the constants
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MIX_SHARE", 1.0, "from 0, below 1; mend it in train_sft.py"),
        ("FINAL_RATE", -0.1, "from 0 to 1"),
        ("EPOCHS", 0, "above 0"),
        ("LEARNING_RATE", "1e-5", "a number; mend it in train_sft.py"),
        ("MICRO_BATCH", 3, "ROWS_PER_STEP 8 = 8 rows a step cannot be split into MICRO_BATCH 3"),
        ("SEED", -1, "from 0 to .*mend it in train_grpo.py"),
    ],
)
def test_constants_are_checked(name, value, words, train, tmp_path):
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_every_constant_has_one_home():
    """What is shared is not repeated, the demo changes only what exists, and every constant is read somewhere."""
    own, shared = constants_of(train_sft), set(train_sft.SHARED)
    assert shared <= set(train_grpo.default_recipe()) and not shared & set(own)
    assert set(SFT_RECIPE) <= shared | set(own) and "TRACES" in checkpoints.INCOMPATIBLE
    assert shared | set(own) <= names_read()


def test_flags_override_constants():
    """Each flag sets its one constant; the demo's recipe is below the arguments of main, these below the flags."""
    flags = "--model m --dataset d --output o --max-steps 7 --seed 8 --traces t --mix x".split()
    _, recipe = train_sft.configure(flags, {"SEED": 9, "EPOCHS": 3.0})
    assert recipe.EPOCHS == 3.0 and train_sft.EPOCHS == 2.0
    values = [recipe.MODEL, recipe.DATASET, recipe.OUTPUT_DIR, recipe.MAX_STEPS, recipe.SEED, recipe.TRACES, recipe.MIX]
    assert values == ["m", "d", "o", 7, 8, "t", "x"]
    _, demo = train_sft.configure(["--demo"], {})
    assert (demo.OUTPUT_DIR, demo.TRACES, demo.BF16) == ("output/demo", "output/demo/traces.jsonl", False)
    assert demo.MODEL == "output/demo/base/model" and demo.MAX_STEPS == -1 and demo.EPOCHS == train_sft.EPOCHS
    assert train_sft.configure(["--demo"], {"LEARNING_RATE": 0.5})[1].LEARNING_RATE == 0.5
    assert train_sft.configure(["--traces", "t"], {})[1].OUTPUT_DIR == train_sft.OUTPUT_DIR
