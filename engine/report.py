"""What train_r1.py says in the end: a table with a row for every stage, and a picture."""

from __future__ import annotations

from pathlib import Path

from engine.accuracy import compare, compare_samples, read_answers
from engine.folder import write_text
from engine.numbers import extract_answer
from engine.stages import Stages, read_json


def percent(figures: dict, name: str) -> str:
    """A share with its 95 % interval."""
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:.1%} ({low:.1%} to {high:.1%})"


def write_report(stages: Stages, model: Path) -> str:
    """report.md: a row for every stage, measured on the development questions, and the test questions below.

    Args:
        model: the folder of the last model.

    Returns:
        What it says.
    """
    head = ["stage", "what", "strict (95 %)", "flexible", "format", "pass@1 (95 %)", "tokens", "minutes"]
    lines = ["Development questions:", "", f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * 6]
    for name, stage in stages.plan.items():
        figures, minutes = read_json(stages.folder(name) / "dev" / "eval.json"), stages.seconds.get(name)
        cells = [""] * 5
        if figures:
            shares = [f"{figures['flexible']:.1%}", f"{figures['format']:.1%}", percent(figures, "mean")]
            cells = [percent(figures, "strict"), *shares, f"{figures['mean_tokens']:.0f}"]
        row = [name, stage.what, *cells, f"{minutes / 60:.1f}" if minutes else "not needed"]
        lines.append(f"| {' | '.join(row)} |")
    folder = stages.folder("test")
    greedy, probe = (read_json(folder / "before" / f"{name}.json") for name in ("eval", "probe"))
    head = ["model", "strict (95 %)", "flexible", "format", "tokens", "cut off", "pass@1 (95 %)", "pass@k (95 %)"]
    head.append(probe["question"])
    lines += ["", f"{greedy['n']} test questions:", "", f"| {' | '.join(head)} |", "| --- |" + " ---: |" * 8]
    for when in ("before", "after"):
        greedy = read_json(folder / when / "eval.json")
        sampled = read_json(folder / f"{when}-sampled" / "eval.json")
        row = [when, percent(greedy, "strict"), f"{greedy['flexible']:.1%}", f"{greedy['format']:.1%}"]
        row += [f"{greedy['mean_tokens']:.0f}", f"{greedy['truncated']:.1%}"]
        row += [percent(sampled, "mean"), f"k = {sampled['samples']}: {percent(sampled, 'pass')}"]
        row.append(extract_answer(read_json(folder / when / "probe.json")["answer"]) or "no answer")
        lines.append(f"| {' | '.join(row)} |")
    greedy = [read_answers(folder / when) for when in ("after", "before")]
    sampled = [read_answers(folder / f"{when}-sampled") for when in ("after", "before")]
    lines += ["", f"After against before: {compare(*greedy)}, {compare_samples(*sampled)}"]
    text = "\n".join([*lines, "", f"The model: {model}"]) + "\n"
    write_text(stages.output / "report.md", text)
    return text


def draw_report(stages: Stages, rounds: list[list[Path]], picture: Path) -> None:
    """Accuracy after each measured stage, and reward and thinking over the GRPO steps of all rounds.

    Args:
        rounds: the folders of the runs of each round.
    """
    from matplotlib.figure import Figure

    from engine.curves import read_history

    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    accuracy, reward, thinking = figure.subplots(1, 3)
    measured = {name: read_json(stages.folder(name) / "dev" / "eval.json") for name in stages.plan}
    measured = {name: figures for name, figures in measured.items() if figures}
    strict = [figures["strict"] for figures in measured.values()]
    ends = [figures["strict_ci95"] for figures in measured.values()]
    below, above = zip(
        *((share - low, high - share) for share, (low, high) in zip(strict, ends, strict=True)), strict=True
    )
    accuracy.errorbar(range(len(measured)), strict, yerr=[below, above], fmt="o-", capsize=3, label="strict, 95 %")
    accuracy.plot([figures["flexible"] for figures in measured.values()], "x", label="flexible")
    accuracy.set_xticks(range(len(measured)), measured, rotation=30, ha="right")
    accuracy.set_ylim(0, None)
    accuracy.set_title("development questions")
    start = 0
    for runs in rounds:
        histories = [read_history(run) for run in runs]
        for number, history in enumerate(histories):
            for axes, tag in ((reward, "reward/total"), (thinking, "length/thinking")):
                rows = [row for row in history if tag in row]
                steps = [start + row["step"] for row in rows]
                axes.plot(steps, [row[tag] for row in rows], color=f"C{number}", linewidth=0.8)
        start += max(history[-1]["step"] for history in histories)
        for axes in (reward, thinking):
            axes.axvline(start, color="gray", linewidth=0.5)
    reward.set_title("reward in training")
    thinking.set_title("characters of thinking")
    for axes in (reward, thinking):
        axes.set_ylim(0, None)
        axes.set_xlabel("GRPO step, a color for each run of a round")
    for axes in (accuracy, reward, thinking):
        axes.grid(alpha=0.3)
    accuracy.legend(fontsize=9)
    figure.savefig(picture)
