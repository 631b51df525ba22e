"""The alarms on made and recorded histories, what a run leaves to look at, and what a resumed run does to it."""

import json
import math
import re
import struct
from statistics import fmean
from types import SimpleNamespace

import pytest
from conftest import FORM_PAID, ROOT, run_main, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

import evaluate
import train_grpo
from engine import alarms, monitor
from engine.alarms import REPEAT, WINDOW, find_alarms, not_finite
from engine.console import UserError
from engine.curves import PANELS, draw_curves, read_history
from engine.monitor import Monitor, RunMonitor, SftMonitor, preformatted, side_by_side
from engine.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, carry_prompt
from rewards import REWARDS

SAMPLE_KEYS = ["step", "question", "label", "completion", "extracted", "rewards", "advantage"]


def made(**curves: list[float]) -> list[dict]:
    """A history whose tags have these values, `__` standing for the slash."""
    tags = {name.replace("__", "/"): values for name, values in curves.items()}
    return [{"step": i + 1, **dict(zip(tags, row, strict=True))} for i, row in enumerate(zip(*tags.values()))]  # noqa: B905


def over(*values: float) -> list[float]:
    """Each value for one WINDOW of steps."""
    return [value for value in values for _ in range(WINDOW)]


# name -> a history that has to raise it, and one like it that must not
DRIVEN = {
    "format_without_correctness": (
        made(correctness__correct=over(0.2, 0.3, 0.02), format__all=over(0.4, 0.6, 1.0)),
        made(correctness__correct=over(0.1, 0.2, 0.3), format__all=over(0.4, 0.6, 1.0)),
    ),
    "too_many_cut_off": (made(length__cut_off=over(0.1, 0.25)), made(length__cut_off=over(0.5, 0.15))),
    "too_many_repeating": (made(length__repeating=over(0.0, 0.15)), made(length__repeating=over(0.5, 0.05))),
    "too_many_zero_variance_groups": (
        made(reward__zero_variance_groups=over(0.2, 0.9), correctness__correct=over(0.3, 0.01)),
        made(reward__zero_variance_groups=over(0.2, 0.7), correctness__correct=over(0.3, 0.6)),
    ),
    "thinking_shrinks": (made(length__thinking=over(200, 90)), made(length__thinking=over(200, 110))),
    "entropy_collapsed": (made(training__entropy=over(0.5, 0.04)), made(training__entropy=over(0.5, 0.1))),
}
EARLIEST = {"thinking_shrinks": alarms.FIRST_STEPS + alarms.LAST_STEPS}  # steps; WINDOW for all others


# Reasoning of a real 0.5B model, with formulas that resemble each other
HONEST = """首先，我们需要计算每种花的数量。黄色的花有 10 朵，紫色的花比黄色的花多 80%：
\\[ \\text{紫色的花} = 10 + 0.8 \\times 10 = 10 + 8 = 18 \\]

绿色的花的数量是黄色和紫色的花的总数的 25%：
\\[ \\text{绿色的花} = 0.25 \\times (10 + 18) = 0.25 \\times 28 = 7 \\]

最后，我们将所有花的数量相加，得到花园里花的总数：
\\[ \\text{花园里的花} = 10 + 18 + 7 = 35 \\]

因此，马克的花园里一共有 35 朵花。"""


# A demo run as it was recorded: tag -> the unit, and a number of them for each of its 50 steps
HEALTHY = {
    "correctness/correct": (
        0.01,
        "31 39 42 43 45 52 63 64 72 75 72 80 90 89 88 89 83 88 89 88 96 89 93 91 94 95 90 93 95 90 91 97 91 "
        "98 90 93 95 93 95 95 95 95 94 88 95 98 96 87 87 91",
    ),
    "format/all": (
        0.01,
        "96 94 97 96 96 96 96 98 97 96 95 98 98 98 97 97 97 96 98 98 99 98 98 97 98 98 98 99 100 99 99 99 97 "
        "100 97 100 99 99 99 98 99 99 98 98 99 99 100 100 98 99",
    ),
    "length/cut_off": (
        0.001,
        "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 8 0 0 0 8 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 8 0 0 0 0 0 0",
    ),
    "reward/zero_variance_groups": (
        0.01,
        "0 0 0 0 0 0 0 0 12 0 6 12 31 19 25 50 19 19 31 19 50 44 38 44 56 69 56 38 69 69 56 75 25 75 38 50 56 "
        "56 56 44 62 56 50 56 50 75 69 56 56 50",
    ),
    "length/thinking": (
        0.1,
        "143 179 178 185 190 199 226 225 248 278 266 277 275 286 296 309 299 309 299 300 306 306 303 304 310 "
        "311 297 300 316 307 309 309 288 311 299 316 305 304 306 299 308 301 313 307 307 300 306 314 310 312",
    ),
    "training/entropy": (
        0.001,
        "70 68 67 71 72 67 64 67 58 57 55 46 37 37 37 42 40 31 31 34 28 41 36 36 31 25 29 27 21 24 21 18 35 "
        "19 32 21 25 23 23 23 25 22 21 31 29 22 27 28 34 24",
    ),
}


