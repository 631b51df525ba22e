"""make_traces.py: any form of answer is read, right and readable ones are kept, and no kill loses what was drawn."""

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FORK, conversation_about, error_line, run_main, run_script
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2ForCausalLM

import make_traces
from engine import console, models
from engine.console import UserError
from engine.constants import constants_of
from engine.questions import load_questions, pairs_of, to_prompt
from engine.rollout import Sampler
from engine.templates import CHATML_TEMPLATE, carry_prompt, encode, prompt_turns
from engine.traces import append_lines, fault_of, judge, read_log, rewrite, to_trace, write_learnable
from prompts import ANSWER_COLUMN, QUESTION_COLUMN, WORKED_EXAMPLE
from rewards import REWARD_MAXIMA, REWARDS

QUESTION = "Jasper在四月份卖了48个夹子，五月份卖了一半。一共卖了多少个？"
STEPS = "五月份卖出的夹子数量是：\n\\[ \\frac{48}{2} = 24 \\]\n\n两个月相加：\n\\[ 48 + 24 = 72 \\]"
END = "因此，一共卖了 72 个夹子。"
RECIPE = SimpleNamespace(**constants_of(make_traces), DEV_QUESTIONS=2)


@pytest.mark.parametrize(
    ("text", "thinking", "number"),
    [
        # the forms in which a 0.5B model ends under the free prompt
        (f"{STEPS}\n\n因此，一共卖了 \\(\\boxed{{72}}\\) 个夹子。", f"{STEPS}\n\n{END}", 72),
        (f"{STEPS}\n\n因此，一共卖了 $\\boxed{{72}}$ 个夹子。\n\n希望有帮助！", f"{STEPS}\n\n{END}", 72),
        (f"{STEPS}\n\n{END}答案是 \\boxed{{72}}。", f"{STEPS}\n\n{END}", 72),
        (f"{STEPS}\n\n{END}因此，答案是：\n\n\\[\n\\boxed{{72}}\n\\]", f"{STEPS}\n\n{END}", 72),
        (f"{STEPS}\n\n### 最终答案\n\\[\\boxed{{\\text{{72 个}}}}\\]", f"{STEPS}\n\n### 最终答案\n72 个", 72),
        ("相加：\n\\[ 48 + 24 = \\boxed{72} \\]", "相加：\n\\[ 48 + 24 = 72 \\]", 72),
        ("相加：\n\\[\n\\boxed{72} \\text{ 个}\n\\]\n\n完毕", "相加：\n\\[\n72 \\text{ 个}\n\\]", 72),
        # the last of two boxes; a last number; a sum in the box is no number, and nothing else is guessed
        ("两个月相加：\n\\[\n48 + 24 = \\boxed{72}\n\\]", "两个月相加：\n\\[\n48 + 24 = 72\n\\]", 72),
        ("四月 \\boxed{48} 个，一共 \\boxed{72} 个。", "四月 48 个，一共 72 个。", 72),
        (f"{STEPS}\n\n{END}", f"{STEPS}\n\n{END}", 72),
        (f"{STEPS}\n\n\\boxed{{48+24}} 个。", f"{STEPS}\n\n48+24 个。", None),
        (f"{STEPS}\n\n\\boxed{{\\frac{{1}}{{2}}}}", f"{STEPS}\n\n\\frac{{1}}{{2}}", None),
        # an R1-style teacher, whose <think> stood in the prompt: what it says behind </think> only names the answer
        (f"\n嗯，{STEPS}\n</think>\n\n**解：** 共 48+24 个。\n\\[\n\\boxed{{72}}\n\\]", f"嗯，{STEPS}", 72),
        (f"<think>\n{STEPS}\n</think>\n\n一共 72 个。", STEPS, 72),
        (f"{STEPS}\n\n**答案**\n\\boxed{{72}}\n</think>\n没有数字", STEPS, None),
        # our own format, tidy or not; the answer block speaks, whatever is boxed before it
        (f"<think>\n{STEPS}\n</think>\n<answer>\n72\n</answer>", STEPS, 72),
        (f"<think>\n\\boxed{{5}}：{STEPS}\n</think><answer>72 个</answer> 完毕", f"5：{STEPS}", 72),
        (f"{STEPS}\n<answer>\\boxed{{72}}</answer>", STEPS, 72),
        ("<think>\n猜\n</think>\n<answer>12 - 5 = 7</answer>", "猜", None),
        ("\\boxed{72}", "", 72),
        ("", "", None),
        ("没有数字", "没有数字", None),
    ],
)
def test_rewrite(text, thinking, number):
    """The thinking reads on to its end without a box, and the number is the one that the text answers."""
    assert rewrite(text) == (thinking, number)


