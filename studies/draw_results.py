"""The picture of the READMEs, in English and in Chinese, from the figures in docs/results.json.

python studies/draw_results.py    # docs/path.png and docs/path.zh.png; the second needs a font with Chinese characters
"""

import json
import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.console import UserError, run
from engine.curves import find_fonts

DOCS = Path(__file__).resolve().parents[1] / "docs"
RUNS = ["untouched", "tutorial", "cold", "grpo-7", "mean-3"]
GRAY, RED, BLUE = "#9e9e9e", "#c0392b", "#2471a3"
COLORS = [GRAY, RED, BLUE, BLUE, BLUE]
WORDS = {  # of each language: the bars, the title of each panel, the unit of each, and the legend
    "": (
        ["untouched", "tutorial's\nrewards", "cold start", "+ GRPO,\n40 steps", "mean after\nthree rounds"],
        ["Right answers to 300 test questions, in the format", "Length of an answer, thinking included"],
        ["%, with 95 % interval", "tokens"],
        "ignoring the format",
    ),
    ".zh": (
        ["未训练", "教程的奖励", "冷启动", "+ GRPO\n40 步", "三轮之后\n的平均"],
        ["300 道测试题里按格式答对的", "回答的长度（包括思考）"],
        ["%，竖线是 95 % 置信区间", "token"],
        "不看格式",
    ),
}


def draw(language: str) -> Path:
    """Draw one picture. Raises UserError where no font has its characters."""
    runs = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    bars, titles, units, ignoring = WORDS[language]
    fonts = find_fonts("".join([*bars, *titles, *units, ignoring]).replace("\n", ""))
    if not fonts:
        raise UserError("no font that is installed has Chinese characters; install Noto Sans CJK, say")
    rcParams["font.family"] = fonts
    figure = Figure(figsize=(11, 3.6), dpi=100, layout="constrained")
    right, length = figure.subplots(1, 2)
    strict = [runs[name]["strict"] for name in RUNS]  # share, and the ends of its interval
    shares, tokens = [share for share, *_ in strict], [runs[name]["tokens"] for name in RUNS]
    ends = [[share - low for share, low, _ in strict], [high - share for share, _, high in strict]]
    right.bar(bars, shares, yerr=ends, capsize=4, color=COLORS)
    right.plot(bars, [runs[name]["flexible"] for name in RUNS], "kD", fillstyle="none", label=ignoring)
    right.legend(frameon=False)
    length.bar(bars, tokens, color=COLORS)
    for axes, values, above in ((right, shares, ends[1]), (length, tokens, [0] * len(RUNS))):
        for place, (value, end) in enumerate(zip(values, above, strict=True)):
            axes.annotate(f"{value:g}", (place, value + end), (0, 3), textcoords="offset points", ha="center")
    for axes, title, unit in zip((right, length), titles, units, strict=True):
        axes.set_title(title, fontsize=12)
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=10)
        axes.margins(y=0.12)
    picture = DOCS / f"path{language}.png"
    figure.savefig(picture)
    return picture


def main() -> None:
    for language in WORDS:
        print(draw(language))


if __name__ == "__main__":
    run(main)