@pytest.mark.parametrize("name", DRIVEN)
def test_alarm(name):
    bad, good = DRIVEN[name]
    [(rung, line)] = find_alarms(bad).items()
    assert rung == name and "\n" not in line
    too_early = bad[: EARLIEST.get(name, WINDOW) - 1]
    assert find_alarms(good) == find_alarms(too_early) == find_alarms([]) == {}


@pytest.mark.parametrize(
    "length",
    [
        # a real 0.5B model that reasoned outside the format learned to guess in it within six steps
        "168 125 219 103 72 51 110 73 54 71 78 50 49 49 46 52 52 70 48 68 52 54 53 52 60",
        # the tutorial's rewards on it: one-line answers are paid
        "143 163 134 113 81 81 29 76 40 37 33 7 2 4 3 0 2 2",
    ],
)
def test_alarm_on_a_real_model_that_gives_up_reasoning(length):
    """As recorded: the alarm rings within nine steps, and holds at the end."""
    history = made(length__thinking=list(map(int, length.split())))
    rung = [step for step in range(len(history) + 1) if find_alarms(history[:step])]
    assert 7 <= rung[0] <= 9 and rung[-1] == len(history)


def test_a_healthy_run_raises_no_alarm():
    curves = {tag: [unit * int(number) for number in numbers.split()] for tag, (unit, numbers) in HEALTHY.items()}
    history = made(**curves, format__soft_format=curves["format/all"])
    assert [find_alarms(history[:step]) for step in range(len(history) + 1)] == [{}] * 51


@pytest.mark.parametrize(("share", "remedy"), [(0.01, "easier questions"), (0.99, "harder ones")])
def test_zero_variance_groups_of_right_answers_are_another_matter(share, remedy):
    history = made(reward__zero_variance_groups=over(0.9), correctness__correct=over(share))
    assert remedy in find_alarms(history)["too_many_zero_variance_groups"]


def test_an_alarm_that_holds_is_raised_again_only_now_and_then(capsys):
    watch = Monitor.__new__(Monitor)
    watch.raised, watch.warned, watch.history = {}, False, DRIVEN["too_many_cut_off"][0]
    texts = []
    watch.board = SimpleNamespace(add_text=lambda tag, text, step: texts.append((tag, step)))
    for step in range(50, 50 + REPEAT + 5):
        watch.raise_alarms(step)
    assert texts == [("alarm/too_many_cut_off", 50), ("alarm/too_many_cut_off", 50 + REPEAT)]
    assert capsys.readouterr().out.count("ALARM") == 2


@pytest.mark.parametrize("name", ["loss", "grad_norm", "rewards/correctness_reward/mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])  # TRL turns a mean of nothing but NaN into None
def test_not_finite(name, value):
    logs = {"loss": 0.0, "grad_norm": 0.3, "rewards/correctness_reward/mean": 1.0, "rewards/mark_reward/std": math.nan}
    assert not_finite(logs) is None
    assert name in not_finite(logs | {name: value})


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("一共多少？" + "确定杰瑞每天收集的鸡蛋数量。\n" * 20, True),
        ("".join(f"{i}. 计算弗莱德订购的红玫瑰数量。\n" for i in range(10, 40)), True),  # with a running number
        ("哈" * 1000 + HONEST, False),  # it found its way back
        (HONEST, False),
        ("我们" * 50, False),  # shorter than what is looked at
        ("", False),
        ("\ud83d" * 300, True),  # half a character, as a cut may leave it
    ],
)
def test_repetition(text, repeats):
    """An end that repeats itself is found, with a running number too; honest formulas are none."""
    assert monitor.repeats_itself(text) is repeats