@pytest.mark.parametrize(
    ("thinking", "fault"),
    [
        (f"{STEPS}\n\n{END}", None),
        (f"Jasper在四月份卖了48个，{STEPS}", None),  # a name out of the question is no foreign word
        ("五月份卖了一半，就是二十四个，加起来得到72个。检查：72减24得到48，对。", None),  # named twice, no =
        ("48 + 24 = 72", "too short"),
        (f"{STEPS}\n```python\nprint(48 + 24)\n```", "code block"),
        (f"{'我们再想一想，' * 60}\n{STEPS}", "long paragraph"),
        (f"{STEPS}\nSo the total number of clips is 72.", "mixed languages"),
        (f"{STEPS}\nВсего 72", "mixed languages"),
        ("48 + 24 = 72, 24 + 48 = 72, 72 = 72", "mixed languages"),  # not a Chinese word
        ("Jasper在四月份卖了48个夹子，五月份卖了一半，所以一共卖了72个。", "not computed"),  # a guess
        (f"{'我们再想一想，' * 20}{STEPS}<answer>", "stray tags"),
    ],
)
def test_fault(thinking, fault):
    """A bad trace of a right answer falls for what is wrong with it."""
    assert fault_of(thinking, QUESTION, 72, RECIPE) == fault


def test_a_number_of_the_question_is_no_result():
    """A label that the question names itself counts only where the thinking comes to it, not where it is repeated."""
    question = "书包95元，铲雪一次7元，又花了5元，要铲几次？"
    repeated = "我们知道书包要95元，他又花了5元，所以一共要铲5次雪，答案就在这里。"
    assert fault_of(repeated, question, 5, RECIPE) == "not computed"
    computed = "我们知道铲雪一次是7元，一共要赚35元，那么需要铲雪的次数是 35 / 7 = 5 次。"
    assert fault_of(computed, question, 5, RECIPE) is None


def test_judge():
    """Every sample has its verdict, traces stand in the order drawn, and each earns every reward."""
    forms = [f"{STEPS}\n验算：{n} + 24 - {n} = 24。\n{END}" for n in range(make_traces.KEEP + 1)]
    texts = [
        f"{STEPS}\n约 \\boxed{{71}} 个",
        forms[0],
        forms[0],
        "不知道",
        forms[1].replace("验算", "检验"),
        *forms[1:],
    ]
    samples = [{"text": text, "ended": True} for text in texts] + [{"text": forms[0], "ended": False}]
    row = judge(QUESTION, 72, samples, RECIPE)
    faults = ["wrong", None, "same numbers", "no number", None, "same numbers", None, None, "enough kept", "cut off"]
    assert [each["fault"] for each in row["samples"]] == faults
    assert row["right"] == 7 and len(row["kept"]) == make_traces.KEEP
    assert "检验" in row["kept"][1] and [trace.split("：")[-1][0] for trace in row["kept"]] == list("0123")
    completions = [[{"role": "assistant", "content": trace}] for trace in row["kept"]]
    rows = {"prompts": [to_prompt(QUESTION)] * len(completions), "answer": [72] * len(completions)}
    for reward, most in zip(REWARDS, REWARD_MAXIMA, strict=True):
        assert min(reward(completions=completions, **rows)) == most
    assert judge(QUESTION, 72, row["samples"], RECIPE) == row  # its own line can be judged again


