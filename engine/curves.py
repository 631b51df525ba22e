"""Curves of one run, or of several over each other.

python -m engine.curves output                draw output/curves.png again, also while the run goes
python -m engine.curves output other ...      draw several runs over each other, in output/comparison.png
"""

import argparse
import logging
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from engine.alarms import History
from engine.console import UserError, first_line, note, run

# panel -> its curves and their labels; of several runs only the first curve is drawn
PANELS = {
    "training: reward": {"reward/total": "total", "reward/std": "standard deviation"},
    "training: completions": {"correctness/correct": "correct", "format/soft_format": "format"},
    "held-out, 95 % interval": {"heldout/strict": "strict", "heldout/format": "format"},
    "length in tokens": {"length/mean": "training", "heldout/mean_tokens": "held-out"},
    "wasted": {"reward/zero_variance_groups": "zero-variance groups", "length/cut_off": "completions cut off"},
    "entropy": {"training/entropy": "per token"},
}
SFT_PANELS = {  # of train_sft.py's runs
    "training: loss": {"training/loss": "per token"},
    "training: tokens": {"training/token_accuracy": "predicted right"},
    "held-out, 95 % interval": PANELS["held-out, 95 % interval"],
    "length in tokens": {"heldout/mean_tokens": "held-out"},
    "cut off": {"heldout/truncated": "held-out"},
    "entropy": PANELS["entropy"],
}
LATIN = "DejaVu Sans"  # comes with matplotlib
# How the names of families with Chinese characters begin, on Linux, Windows and macOS
CHINESE = "Noto Sans CJK,Noto Sans SC,Source Han Sans,WenQuanYi,SimHei,Microsoft YaHei,PingFang,Heiti,Arial Unicode"
SMOOTH = 5  # steps in the mean that is drawn over the faint curve of single steps


def read_history(output: Path, until: int | None = None) -> History:
    """The history of a run from its TensorBoard files; of a run that is resumed, up to the step `until`.

    Raises UserError if there are no such files. A run that is resumed goes on without them.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    folder = output / "runs"
    if not folder.is_dir():
        if until is None:
            raise UserError(f"{str(output)!r} holds no run; name a folder that train_grpo.py or train_sft.py wrote")
        note(f"{str(folder)!r} is gone: the curves begin at step {until}")
        return []
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would announce every resume
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: all of them
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag] = event.value
    return [rows[step] for step in sorted(rows) if until is None or step <= until]


def draw_curves(runs: dict[str, History], picture: Path) -> None:
    """Draw one run, or several over each other, as 1000 x 600 pixels; `runs` are histories by the name to show."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would announce that it looks for fonts
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # not pyplot, which needs a display

    fonts = find_fonts("".join(runs) if len(runs) > 1 else "")
    if not fonts:
        numbered = {f"run {number}": name for number, name in enumerate(runs, start=1)}
        said = ", ".join(f"{label} is {name!r}" for label, name in numbered.items())
        note(f"no font that is installed shows all names (install Noto Sans CJK, say); in the picture {said}")
        runs = {label: runs[name] for label, name in numbered.items()}
    rcParams.update({"font.family": fonts or LATIN, "text.parse_math": False})  # a $ in a name begins no formula
    supervised = all(any("training/token_accuracy" in row for row in history) for history in runs.values())
    panels = SFT_PANELS if supervised else PANELS
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items(), strict=True):
        if len(runs) > 1:
            tag, what = next(iter(curves.items()))
            title, lines = f"{title} ({what})", [(name, tag, history) for name, history in runs.items()]
        else:
            lines = [(label, tag, history) for tag, label in curves.items() for history in runs.values()]
        for i, (label, tag, history) in enumerate(lines):
            draw_curve(axes, history, tag, f"C{i}", label)
        axes.set_title(title, fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.supxlabel("step", fontsize=10)
    figure.savefig(picture)


def find_fonts(text: str) -> list[str] | None:
    """Font families that have all characters of a text: matplotlib's own, and a Chinese one where it needs that."""
    from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font

    if not text.isascii():
        for file in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
            with suppress(Exception):  # installed since matplotlib last looked; it may be of a kind that it cannot read
                fontManager.addfont(file)
    installed = sorted({font.name for font in fontManager.ttflist if font.name.startswith(tuple(CHINESE.split(",")))})
    for families in ([LATIN], *([LATIN, family] for family in installed)):
        fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
        if all(any(font.get_char_index(ord(char)) for font in fonts) for char in text):
            return families
    return None


def draw_curve(axes, history: History, tag: str, color: str, label: str) -> None:
    """Draw one curve: held-out figures as points, with an interval; all others smoothed over the steps."""
    rows = [row for row in history if tag in row]
    steps, values = [row["step"] for row in rows], [row[tag] for row in rows]
    if tag.startswith("heldout/"):
        axes.plot(steps, values, color=color, label=label, marker="o", markersize=3)
        if tag == "heldout/strict":
            low, high = ([row[f"heldout/strict_{end}"] for row in rows] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=color, alpha=0.15)
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    smooth = [fmean(values[max(0, end - SMOOTH) : end]) for end in range(1, len(values) + 1)]
    axes.plot(steps, smooth, color=color, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the curves of runs", allow_abbrev=False)
    parser.add_argument("outputs", nargs="+", type=Path, help="a run's folder; several are drawn over each other")
    outputs = parser.parse_args().outputs
    picture = outputs[0] / ("curves.png" if len(outputs) == 1 else "comparison.png")
    runs = {str(output): read_history(output) for output in outputs}
    try:
        draw_curves(runs, picture)
    except OSError as error:
        raise UserError(f"cannot write {str(picture)!r}: {first_line(error)}; mend that, or name a copy") from error
    print(picture)


if __name__ == "__main__":
    run(main)