def test_a_step_that_is_not_finite_ends_the_run_unsaved(demo_output):
    """A reward of the second step that is no number: the step is named, and nothing is saved after the first one."""
    calls = []

    def mark_reward(completions, **kwargs):
        calls.append(len(completions))
        return [math.nan if len(calls) == 2 else 0.5] * len(completions)

    with pytest.raises(UserError, match="^step 2: rewards/mark_reward/mean not finite"):
        rewards = [mark_reward, *REWARDS[1:]]
        run_main(train_grpo.main, "--demo", "--output", demo_output, "--max-steps", 3, SAVE_EVERY=1, REWARDS=rewards)
    assert [path.name for path in demo_output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (demo_output / "curves.png").exists() and not (demo_output / "model.safetensors").exists()


def test_tags_and_markup_show_in_tensorboard():
    """Nothing is read as Markdown or HTML, lines stay lines, and nothing keeps the browser from wrapping long ones."""
    text = "<think>\n5*60=300，*5* _x_ `y`\n\n# 标题\n</think>\n<answer>300</answer></p></td></table>"
    assert "&lt;think&gt;<br>5*60=300，*5* _x_ `y`<br><br># 标题<br>&lt;/think&gt;" in markdown_to_safe_html(
        preformatted(text)
    )
    sample = dict(zip(SAMPLE_KEYS, [7, "5分钟<多少秒", 300, text, "300", {"digit_reward": 0.5}, 1.5], strict=True))
    shown = markdown_to_safe_html(side_by_side(sample, sample | {"advantage": -0.5}))
    assert shown.count("<td>") == 2 and shown.count("&lt;think&gt;") == 2 and shown.count("&lt;/table&gt;") == 2
    assert "5分钟&lt;多少秒<br>label 300" in shown and "advantage -0.50<br>digit 0.5" in shown
    assert "<pre>" not in shown and "<code>" not in shown


def test_resuming_drops_samples_that_will_be_made_again(tmp_path):
    file = tmp_path / "samples.jsonl"
    monitor.keep_samples_until(5, file)  # none yet
    lines = [json.dumps({"step": step, "completion": "\u2028"}, ensure_ascii=False) + "\n" for step in (1, 5, 6)]
    torn = "\0\0\n{}\n"  # a power cut
    file.write_text(torn + "".join(lines) + '{"step": 2, "quest', encoding="utf-8")  # killed while writing
    monitor.keep_samples_until(5, file)
    assert file.read_text(encoding="utf-8") == "".join(lines[:2])


def test_a_full_disk_costs_curves_and_not_the_run(capsys):
    """TensorBoard's writer raises from its first failure on: that is said once, and the history is kept in memory."""

    def full(*_):
        raise OSError(28, "No space left on device")

    watch = Monitor.__new__(Monitor)
    watch.history, watch.warned, watch.board = [], False, SimpleNamespace(add_scalar=full)
    for step in (1, 2):
        watch.record(step, {"reward/total": 0.5, "length/mean": 30.0})
    assert [row["step"] for row in watch.history] == [1, 2] and watch.history[1]["length/mean"] == 30
    assert capsys.readouterr().out.count("WARNING") == 1


def test_time_left_where_the_curves_were_deleted(capsys):
    """By the pace of the steps that were timed, not of those of before, of which nobody knows the time any more."""
    watch = SftMonitor.__new__(SftMonitor)
    row = {"training/loss": 1.0, "training/token_accuracy": 0.5, "training/learning_rate": 1e-5}
    times = {"speed/step_seconds": 10.0, "speed/train_seconds": 10.0}
    watch.history = [{"step": 100, "heldout/strict": 0.2}, {"step": 101} | row | times]
    watch.print_step(110)
    assert "left 0:01:30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "strict", "said"),
    [
        (CHATML_TEMPLATE, 0.06, "WARNING: strict 6.0% is less than half of flexible 13.0%.*train_r1.py"),
        (PLAIN_TEMPLATE, 0.06, "note: strict 6.0% .*R1-Zero"),
        (CHATML_TEMPLATE, 0.07, None),
    ],
)
def test_grpo_alone_would_teach_the_format_only(template, strict, said, monkeypatch, capsys):
    """Before the training one line says so where the model can do twice as much as it can put into the format.

    A base model is only told: in R1-Zero it has to find the format. After the training nothing is said.
    """
    monkeypatch.setattr(RunMonitor, "measure_model", lambda self, *_: ({"strict": strict, "flexible": 0.13}, "300"))
    watch = Monitor.__new__(Monitor)
    carried = carry_prompt(template, [{"role": "system", "content": "按格式"}])
    watch.trainer = SimpleNamespace(processing_class=SimpleNamespace(chat_template=carried))
    assert watch.measure_model("after", 40) == watch.measure_model("before", 0)
    out = capsys.readouterr().out
    assert re.fullmatch(said + ".*\n", out) if said else out == ""


def test_resuming_replaces_the_curves_of_lost_steps(tmp_path):
    for began, last, value in ((0, 6, 1.0), (4, 5, 2.0)):  # logged to step 6, resumed at 4, logged to step 5
        with SummaryWriter(tmp_path / "runs", filename_suffix=f".{began}", purge_step=began + 1) as board:
            for step in range(began + 1, last + 1):
                board.add_scalar("reward/total", value, step)
    assert [(row["step"], row["reward/total"]) for row in read_history(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 1.0),
        (5, 2.0),
    ]


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])