@pytest.mark.parametrize(
    "junk",
    ["\\boxed{", "\\boxed{{1}", "\\[ \\boxed{1", "$ ", "\\[", " ", "\n5", "答案", "答案是：\n", "}{", "</think>"]
    + ["<answer>", "=1", "\\text{", "a", "１"],
)
def test_junk(junk):
    """No text raises, and four times the text takes about four times as long, not sixteen times."""
    seconds = []
    for size in (50_000, 200_000):
        text = junk * (size // len(junk))
        start = time.process_time()
        for samples in ([{"text": text, "ended": True}], [{"text": f"{text}72\\boxed{{72}}", "ended": True}]):
            judge(text, 72, samples, RECIPE)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 9 * seconds[0] + 0.05


# ------------------------------------------------------------------------------------------------------- the script
@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The demo's data and a model that is right now and then."""
    from engine.demo import make_demo

    folder = tmp_path_factory.mktemp("taught")
    make_demo(folder / "base", steps=100)
    return folder


def test_script(taught, capsys):
    """It samples, says what it kept, and resumes after a kill to the same bytes; another seed is refused."""
    command = ["--demo", "--cpu", "--questions", ":24", "--output", taught]
    done = run_script("make_traces.py", *command)
    log, traces = taught / "questions.jsonl", taught / "traces.jsonl"
    assert all(word in done.stdout for word in ("question   24/24", "left 0:00:00", "of the samples", "kept", "wrong"))
    whole = log.read_bytes(), traces.read_bytes()
    rows, lines = ([json.loads(line) for line in text.decode().splitlines()] for text in whole)
    assert [len(row["samples"]) for row in rows] == [make_traces.SAMPLES] * 24
    assert [line["completion"][0]["content"] for line in lines] == [trace for row in rows for trace in row["kept"]]
    assert {line["prompt"][-1]["content"]: line["answer"] for line in lines}.items() <= {
        row["question"]: row["label"] for row in rows
    }.items()
    assert all(1 <= line["right"] <= line["samples"] for line in lines)

    log.write_bytes(b"\n".join(whole[0].split(b"\n")[:20]) + b'\n{"question": "\xe5')  # killed within a line
    traces.unlink()
    capsys.readouterr()
    run_main(make_traces.main, *command)
    assert "question   24/24" in capsys.readouterr().out
    assert (log.read_bytes(), traces.read_bytes()) == whole
    with pytest.raises(UserError, match="seed 42.* 7.*--output"):
        run_main(make_traces.main, *command, "--seed", 7)


def test_kill_9(taught, tmp_path):
    """Killed at any moment, it loses the batch in work and nothing else: the same command ends with the same bytes."""
    flags = ["--demo", "--cpu", "--questions", ":30", "--seed", 3, "--output"]
    constants = {"QUESTIONS_AT_ONCE": 3}
    endings = []
    for name, kills in (("whole", 0), ("killed", 3)):
        folder = tmp_path / name
        shutil.copytree(taught / "base", folder / "base")
        log = folder / "questions.jsonl"
        for kill in range(kills):
            begun = log.stat().st_size if log.exists() else 0
            killed = FORK.Process(target=run_main, args=(make_traces.main, *flags, folder), kwargs=constants)
            killed.start()
            while not (log.exists() and log.stat().st_size > begun) and killed.is_alive():
                time.sleep(0.005)
            time.sleep(0.05 * kill)
            killed.kill()
            killed.join()
            assert killed.exitcode == -signal.SIGKILL and not (folder / "traces.jsonl").exists()  # on the way
        run_main(make_traces.main, *flags, folder, **constants)
        endings.append([(folder / file).read_bytes() for file in ("questions.jsonl", "traces.jsonl")])
    assert endings[0] == endings[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk(capsys):
    """One line that says what to do; what a torn write leaves is dropped at the next start, as after a kill."""
    with pytest.raises(SystemExit, match="2"):
        console.run(lambda: append_lines(Path("/dev/full"), [{"question": "5分钟多少秒"}]))
    assert "No space left on device; free some and run it again" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a saved model", "an adapter"])
def test_loaded_in_bf16_as_if_cast(kind, taught, tmp_path, monkeypatch):
    """Read in bf16 at once, the sampler has the very weights and draws of a float32 model that was then cast."""
    folder = str(taught / "base" / "model")
    if kind == "an adapter":
        torch.manual_seed(0)
        base = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base, adapter).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        folder = str(tmp_path)
    monkeypatch.setattr(models, "pick_device", lambda cpu, bf16: (torch.device("cpu"), torch.bfloat16))
    flags, recipe = make_traces.configure(["--cpu", "--model", folder, "--dataset", str(taught / "base/data")], {})
    sampler, tokenizer = make_traces.load_sampler(recipe, flags)
    model, _ = models.load_model(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    loaded = sampler.model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    for (name, cast), (_, buffer) in zip(model.named_buffers(), sampler.model.named_buffers(), strict=True):
        assert buffer.dtype == torch.float32 and torch.equal(buffer, cast), name
    prompts = encode(tokenizer, [to_prompt("5分钟多少秒"), to_prompt("3小时是多少分钟？")] * 4)
    draws = []
    for each in (sampler, Sampler(model.eval(), tokenizer)):
        torch.manual_seed(0)
        draws.append(each.generate(prompts, 48, temperature=1.0))
    assert draws[0] == draws[1] and len(set(map(tuple, draws[0]))) > 2


def test_nothing_kept(demo_output):
    """A model that is never right ends in one line with the pass rate and the reasons; no trace file is left."""
    done = run_script("make_traces.py", "--demo", "--cpu", "--questions", ":4", "--output", demo_output, expect=2)
    line = error_line(done)
    assert "none of 32 samples" in line and "0.0% right" in line and "wrong" in line and "--example" in line
    assert not (demo_output / "traces.jsonl").exists() and (demo_output / "questions.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--questions", ":0"], "--questions ':0'.*FROM:TO"),
        (["--questions", "5"], "--questions '5'.*FROM:TO"),
        (["--questions", "8:8"], "--questions '8:8'.*FROM:TO"),
        (["--questions", "99999:", "--output", "{output}"], "--questions 99999:.*has only"),
        (["--free", "--demo"], "leave out --free"),
        (["--model", "./nowhere", "--output", "{output}"], "'./nowhere'"),
        (["--output", __file__], "is a file"),
    ],
)
def test_refused(flags, words, tmp_path, demo_base):
    """What the user can mend is one line."""
    flags = [flag.format(output=tmp_path) for flag in flags]
    with pytest.raises(UserError, match=words):
        make_traces.main([*flags, "--dataset", str(demo_base / "data"), "--cpu"])


