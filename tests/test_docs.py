"""The pages of docs/: their figures are those of results.json, and each Chinese page is the twin of the English one."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
RUNS = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))  # what a run is called -> its figures
NAMES = {name: run for run in RUNS.values() for name in run["names"]}  # the first cell of a row, in either language
COLUMNS = {  # the head of a column, in either language -> the name of its figure
    "strict": "strict",
    "ignoring the format": "flexible",
    "不看格式": "flexible",
    "format": "format",
    "格式": "format",
    "tokens": "tokens",
    "token": "tokens",
    "pass@1": "pass@1",
    "pass@4": "pass@4",
    "MGSM": "mgsm",
    "all 1,319": "all",
    "全部 1,319 题": "all",
    "minutes": "minutes",
    "分钟": "minutes",
    "time": "minutes",
    "用时": "minutes",
}
TABLES = {  # page -> rows of runs that it shows at least
    DOCS / "results.md": 40,
    DOCS / "results.zh.md": 40,
    ROOT / "README.md": 3,
    ROOT / "README.zh.md": 3,
}
TWINS = ("results", "recipe", "watching", "use")


def cells_of(row: str) -> list[str]:
    return [cell.strip().replace("*", "") for cell in row.strip().strip("|").split("|")]


def compare(page: str) -> tuple[int, list[str]]:
    """How many rows of runs a page shows, and what in them differs from results.json.

    A table of runs has a column "strict". A row that it names must be a run's, an accuracy stands there with its
    interval or without, and a cell is without figures only where results.json has none.
    """
    rows, wrong = 0, []
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.M):
        head, _, *lines = table.splitlines()
        heads = [re.sub(r"\s*[(（]95 %[)）]", "", cell) for cell in cells_of(head)]
        if "strict" not in heads:
            continue
        for line in lines:
            name, *cells = cells_of(line)
            rows += 1
            if name not in NAMES:
                wrong.append(f"{name!r} is no run of results.json")
                continue
            for column, cell in zip(heads[1:], cells, strict=True):
                known = NAMES[name].get(COLUMNS[column], [])
                known = known if isinstance(known, list) else [known]
                found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
                if found not in (known, known[:1]):
                    wrong.append(f"{name}, {column}: {cell!r}, not {known}")
    return rows, wrong


def test_a_name_means_one_run():
    """So that a row is compared with its own run; the keys are those that the pages have columns for."""
    assert len(NAMES) == sum(len(run["names"]) for run in RUNS.values())
    assert {key for run in RUNS.values() for key in run} == {"names", *COLUMNS.values()}


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_figures(page):
    """The tables of runs show the figures of results.json, and every run there is shown somewhere."""
    rows, wrong = compare(page.read_text(encoding="utf-8"))
    assert rows >= TABLES[page] and not wrong
    if page.parent == DOCS:
        shown = {cells_of(row)[0] for row in re.findall(r"^\|.*$", page.read_text(encoding="utf-8"), flags=re.M)}
        assert [key for key, run in RUNS.items() if not shown & {*run["names"]}] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 9.9 % |", "| 9.8 % |"),
        ("(13.2 to 21.7)", "(13.2 to 21.8)"),
        ("| 0.8 % |", "|  |"),
        ("| cold start |", "| warm start |"),
        ("| 35 |", "| 36 |"),
    ],
)
def test_a_wrong_figure_is_found(old, new):
    """A changed figure, interval or name, and one that is left out."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert old in page and compare(page.replace(old, new))[1]


def without_links(page: str) -> str:
    return re.sub(r"\]\([^)]*\)", "]", page)


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    """The Chinese page has the English one's sections, commands, pictures and figures, and the names in its tables."""
    pages = [(DOCS / f"{name}{language}.md").read_text(encoding="utf-8") for language in ("", ".zh")]
    for pattern in (r"^(#+) ", r"\]\(([^)]+\.png)\)", r"^\| (`[^|]+`) \|", r"^```text\n.*?^```"):
        english, chinese = ([*re.findall(pattern, page, flags=re.M | re.S)] for page in pages)
        assert english == chinese, pattern
    english, chinese = (Counter(re.findall(r"\d+\.\d+", without_links(page))) for page in pages)
    assert english == chinese
    english, chinese = (
        [
            re.split(r"(?:^|  )#", line)[0].strip()
            for block in re.findall(r"^```(?:bash|python)\n(.*?)^```", page, flags=re.M | re.S)
            for line in block.splitlines()
        ]
        for page in pages
    )
    assert english == chinese


def test_pages_stay_readable():
    """No line of prose has more than 240 characters, and the results can be read in one go."""
    pages = [DOCS / f"{name}{language}.md" for name in TWINS for language in ("", ".zh")]
    for page in pages:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        long = [line for line in prose.splitlines() if len(line) > 240 and not line.startswith("|")]
        assert not long, f"{page.name}: {long}"
    assert len((DOCS / "results.md").read_text(encoding="utf-8").splitlines()) <= 320