def test_curves_of_one_run_and_of_several(tmp_path):
    history = made(correctness__correct=over(0.1, 0.5), length__mean=over(20, 40))  # no look at held-out questions yet
    for runs in ({"a": history}, {"a": history, "b": history[:3]}):
        draw_curves(runs, tmp_path / "curves.png")
        assert png_size(tmp_path / "curves.png") == (1000, 600)
        (tmp_path / "curves.png").unlink()


def test_what_a_run_leaves_to_look_at(demo_output, tmp_path, capsys):
    """Curves, samples and held-out accuracy of a run of three steps, in the files and as TensorBoard shows them."""
    run_main(train_grpo.main, "--demo", "--output", demo_output, "--max-steps", 3)
    said = capsys.readouterr().out
    assert "ALARM" not in said
    assert said.count("held-out   ") == 2  # the first point comes with `before`, the last one with `after`

    board = EventAccumulator(str(demo_output / "runs")).Reload()
    events, [layout] = board.Tags(), board.Tensors("custom_scalars__config__")
    [category] = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert [chart.title for chart in category.chart] == list(PANELS)  # of the overview tab
    groups = {tag.partition("/")[0] for tag in events["scalars"]}
    assert groups == {"reward", "correctness", "format", "language", "length", "training", "speed", "heldout"}
    shown = {tag.removesuffix("/text_summary") for tag in events["tensors"]}
    assert shown == {"recipe", "samples/group_1", "samples/group_2", "custom_scalars__config__"}
    drawn = {tag for curves in PANELS.values() for tag in curves}
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/watching.md"))
    told = re.findall(rf"`((?:{'|'.join(groups)})/[a-z_]+)`", pages)
    elsewhere = {"training/token_accuracy", "speed/trained_tokens_per_second"}  # of train_sft.py
    elsewhere |= {"training/kl", "reward/preference_reward"}  # of a run with BETA, of one with REWARD_MODEL
    assert drawn <= {*events["scalars"]} == {*told} - elsewhere
    history = read_history(demo_output)
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert [row["step"] for row in history if "heldout/strict" in row] == [0, 3]
    assert all(row["heldout/strict_low"] <= row["heldout/strict"] <= row["heldout/strict_high"] for row in history[::3])
    assert {tag for tag in history[1] if tag.startswith("format/")} == {
        f"format/{name}" for name in ("mark", "soft_format", "hard_format", "digit", "all")
    }
    for row in history[1:]:  # the language is watched and earns nothing
        paid = sum(w * row[f"reward/{reward.__name__}"] for w, reward in zip(FORM_PAID, REWARDS, strict=True))
        assert 0.5 < row["language/chinese"] <= 1 and paid == pytest.approx(row["reward/total"], rel=1e-5)
        assert row["format/all"] == pytest.approx(
            fmean(row[f"format/{name}"] for name in ("mark", "soft_format", "hard_format", "digit"))
        )
    assert all(0 <= row["reward/zero_variance_groups"] <= 1 and row["length/thinking"] > 0 for row in history[1:])
    assert all(0 <= row["length/repeating"] <= 1 for row in history[1:])

    samples = [json.loads(line) for line in open(demo_output / "samples.jsonl", encoding="utf-8")]
    assert [list(sample) for sample in samples] == [SAMPLE_KEYS] * 4  # best and worst of two groups, at step 1
    for best, worst in (samples[:2], samples[2:]):
        assert best["question"] == worst["question"] and best["advantage"] >= worst["advantage"]
        assert len(best["rewards"]) == 6 and isinstance(best["label"], int)

    results = json.loads((demo_output / "results.json").read_text(encoding="utf-8"))
    assert results["best"] == {"step": 3, "strict": pytest.approx(history[-1]["heldout/strict"])}
    assert (demo_output / "checkpoint-3").is_dir()

    found = {}  # the curve is of the development questions, `after` of the test questions
    for split in ("dev", "test"):
        run_main(evaluate.main, demo_output, "--split", split, "--cpu", "--output", tmp_path)
        found[split] = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert found["test"] == results["after"] and found["dev"] != found["test"]
    assert history[-1]["heldout/strict"] == pytest.approx(found["dev"]["strict"])
    assert history[-1]["heldout/mean_tokens"] == pytest.approx(found["dev"]["mean_tokens"])

    (demo_output / "curves.png").unlink()
    assert run_script("-m", "engine.curves", demo_output).stdout.strip() == str(demo_output / "curves.png")
    assert png_size(demo_output / "curves.png") == (1000, 600)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        read_history(tmp_path)