class Letters:
    """A tokenizer of one token per character, 0 at the end."""

    def apply_chat_template(self, conversations, **_):
        return {"input_ids": [[ord(c) for m in messages for c in m["content"]] for messages in conversations]}

    def batch_decode(self, rows, **_):
        return ["".join(map(chr, filter(None, row))) for row in rows]


class Boxer:
    """A sampler that answers what it was asked in a box, a different way each time, if it was asked for one."""

    eos = [0]

    def __init__(self):
        self.drawn = 0

    def generate(self, prompt_ids, max_new_tokens, temperature):
        assert temperature == make_traces.TEMPERATURE and all("\\boxed{}" in "".join(map(chr, i)) for i in prompt_ids)
        self.drawn += len(prompt_ids)
        return [[*map(ord, f"{STEPS}\n想了 {i} 遍，一共 \\boxed{{72}} 个"), 0] for i in range(len(prompt_ids))]


def write_data(folder: Path, *numbers: int) -> str:
    """A data set whose training questions end in these numbers, with a development and a test question of its own."""
    folder.mkdir(exist_ok=True)
    for split, ends in (("train", numbers), ("validation", [100]), ("test", [200])):
        rows = [{QUESTION_COLUMN: f"{QUESTION}{i}", ANSWER_COLUMN: 72} for i in ends]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_free(tmp_path, monkeypatch, capsys):
    """Sampled under the free prompt, written with the question alone; stricter filters need no model."""
    data, boxer, output = write_data(tmp_path / "data", 0, 1, 2), Boxer(), tmp_path / "out"
    monkeypatch.setattr(make_traces, "load_sampler", lambda *_: (boxer, Letters()))
    arguments = ["--free", "--dataset", data, "--output", str(output), "--cpu"]
    with pytest.raises(UserError, match="swulling"):  # no network: the same folder is free for other data
        make_traces.main(["--free", "--output", str(output), "--cpu"])
    make_traces.main(arguments, QUESTIONS_AT_ONCE=2)
    lines = [json.loads(line) for line in (output / "traces.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "learnable  none: no question right" in capsys.readouterr().out  # all of them are always right
    assert [line["prompt"] for line in lines[:: make_traces.KEEP]] == [to_prompt(f"{QUESTION}{i}") for i in "012"]
    assert "boxed" not in str(lines) and boxer.drawn == 3 * make_traces.SAMPLES
    with pytest.raises(UserError, match="free True"):  # not with those drawn under another prompt
        make_traces.main(arguments[1:])

    make_traces.main(arguments, KEEP=1)
    assert len((output / "traces.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    with pytest.raises(UserError, match="100.0% right; dropped: 24 too short"):
        make_traces.main(arguments, KEEP=1, MIN_THINKING=1000)
    assert not (output / "traces.jsonl").exists() and boxer.drawn == 3 * make_traces.SAMPLES
    write_data(tmp_path / "data", 2, 1, 0)
    with pytest.raises(UserError, match="other questions"):
        make_traces.main(arguments)


def test_questions_from_to(tmp_path, monkeypatch):
    """Only the questions of --questions are asked; a later end goes on, and an earlier one drops nothing."""
    boxer, data = Boxer(), write_data(tmp_path / "data", *range(5))
    monkeypatch.setattr(make_traces, "load_sampler", lambda *_: (boxer, Letters()))
    flags = ["--free", "--dataset", data, "--output", str(tmp_path / "out"), "--cpu"]
    for limit, asked in ((2, "23"), (3, "234")):
        make_traces.main([*flags, "--questions", f"2:{2 + limit}"], QUESTIONS_AT_ONCE=2)
        lines = (tmp_path / "out/questions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["question"] for line in lines] == [f"{QUESTION}{i}" for i in asked]
    assert boxer.drawn == 3 * make_traces.SAMPLES
    with pytest.raises(UserError, match="holds 3 questions, more than the 2 asked now.*end 1 later"):
        make_traces.main([*flags, "--questions", "2:4"])
    with pytest.raises(UserError, match="skip 2, and now it is None"):
        make_traces.main([*flags, "--questions", ":3"])


@pytest.mark.parametrize("flag", [[], ["--example"]])
def test_a_trained_model_is_asked_as_it_was_trained(flag, demo_base, tmp_path, capsys):
    """Under its own system prompt, whatever prompts.py says by now, and behind its own example or WORKED_EXAMPLE."""
    model = Path(shutil.copytree(demo_base / "model", tmp_path / "model"))
    own = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    template = carry_prompt(CHATML_TEMPLATE, prompt_turns("按格式", own))
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    (model / "recipe").mkdir()
    (model / "recipe/recipe.json").write_text('{"MAX_COMPLETION_TOKENS": 320}')
    data = write_data(tmp_path / "data", 0)
    flags, recipe = make_traces.configure(["--cpu", "--model", str(model), "--dataset", data, *flag], {})
    _, tokenizer = make_traces.load_sampler(recipe, flags)
    asked = conversation_about(QUESTION, "按格式", WORKED_EXAMPLE if flag else own)
    assert encode(tokenizer, [make_traces.ask(QUESTION, recipe, flags)]) == encode(tokenizer, [asked])
    assert "asked under the prompt of its training; prompts.py has another one" in capsys.readouterr().out
    assert recipe.MAX_COMPLETION_TOKENS == 320


def test_the_example_is_another_way_of_asking(tmp_path, monkeypatch):
    """Samples behind WORKED_EXAMPLE are not mixed with others; a trace holds the question alone in any case."""

    class Taught(Boxer):
        def generate(self, prompt_ids, max_new_tokens, temperature):
            return [[*map(ord, to_trace(STEPS, 72)), 0] for _ in prompt_ids]

    monkeypatch.setattr(make_traces, "load_sampler", lambda *_: (Taught(), Letters()))
    flags = ["--cpu", "--dataset", write_data(tmp_path / "data", 0), "--output", str(tmp_path / "out")]
    make_traces.main([*flags, "--example"])
    (line,) = map(json.loads, (tmp_path / "out/traces.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["prompt"] == to_prompt(f"{QUESTION}0")
    with pytest.raises(UserError, match="name another --output"):
        make_traces.main(flags)


def test_learnable(tmp_path):
    """Questions that are right now and then become a data set for train_grpo.py; the test split stays as it is."""
    folder = tmp_path / "learnable"
    pairs = [(f"{QUESTION}{i}", i) for i in range(16)]
    rows = [{"question": question, "label": label, "right": label} for question, label in pairs[:10]]
    said = write_learnable(folder, rows, pairs[10:12], pairs[12:], RECIPE)
    assert said == f"{folder}: 6 questions right 2 to 7 times of 8"
    for split, labels in (("train", range(2, 8)), ("validation", range(10, 12)), ("test", range(12, 16))):
        assert pairs_of(load_questions(str(folder), split)) == [(f"{QUESTION}{i}", i) for i in labels]
    none = SimpleNamespace(**vars(RECIPE) | {"MIN_RIGHT": 8})  # nothing of before is left for train_grpo.py to find
    assert "none" in write_learnable(folder, rows, [], [], none) and not (folder / "train.jsonl").exists()


@pytest.mark.parametrize("line", ["nonsense", "5", "{}", '{"question": 1, "label": 2, "samples": 3}', "\0"])
def test_damaged_log(line, tmp_path):
    """A log that somebody has edited is refused in a line, not guessed at."""
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(UserError, match="damaged"):
        read_log(tmp_path / "log", [("1", 2)], RECIPE)
