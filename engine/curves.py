"""Curves of one run, or of several over each other.

python -m engine.curves output                draw output/curves.png again, also while the run goes
python -m engine.curves output other ...      draw several runs over each other, in output/comparison.png
"""

import argparse
import logging
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from engine.console import UserError, first_line, note, run
from engine.monitor import History

# panel -> the upper end of its scale (None: as the data want) and its curves; of several runs only the first curve
PANELS = {
    "training: reward": (None, {"reward/total": "total", "reward/std": "standard deviation"}),
    "training: completions": (1.02, {"correctness/correct": "correct", "format/soft_format": "format"}),
    "held-out, 95 % interval": (1.02, {"heldout/strict": "strict", "heldout/format": "format"}),
    "length in tokens": (None, {"length/mean": "training", "heldout/mean_tokens": "held-out"}),
    "wasted": (1.02, {"reward/zero_variance_groups": "groups without spread", "length/cut_off": "completions cut off"}),
    "entropy": (None, {"training/entropy": "per token"}),
}
SFT_PANELS = {  # of train_sft.py's runs
    "training: loss": (None, {"training/loss": "per token"}),
    "training: tokens": (1.02, {"training/token_accuracy": "predicted right"}),
    "held-out, 95 % interval": PANELS["held-out, 95 % interval"],
    "length in tokens": (None, {"heldout/mean_tokens": "held-out"}),
    "cut off": (1.02, {"heldout/truncated": "held-out"}),
    "entropy": PANELS["entropy"],
}
LATIN = "DejaVu Sans"  # comes with matplotlib
# How the names of families with Chinese characters begin, on Linux, Windows and macOS
CHINESE = "Noto Sans CJK,Noto Sans SC,Source Han Sans,WenQuanYi,SimHei,Microsoft YaHei,PingFang,Heiti,Arial Unicode"
SMOOTH = 5  # steps in the mean that is drawn over the faint curve of single steps


def read_history(output: Path, until: int | None = None) -> History:
    """The rows of a run from its TensorBoard files; of one that is resumed, up to the step `until`.

    Raises:
        UserError: there are none, and the run is not resumed: that one goes on without.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not (output / "runs").is_dir():
        if until is not None:
            note(f"{str(output / 'runs')!r} is gone: the curves begin at step {until}")
            return []
        raise UserError(
            f"{str(output)!r} holds no run (it has no runs/); name a folder that train_grpo.py or train_sft.py wrote"
        )
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would announce every resume
    events = EventAccumulator(str(output / "runs"), size_guidance={SCALARS: 0}).Reload()  # 0: all of them
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag] = event.value
    return [rows[step] for step in sorted(rows) if until is None or step <= until]


def draw_curves(runs: dict[str, History], picture: Path) -> None:
    """Draw one run, or several over each other, as 1000 x 600 pixels."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would announce that it looks for fonts
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # not pyplot: needs no display

    fonts = find_fonts("".join(runs) if len(runs) > 1 else "")
    if not fonts:
        named = {f"run {number}": history for number, history in enumerate(runs.values(), start=1)}
        said = ", ".join(f"{label} is {name!r}" for label, name in zip(named, runs, strict=True))
        note(f"no font that is installed shows all names (install Noto Sans CJK, say); in the picture {said}")
        runs = named
    rcParams.update({"font.family": fonts or LATIN, "text.parse_math": False})  # a $ in a name begins no formula
    taught = all(any("training/token_accuracy" in row for row in history) for history in runs.values())
    panels = SFT_PANELS if taught else PANELS
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    for axes, (title, (top, curves)) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items(), strict=True):
        if len(runs) > 1:
            tag, what = next(iter(curves.items()))
            title, lines = f"{title} ({what})", [(name, tag, history) for name, history in runs.items()]
        else:
            lines = [(label, tag, history) for tag, label in curves.items() for history in runs.values()]
        for i, (label, tag, history) in enumerate(lines):
            draw_curve(axes, history, tag, f"C{i}", label)
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, top)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.supxlabel("step", fontsize=10)
    figure.savefig(picture)


def find_fonts(text: str) -> list[str] | None:
    """Families that have all characters of a text: matplotlib's own, and a Chinese one where it needs that."""
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
    """One curve: points and interval where it comes from the held-out questions, else smoothed over the steps."""
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
