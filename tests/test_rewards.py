"""The reward rules, one table each; then junk, long strings, labels, and answers written around 250 real labels."""

import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.numbers import TAGS, chinese_share, extract_answer, find_numbers, parse_number, thinking_of
from rewards import (
    REWARD_MAXIMA,
    REWARD_WEIGHTS,
    REWARDS,
    correctness_reward,
    digit_reward,
    hard_format_reward,
    language_reward,
    mark_reward,
    soft_format_reward,
)

MGSM = Path(__file__).parents[1] / "../shared/data/mgsm_zh.tsv"  # real questions; not part of the project


def completion(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def score(reward, text: str, question: str = "", **kwargs) -> float:
    (value,) = reward(completions=[completion(text)], prompts=[[{"role": "user", "content": question}]], **kwargs)
    return value


def correct(text: str, label: int) -> bool:
    return score(correctness_reward, text, answer=[label]) == 2.0


def block(answer: str) -> str:
    return f"<think>\n想一想\n再想一想\n</think>\n<answer>\n{answer}\n</answer>"


# --- Numbers ---

ONE_NUMBER = [
    # plain
    ("72", "72"),
    ("0", "0"),
    ("007", "7"),
    # rule 1: full-width forms
    ("７２", "72"),
    ("－７２．５", "-72.5"),
    ("＋７２％", "72"),
    ("−7", "-7"),
    ("１，０８０", "1080"),
    ("12 cm²", "12"),
    ("12cm²", "12"),
    ("① 18", "18"),
    ("٣ 18", "18"),
    # rule 2: thousands commas
    ("1,080", "1080"),
    ("1，080", "1080"),
    ("共12，300人", "12300"),
    ("1,234,567.5", "1234567.5"),
    ("1,080，", "1080"),
    ("1,080, 元", "1080"),
    ("...1,080", "1080"),
    # rule 3: decimals
    ("3.50", "3.5"),
    ("300.0", "300"),
    (".5", "0.5"),
    ("．５", "0.5"),
    ("约 .5 米", "0.5"),
    ("-.5", "-0.5"),
    ("+.5", "0.5"),
    ("$.5", "0.5"),
    ("-$.5", "-0.5"),
    ("(.5)", "0.5"),
    ("（.5）", "0.5"),
    ("**.5**", "0.5"),
    ("\\boxed{.5}", "0.5"),
    ("42.", "42"),
    ("42。", "42"),
    ("42...", "42"),
    ("3.万", "3"),
    ("答案是...18", "18"),
    ("答案是.18", "18"),
    # rule 4: signs
    ("-18", "-18"),
    ("+18", "18"),
    ("答案是-18", "-18"),
    ("-$18", "-18"),
    ("-￥18", "-18"),
    ("$-18", "-18"),
    ("-**18**", "-18"),
    ("**-18**", "-18"),
    ("-**$1,080.50**", "-1080.5"),
    ("-\\$18", "-18"),
    ("-\\boxed{18}", "-18"),
    ("负18", "-18"),
    ("负 18", "-18"),
    ("负　18", "-18"),
    ("负**18**", "-18"),
    ("**负** 18", "-18"),
    ("负债18", "18"),
    ("- 18", "18"),
    ("- **18**", "18"),
    ("–18", "18"),
    ("—18", "18"),
    ("——18", "18"),
    # rule 5: multipliers
    ("3百", "300"),
    ("3千", "3000"),
    ("3万", "30000"),
    ("3亿", "300000000"),
    ("1.5万", "15000"),
    (".5万", "5000"),
    ("1,080万", "10800000"),
    ("３万", "30000"),
    ("-3万", "-30000"),
    ("-$3万", "-30000"),
    ("负 3 万", "-30000"),
    ("3千万", "30000000"),
    ("3百万", "3000000"),
    ("3万万", "300000000"),
    ("3 千 万", "30000000"),
    ("3万元", "30000"),
    ("3 万元", "30000"),
    ("**3**万", "30000"),
    ("**3** 万元", "30000"),
    ("$3$万元", "30000"),
    ("\\boxed{3}万", "30000"),
    ("\\boxed{3\\text{ 万元}}", "30000"),
    ("3百米", "300"),
    ("3百克", "300"),
    ("3万千克", "30000"),
    ("3百千米", "300"),
    ("3亿千瓦时", "300000000"),
    ("3千千克", "3000"),
    ("3千字", "3000"),
    ("百分之50", "50"),
    ("50百分点", "50"),
    ("50个百分点", "50"),
    ("三万3", "3"),
    *((f"3{gap}千{unit}", "3") for gap in ("", " ", "**") for unit in "克 米 瓦 卡 焦 赫 帕 伏 升 字节 比特".split()),
    # rule 6: what stands around
    ("$18", "18"),
    ("18 美元", "18"),
    ("US$18", "18"),
    ("**18**", "18"),
    ("$18$", "18"),
    ("\\(18\\)", "18"),
    ("\\boxed{18}", "18"),
    ("$\\boxed{18}$", "18"),
    ("\\text{18 元}", "18"),
    ("50%", "50"),
    ("50％", "50"),
    ("答案是 300 秒。", "300"),
    ("The answer is 300 seconds.", "300"),
    # long, but not too long: exact beyond the 28 digits that Decimal arithmetic keeps
    ("9" * 30, "9" * 30),
    ("-0." + "1" * 29, "-0." + "1" * 29),
    ("1" * 26 + "万", "1" * 26 + "0000"),
    ("1." + "1" * 29 + "万", "11111." + "1" * 25),
]


@pytest.mark.parametrize(("text", "number"), ONE_NUMBER)
def test_one_number(text, number):
    assert parse_number(text) == Decimal(number)
    assert find_numbers(text) == [Decimal(number)]


SEVERAL_NUMBERS = [
    ("1,08", [1, 8]),  # two digits behind the comma
    ("1,0800", [1, 800]),  # four digits behind the comma
    ("1234,567", [1234, 567]),  # four digits before it
    ("12，3", [12, 3]),  # a Chinese comma is a comma
    ("1,080,5", [1, 80, 5]),  # the last group is short: none of it is grouped
    ("1,0,080", [1, 0, 80]),  # so is the middle one
    ("0,500", [0, 500]),  # no grouped number begins with 0
    ("1, 080", [1, 80]),  # a blank behind the comma
    ("1{,}080", [1, 80]),  # LaTeX's thousands are no rule here
    ("0.5,123,456", [Decimal("0.5"), 123, 456]),  # decimals are not grouped
    (".500,000", [Decimal("0.5"), 0]),  # nor these
    ("1.2.3", [Decimal("1.2"), 3]),  # a version
    ("2024-05-01", [2024, 5, 1]),  # a date; its hyphens are no signs
    ("10-20", [10, 20]),  # a range
    ("10−20", [10, 20]),  # with a minus sign
    ("$10-$20", [10, 20]),  # with currency
    ("**10**-**20**", [10, 20]),  # in bold
    ("3万-5万", [30000, 50000]),  # with multipliers
    ("10-1,080", [10, 1080]),  # grouped behind the hyphen
    ("10--5", [10, -5]),  # the second hyphen is a sign
    ("10 -5", [10, -5]),  # so is this one
    ("10 - 5", [10, 5]),  # and this one is not
    ("10-.5", [10, Decimal("0.5")]),  # behind a joining hyphen too the point is one
    ("3万5千", [30000, 5000]),  # 35000, but the rules do not add
    ("3/4", [3, 4]),  # a fraction
    ("\\frac{3}{4}", [3, 4]),  # the same
    ("1e3", [1, 3]),  # scientific
    ("2^3", [2, 3]),  # a power
    ("2**3", [2, 3]),  # the same; * is bold only around
    ("5*60=300", [5, 60, 300]),  # an equation
    ("60 或 300", [60, 300]),  # a choice
    ("300 300", [300, 300]),  # twice the same is not one
    ("2小时30分钟", [2, 30]),  # two units
    ("第3天卖18个", [3, 18]),  # an ordinal is a number
    ("1. 18", [1, 18]),  # a numbered list
    ("12:30", [12, 30]),  # a time
]


@pytest.mark.parametrize(("text", "numbers"), SEVERAL_NUMBERS)
def test_several_numbers_are_no_answer(text, numbers):
    assert find_numbers(text) == numbers
    assert parse_number(text) is None


NO_NUMBER = [
    "",  # empty
    " \n\t　",  # blank
    "三百",  # Chinese numerals
    "三百万",  # multipliers without digits
    "不知道",  # words
    "-",  # a sign alone
    "负",  # the other sign alone
    ".",  # a point alone
    ",",  # a comma alone
    "$",  # currency alone
    "\\boxed{}",  # an empty box
    "①",  # compatibility digit
    "٣",  # Arabic-Indic digit
    "१८",  # Devanagari digits
    "𝟕𝟐",  # mathematical digits
    "²",  # superscript alone
    "½",  # vulgar fraction alone
    "Ⅻ",  # Roman numeral
    "NaN",  # Decimal would take it
    "Infinity",  # and this
    "\ud800",  # lone surrogate
    "\0",  # NUL
]
UNREADABLE = [
    "5²",  # 25
    "5⁻³",  # superscript minus
    "5ⁿ",  # superscript letter
    "5₂",  # subscript
    "1½",  # one and a half
    "1¼",  # one and a quarter
    "1¾",  # one and three quarters
    "1⅐",  # one and a seventh
    "1↉",  # vulgar fraction of its own block
    "５²",  # full-width base
    "3.5²",  # behind a decimal
    "1,080²",  # behind groups
    "**5**²",  # bold does not matter
    "5²万",  # with a multiplier
    "9" * 31,  # 31 digits
    "-" + "0" * 31,  # 31 digits, even if they are worth nothing
    "0." + "1" * 30,  # 31 digits with the decimals
    "1" + ",000" * 10,  # 31 digits in groups
    "1" * 27 + "万",  # 31 digits as a product
    "1亿亿亿亿",  # 33 digits as a product
    "1" + "亿" * 1000,  # beyond Decimal's default exponents, times a thousand
]


@pytest.mark.parametrize("text", NO_NUMBER + UNREADABLE)
def test_no_number(text):
    assert parse_number(text) is None
    assert find_numbers(text) == []


def test_an_unreadable_number_is_still_one():
    assert parse_number("5² 是 25") is None
    assert find_numbers("5² 是 25") == [25]
    assert parse_number("1万零5") is None and parse_number("\\sqrt{9}+5") is None
    assert parse_number("3:2") is None and parse_number("3：2") is None


# fmt: off
DIGITS_OF_UNITS = [
    *(f"72{gap}{unit}" for gap in ("", " ") for unit in ("m2", "m3", "km2", "cm^2", "m^{2}", "m^3", "ft2", "in^2")),
    *(f"72{gap}\\text{{{blank}cm}}^2" for gap in ("", " ", "\\,", "~", "\\ ") for blank in ("", " ")),
    *("$72\\text{ cm}^2$", "72\\text{ cm}^{2}", "72 \\mathrm{~cm}^{2}", "72 \\text{cm$^2$}", "72 $cm^2$", "72 cm$^2$"),
    *("\\boxed{72\\,\\text{cm}^{2}}", "\\boxed{72}\\text{ cm}^2", "\\(72 \\text{ m}^2\\)", "\\[72\\] m^2"),
    *("**72** cm^2", "**72 cm^2**", "72 M2", "72CM^2", "72m2。", "72 m2.", "72 m2, 谢谢", "面积是72m2的"),
    "72 m<sup>2</sup>",
    *("72（cm2）", "72(m^2)", "72 米^2", "72 平方厘米", "72 units^2", "72 inches^2", "72·m^2", "７２m2"),
    *("72 元/m2", "72 元/m^2", "72 \\text{kg}/\\text{m}^3", "72 m/s^2", "72m/s2", "72 m·s^{-2}", "72 m3/h"),
    "72 cm^3/s",
]
# fmt: on


@pytest.mark.parametrize("text", DIGITS_OF_UNITS)
def test_a_digit_of_a_unit_is_no_second_number(text):
    """The power of a unit, in plain text, LaTeX or HTML, leaves the number that has the unit alone."""
    assert find_numbers(text) == [72] and parse_number(text) == 72


def test_a_unit_leaves_sign_multiplier_and_hyphen_as_they_are():
    """A unit with a digit changes nothing about the number before it, nor about the one behind it."""
    assert find_numbers("-3万m2") == [-30000] and find_numbers("1.5 万 m^2") == [15000]
    assert find_numbers("72m2-80m2") == [72, 80] and find_numbers("3m2 或 4m2") == [3, 4]


@pytest.mark.parametrize(
    "text",
    [
        *("72x^2", "72 x2", "72x2", "m^2=72", "x^2=72", "x_1=72", "72克CO2", "H2O 72", "A4纸72张"),  # a factor, a name
        *("72m20", "72m2.5", "72m2,000", "5m3cm", "5m3厘米", "5 m 3", "5米2", "72 m^20"),  # it counts something
    ],
)
def test_a_digit_of_no_unit_is_a_second_number(text):
    """A power that stands on no unit of a number, or digits that count something themselves, are numbers."""
    assert len(find_numbers(text)) == 2 and parse_number(text) is None


# fmt: off
CHANGED = [
    # a root
    *("√9", "√ 9", "√(9)", "√{9}", "√-9", "√.9", "**√9**", "∛8", "2√三", "根号9", "根号下 9", "square root of 9"),
    *("\\sqrt{9}", "\\sqrt9", "\\sqrt 9", "\\sqrt[3]{27}", "$\\sqrt{9}$", "sqrt(9)", "\\sqrt{\\text{9}}", "9√"),
    # a factorial; 9! may also exclaim, which nothing here can tell
    *("9!", "9!!", "9! ", "答案是 9!", "**9**!", "$9$!", "(9)!", "９!", "9!="),
    # π and vulgar fractions
    *("3π", "3 π", "3\\pi", "3 \\pi", "3\\cdot\\pi", "3\\times \\pi", "3×π", "3pi", "3兀", "3(π)", "9π cm^2", "3𝜋"),
    *("π3", "π×3", "π*3", "\\pi \\times 3", "pi * 3", "3 ½", "½ 3", "½×9", "⅟9", "3×½"),
    # a half
    *("3半", "3天半", "3 天 半", "**3**天半", "2个半小时", "3个半", "3小时半", "3平方米半", "3km 半", "3万半", "3倍半"),
    *("3又半", "3 and a half", "3 hours and a half", "3 and one third", "5的一半", "5 米的一半"),
    # a fraction in words
    *("三分之1", "九分之 1", "三分之**1**", "5分之3", "5分之三", "5 分之三", "3分之一", "3又三分之一", "千分之3"),
    "三百分之1",
    # a power or another operation
    *("2^n", "2^{n}", "9^½", "2^半", "(9)²", "（9）²", "|9|³", "3万²", "9̇", "5\\text{²}"),
    *("5的平方", "5的立方", "9的算术平方根", "5的倒数", "5的阶乘", "2的n次方", "5的两倍", "5的三分之一", "-5的绝对值"),
    *("log 9", "\\log 9", "\\ln{9}", "lg9", "log₂8", "\\sin 30^\\circ", "sin(30)", "cos60°", "abs(-5)"),
    *("|-5|", "｜－5｜", "\\left|-5\\right|", "\\lvert -5 \\rvert", "-(-5)"),
    # numerals
    *("3十", "3十万", "十2", "二十3", "3百二", "3百二十", "3千两百", "3万二", "3万一千"),
]
# fmt: on


@pytest.mark.parametrize("text", CHANGED)
def test_what_changes_the_value_makes_it_no_answer(text):
    """The value is another than that of the digits, so that they are neither paid nor found."""
    assert parse_number(text) is None and find_numbers(text) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("9！", 9), ("9 !", 9), ("9 个!", 9), ("9 个！", 9)),  # punctuation
        *(("3 pieces", 3), ("catalog 9", 9), ("π≈3.14", Decimal("3.14")), ("72 (^_^)", 72)),  # words and signs
        *(("72个半圆", 72), ("72元半价", 72), ("半径72", 72), ("20页，一半", 20), ("上半年72天", 72), ("一半是72", 72)),
        *(("百分之72", 72), ("百分之 72", 72), ("14分之后", 14), ("3成", 3), ("3‰", 3), ("3 dozen", 3)),  # units
        *(("72°", 72), ("72º", 72), ("72^\\circ", 72), ("72^{\\circ}C", 72), ("72^{\\text{th}}", 72)),  # degrees
        *(("72平方", 72), ("3的三角形", 3), ("3万两", 30000), ("3万一年", 30000), ("72十分好", 72), ("第3", 3)),
        *(("3多", 3), ("30余人", 30), ("近3万", 30000), ("约3", 3)),  # an estimate names its number
        *(("0.333…", Decimal("0.333")), ("3.14159...", Decimal("3.14159"))),  # dots behind it are none of it
        *(("|72|", 72), ("| -5 |", -5), ("-(72)", -72), ("-（72）", -72), ("-{72}", -72), ("(72)", 72), ("- (72)", 72)),
        *(("√9 = 3", 3), ("3天半是84小时", 84), ("25π≈78.5", Decimal("78.5")), ("72 的\n√9", 72)),
    ],
)
def test_what_changes_nothing_is_read(text, number):
    """What only looks like it leaves the number as it is; beside an unreadable number the others are found."""
    assert find_numbers(text) == [number]


@given(
    sign=st.sampled_from(["", "+", "-", "−", "－", "负", "负 "]),
    currency=st.sampled_from(["", "$", "¥", "￥", "€", "£", "**", "**$"]),
    whole=st.integers(0, 10**9),
    grouping=st.sampled_from(["", ",", "，"]),
    decimals=st.sampled_from(["", ".0", ".5", ".25", "．75"]),
    chain=st.sampled_from(["", "百", "千", "万", "亿", "千万", "百万", " 万", "**万", "万亿"]),
    unit=st.sampled_from(
        ["", "元", " 美元", "千克", " 千米", "人。", "%", "**", "平方米", "cm²", "m2", "\\text{ cm}^2"]
    ),
    wide=st.booleans(),
)
def test_a_written_number_is_read_back(sign, currency, whole, grouping, decimals, chain, unit, wide):
    digits = f"{whole:,}".replace(",", grouping) + decimals
    if wide:
        digits = digits.translate(str.maketrans("0123456789", "０１２３４５６７８９"))
    value = Fraction(f"{whole}{decimals.replace('．', '.')}")
    for character in chain:
        value *= {"百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8}.get(character, 1)
    if sign not in ("", "+"):
        value = -value
    number = parse_number(f"答案是{sign}{currency}{digits}{chain}{unit}")
    assert number is not None and Fraction(number) == value


# --- The answer block ---


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>72</answer>", "72"),
        ("<answer>\n 72 元\n</answer>", "72 元"),
        ("<think>1</think><answer>72</answer> 完", "72"),
        ("<answer></answer>", ""),
        ("", None),  # nothing
        ("72", None),  # no block
        ("<answer>72", None),  # open
        ("72</answer>", None),  # no beginning
        ("</answer>72<answer>", None),  # the wrong way round
        ("<answer>1</answer><answer>2</answer>", None),  # two blocks
        ("<answer>72</answer></answer>", None),  # two ends
        ("<answer><answer>72</answer>", None),  # two beginnings
        ("<Answer>72</Answer>", None),  # other letters
        ("＜answer＞72＜/answer＞", None),  # full-width brackets
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


# --- The formats ---

HARD = [
    "<think>\n想\n</think>\n<answer>\n72\n</answer>",
    "<think>\n想\n\n再想 a < b\n</think>\n<answer>\n72\n元\n</answer>",
    "<think>\r\n想\r\n</think>\r\n<answer>\r\n72\r\n</answer>",
    "\n<think>\n想\n</think>\n<answer>\n72\n</answer>\n\n",
]
SOFT_ONLY = [
    "<think>想</think><answer>72</answer>",  # all on one line
    "<think>想\n再想</think>\n<answer>72</answer>",  # tags share their lines with text
    "<think>\n想\n</think>\n\n<answer>\n72\n</answer>",  # an empty line between the blocks
    "<think>\n想\n</think> <answer>\n72\n</answer>",  # a blank between the blocks, no newline
    "<think>\n想\n</think>\n<answer>72</answer>",  # the answer on the tags' line
    "<think>\n想</think>\n<answer>\n72\n</answer>",  # the end of thinking on a line of text
    "<think>想\n</think>\n<answer>\n72\n</answer>",  # text behind the first tag
    "<think>\n想\n</think>\n<answer>\n72</answer>",  # text before the last tag
    "<think>\n想\n</think>\n<answer>72\n</answer>",  # text behind the third tag
    "<think> \n想\n</think>\n<answer>\n72\n</answer>",  # a blank behind a tag
    "<think>\n想\n </think>\n<answer>\n72\n</answer>",  # a blank before a tag
    " <think>\n想\n</think>\n<answer>\n72\n</answer>",  # a blank before the first tag
    "<think>\n想\n</think>\n<answer>\n72\n</answer> ",  # a blank behind the last tag
    "<think>\r想\r</think>\r<answer>\r72\r</answer>",  # a lone carriage return is no newline
    "<think>\n想\n</think>\n<answer>\n72\n</answer>\u2028",  # nor is this
]
NO_FORMAT = [
    "",  # nothing
    "72",  # no tags
    "<think>\n</think>\n<answer>\n72\n</answer>",  # no reasoning
    "<think>\n　 \n</think>\n<answer>\n72\n</answer>",  # blank reasoning
    "<think>\n想\n</think>\n<answer>\n\n</answer>",  # no answer
    "<think>\n想\n</think>\n<answer>\n72",  # no last tag
    "<think>\n想\n<answer>\n72\n</answer>",  # no end of thinking
    "想\n</think>\n<answer>\n72\n</answer>",  # no beginning
    "<answer>\n72\n</answer>",  # no thinking
    "好的\n<think>\n想\n</think>\n<answer>\n72\n</answer>",  # text before
    "<think>\n想\n</think>\n<answer>\n72\n</answer>\n完",  # text behind
    "<think>\n想\n</think>\n所以\n<answer>\n72\n</answer>",  # text between
    "<answer>\n72\n</answer>\n<think>\n想\n</think>",  # the wrong order
    "<think>\n想\n<answer>\n72\n</think>\n</answer>",  # crossed
    "<think>\n想\n<answer>\n72\n</answer>\n</think>",  # nested
    "<think>\n<think>\n想\n</think>\n<answer>\n72\n</answer>",  # a tag twice
    "<think>\n想\n</think>\n<answer>\n72\n</answer>\n</answer>",  # the last tag twice
    "<think>\n想\n</think>\n<answer>\n72\n</answer>" * 2,  # everything twice
    "<THINK>\n想\n</THINK>\n<ANSWER>\n72\n</ANSWER>",  # other letters
    "\0<think>\n想\n</think>\n<answer>\n72\n</answer>",  # NUL is no blank
]


@pytest.mark.parametrize(
    ("text", "soft", "hard"),
    [(text, 0.5, 0.5) for text in HARD]
    + [(text, 0.5, 0.0) for text in SOFT_ONLY]
    + [(text, 0.0, 0.0) for text in NO_FORMAT],
)
def test_formats(text, soft, hard):
    assert score(soft_format_reward, text) == soft
    assert score(hard_format_reward, text) == hard


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<think>想</think><answer>72</answer>", 0.5),
        ("</answer></think><answer><think>", 0.5),  # in any order
        ("<think>想</think><answer>72", 0.375),  # one missing
        ("<think>想", 0.125),  # three missing
        ("<think><think></think><answer></answer>", 0.375),  # one twice
        ("<answer>1</answer><answer>2</answer>", 0.0),  # both twice
        ("<think ></think\n>", 0.0),  # blanks inside
        ("", 0.0),  # nothing
    ],
)
def test_mark(text, mark):
    assert score(mark_reward, text) == mark


# --- Digit, correctness, labels ---


@pytest.mark.parametrize(
    ("text", "digit", "correctness"),
    [
        (block("72"), 0.5, 2.0),
        ("<answer>72</answer>", 0.5, 2.0),  # the format is paid elsewhere
        (block("73"), 0.5, 0.0),  # wrong
        (block("-72"), 0.5, 0.0),  # wrong sign
        (block("72.5"), 0.5, 0.0),  # near
        (block("七十二"), 0.0, 0.0),  # no digits
        (block("72²"), 0.0, 0.0),  # a power
        (block("36*2=72"), 0.0, 0.0),  # an equation
        (block("72") * 2, 0.0, 0.0),  # two blocks
        ("72", 0.0, 0.0),  # no block
        ("<answer>72", 0.0, 0.0),  # an open block
        ("<think>72</think><answer></answer>", 0.0, 0.0),  # the number is not in the answer
    ],
)
def test_digit_and_correctness(text, digit, correctness):
    assert score(digit_reward, text, answer=[0]) == digit
    assert score(correctness_reward, text, answer=[72]) == correctness


def test_correctness_pairs_completions_with_labels():
    completions = [completion(block(answer)) for answer in ("1", "3", "3")]
    assert correctness_reward(completions, answer=[1, 2, 3], prompts=None) == [2.0, 0.0, 2.0]
    assert correctness_reward([], answer=[]) == []


@pytest.mark.parametrize("label", [72, 72.0, numpy.int64(72), numpy.int8(72), numpy.float32(72), Fraction(72)])
def test_integral_labels_pass(label):
    assert correctness_reward([completion(block("72"))], answer=[label]) == [2.0]


def test_long_labels_are_compared_exactly():
    assert correct(block("1" * 30), int("1" * 30))
    assert not correct(block("1" * 30), int("1" * 30) + 1)
    assert not correct(block("7"), 10**5000)


def test_a_question_without_a_label():
    """What is about its number is None, which is no 0.0; the rest applies to every row."""
    rows = {"completions": [completion(HARD[0])] * 2, "prompts": [[{"role": "user", "content": ""}]] * 2}
    values = {reward.__name__: reward(**rows, answer=[None, 72]) for reward in REWARDS}
    assert values.pop("digit_reward") == [None, 0.5] and values.pop("correctness_reward") == [None, 2.0]
    assert all(unlabelled == labelled > 0 for unlabelled, labelled in values.values())


@pytest.mark.parametrize("label", ["72", True, numpy.True_, 72.5, float("nan"), float("inf"), 1j, [72], b"72"])
def test_bad_labels_raise(label):
    with pytest.raises(ValueError) as error:
        correctness_reward([completion("")] * 3, answer=[1, label, 3])
    assert "label 1 " in str(error.value) and repr(label) in str(error.value)


@pytest.mark.parametrize("labels", [[], [72], [72, 72, 72]])
def test_a_wrong_number_of_labels_raises(labels):
    with pytest.raises(ValueError, match=f"{len(labels)} labels for 2 completions"):
        correctness_reward([completion(block("72"))] * 2, answer=labels)


def test_rewards_and_weights():
    assert [reward.__name__ for reward in REWARDS] == [
        "mark_reward",
        "soft_format_reward",
        "hard_format_reward",
        "digit_reward",
        "correctness_reward",
        "language_reward",
    ]
    best = [score(reward, HARD[0], answer=[72]) for reward in REWARDS]
    assert best == REWARD_MAXIMA == [0.5, 0.5, 0.5, 0.5, 2.0, 1.0]
    *weighted, language = [weight * value for weight, value in zip(REWARD_WEIGHTS, best, strict=True)]
    assert weighted == [0.0, 0.0, 0.0, 0.0, 2.0]  # right answers alone are paid
    assert language == 0  # watched, and paid nothing unless you want it


# --- The language of the thinking ---

QUESTION = "Jasper 卖了 48 个夹子，用了他的 iPhone，一共卖了多少？"


@pytest.mark.parametrize(
    ("thinking", "share"),
    [
        ("五月份卖了一半", 1.0),
        ("五月 sold", 2 / 6),
        ("五月 SOLD половину", 2 / 14),
        ("Jasper 的 iphone 上写着", 1.0),  # words of the question
        ("Jaspers 的", 1 / 8),  # not a word of it
        ("先求 x：\\[ \\frac{48}{2} \\times x = 24 \\text{ 个} \\]，走 3 km", 1.0),  # formulas and units
        ("We first add 48 and 24, which is 72 in total.", 0.0),
        ("48 + 24 = 72", 0.0),
        ("", 0.0),
    ],
)
def test_language(thinking, share):
    for text in (thinking, f"<think>{thinking}</think>", f"<think>\n{thinking}\n</answer>\n<answer>\nwhatever"):
        assert score(language_reward, text, QUESTION) == pytest.approx(share)
    assert chinese_share(thinking, QUESTION) == pytest.approx(share)


def test_thinking_ends_where_the_answer_begins():
    assert thinking_of("<think>\n想\n</think>\n<answer>72</answer>") == thinking_of("想<answer>\n<answer>") == "想"


def test_a_missing_prompt_raises():
    """A question is ours, not the model's text: forgotten, it must not pass in silence."""
    with pytest.raises(ValueError):
        language_reward([completion("想")] * 2, prompts=[[{"role": "user", "content": ""}]])


# --- What goes wrong in common copies of these rewards ---


def test_reasoning_over_several_lines_earns_both_formats():
    text = "<think>\n5分钟\n\n5*60=300\n</think>\n<answer>\n300\n</answer>"
    assert score(soft_format_reward, text) == score(hard_format_reward, text) == 0.5


def test_a_bare_number_earns_nothing():
    assert [score(reward, "72", answer=[72]) for reward in REWARDS] == [0.0] * 6


@pytest.mark.parametrize(("answer", "label"), [("72个", 72), ("1,080", 1080), ("-10", -10), ("42.", 42)])
def test_a_right_answer_need_not_be_the_label_letter_by_letter(answer, label):
    assert correct(block(answer), label)


# --- Any text: never raises, only the named values ---

PIECES = [
    *TAGS,
    *"0123456789７²½٣①,，..．--−–负+$￥*{}百千万亿克分 \n\r\t　三答案",
    *"√π!^|()半天个之又十的",
    *("\\sqrt{", "\\pi", "分之", "m2", "cm^2", "的平方"),
    "\r\n",
    "\\boxed{",
    "\\text{",
]
TEXTS = st.one_of(st.text(), st.text(st.characters()), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
VALUES = [{0.0, 0.125, 0.25, 0.375, 0.5}, {0.0, 0.5}, {0.0, 0.5}, {0.0, 0.5}, {0.0, 2.0}]


def check_values(text: str) -> None:
    for reward, values in zip(REWARDS[:5], VALUES, strict=True):
        value = score(reward, text, answer=[72])
        assert type(value) is float and value in values
    for question in ("", text):
        share = score(language_reward, text, question)
        assert type(share) is float and 0 <= share <= 1


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_text_scores(text):
    check_values(text)
    check_values(block(text))


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_the_rewards_agree_with_each_other(text):
    text = block(text) if "<" not in text else text
    soft, hard = score(soft_format_reward, text), score(hard_format_reward, text)
    assert hard <= soft and (soft == 0.0 or score(mark_reward, text) == 0.5)
    number = parse_number(extract_answer(text) or "")
    assert (score(digit_reward, text, answer=[0]) == 0.5) == (number is not None)
    assert number is None or find_numbers(extract_answer(text)) == [number]


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_numbers_are_finite_and_short(text):
    for number in find_numbers(text):
        assert number.is_finite() and number.adjusted() < 30  # abs() would round to 28 digits
    assert find_numbers(f"{text} 字 ") == find_numbers(text)  # what comes after changes nothing


# --- Long text: work grows with the length, not with its square ---

LONG = {  # what: (beginning, what is repeated, end)
    "digits": ("", "1", ""),
    "decimals": ("1.", "1", ""),
    "points": ("", ".", ""),
    "short decimals": ("", ".1", ""),
    "numbers": ("", "1 ", ""),
    "groups": ("1", ",234", ""),
    "groups, the last one short": ("1", ",234", ",56"),
    "digits and commas": ("", "1,", ""),
    "blanks": ("1", " ", ""),
    "ideographic blanks": ("1", "　", ""),
    "newlines": ("", "\n", ""),
    "carriage returns": ("", "\r", ""),
    "bold": ("1", "*", ""),
    "bold and blanks": ("1", "* ", ""),
    "open boxes": ("1", "\\boxed{", ""),
    "a sign and open boxes": ("-", "\\boxed{", ""),
    "backslashes": ("1", "\\", ""),
    "hyphens": ("", "-", ""),
    "a sign and bold": ("-", "*", ""),
    "signs and currency": ("", "-$", ""),
    "负 and blanks": ("负", " ", ""),
    "many 负": ("", "负 ", ""),
    "hyphens between digits": ("", "1-", ""),
    "multipliers": ("1", "万", ""),
    "multipliers and blanks": ("1", " 万", ""),
    "units": ("1", "千克", ""),
    "superscripts": ("", "5²", ""),
    "begin tags": ("", "<think>", ""),
    "answer tags": ("", "<answer>", ""),
    "end tags": ("", "</answer>", ""),
    "half a tag": ("", "<", ""),
    "no end of thinking": ("<think>", "想 ", ""),
    "blanks between the blocks": ("<think>a</think>", " ", "b<answer>1</answer>"),
    "one foreign word": ("", "a", ""),
    "foreign words": ("", "abc ", ""),
    "commands": ("", "\\frac", ""),
    "NUL": ("", "\0", ""),
    "surrogates": ("", "\ud800", ""),
}


# fmt: off
REPEATED = [
    *("√", "√ ", "√9", "1!", "π", "1π", "1×", "1×π", "\\sqrt", "\\sqrt[", "\\sqrt{", "log(", "root of ", "|-", "-("),
    *("\\left|", "1半", "1天", "天", "半", "1天 ", "分之", "1分之", "百分之", "十", "1十", "1又", "1的", "的一半"),
    *("1百二", "½", "1 ½", "1m", "1m2", "m2", "1/", "1m/", "m/", "1cm^", "1^", "^", "1 米", "1\\text{", "1 and a "),
    *("abc ", "(", "(1", ")", "~", "\\,"),
]
# fmt: on


@pytest.mark.parametrize("repeated", REPEATED)
def test_reading_changed_numbers_is_linear(repeated):
    """Whatever is repeated, behind whatever begins a match, it is read once and not once more from each character."""
    for beginning in ("", "1", "√", "1 km/"):
        text = beginning + repeated * (30_000 // len(repeated))
        start = time.process_time()
        find_numbers(text)
        assert time.process_time() - start < 2  # a tenth of this, or many times as much


@pytest.mark.parametrize(("beginning", "repeated", "end"), LONG.values(), ids=LONG)
def test_work_is_linear(beginning, repeated, end):
    def seconds(length: int) -> float:
        text = beginning + repeated * (length // len(repeated)) + end
        start = time.process_time()
        check_values(text)
        check_values(f"<answer>{text}</answer>")
        return time.process_time() - start

    # Linear code takes a tenth of these times, quadratic code many times as much. The short string goes first, so that
    # slow quadratic code fails there instead of hanging here.
    assert seconds(50_000) < 2
    assert seconds(250_000) < 8


# --- Answers around labels ---


def graded(labels: list[int], answers: list[str]) -> list[float]:
    return correctness_reward([completion(block(answer)) for answer in answers], answer=labels)


def test_gold_answers_grade_themselves_and_a_constant_does_not():
    labels = [0, 3, 18, -10, 540, 1080, 70_000, 2_125, 10**9]
    assert graded(labels, [str(label) for label in labels]) == [2.0] * len(labels)
    assert graded(labels, ["7"] * len(labels)) == [0.0] * len(labels)


def wide(text: str) -> str:
    return text.translate(str.maketrans("0123456789,.-", "０１２３４５６７８９，．－"))


def right_answers(n: int) -> list[str]:
    """Ways to write n that the rules accept, within an answer block."""
    # fmt: off
    plain, grouped, tenths = f"{n}", f"{n:,}", f"{n}.0"
    return [
        *(form for text in (plain, grouped, tenths) for form in (text, wide(text), f" {text} ", f"**{text}**")),
        f"{n}个", f"{n} 美元", f"{grouped} 元", f"{n}千克", f"{n} 千米", f"{n}cm²", f"{n} 平方米", f"{n}百分点",
        f"{n}m2", f"{n} m^2", f"{grouped}\\text{{ cm}}^2", f"${n}\\text{{ cm}}^{{2}}$", f"**{n}** km2", f"{n}（m^3）",
        f"{n}%", f"{wide(plain)}％", f"${n}", f"￥{grouped}", f"US${n}", f"€{n}",
        f"${n}$", f"\\boxed{{{n}}}", f"$\\boxed{{{grouped}}}$", f"\\boxed{{{n}\\text{{ 元}}}}", f"\\text{{{n}}}",
        f"{n}.", f"{n}。", f"{n}，", f"{grouped},", f"...{n}", f"答案：{n}", f"={n}", f"（{n}）",
        f"答案是 {n} 秒。", f"一共有{grouped}人，谢谢。", f"共{wide(grouped)}人", f"**{n}** 个",
        f"The answer is {n} dollars.", f"答えは{n}です。", f"답은 {n}개", f"Ответ: {n}",
        f"- {n}", f"• {n}", f"– {n}", f"{n}\n元", f"+{n}",
        f"{Decimal(n).scaleb(-4):f}万", f"{Decimal(n).scaleb(-4):f} 万元", f"**{Decimal(n).scaleb(-3):f}**千",
        f"{Decimal(n).scaleb(-7):f}千万", f"{Decimal(n).scaleb(-4):f}万千克", f"{Decimal(n).scaleb(-8):f}亿",
    ]  # fmt: on


def wrong_answers(n: int) -> list[str]:
    """Ways to write something else than n, or more than n, or nothing."""
    # fmt: off
    return [
        f"{n + 1}", f"{n - 1}", f"{n + 1:,} 元", f"{n}.5", f"{n}.01", f"1{n}", f"{n}1",
        f"{-n}", f"-${n}", f"负 {n}", f"-**{n}**", f"－{wide(str(n))}", f"−{n}",
        f"{n}万", f"{n} 万元", f"**{n}**千", f"{n}千万", f"{n}百米", f"$ {n} $ 亿",
        f"{n} 或 {n + 1}", f"{n} {n}", f"{n}-{n + 1}", f"第1天卖{n}个", f"{n}小时30分钟", f"1. {n}", f"2024-05-{n}",
        f"5*60={n}", f"{n}/1", f"{n}e0", f"{n}²", f"{n}½", f"{n}₂", f"{n},1", f"1 {n}", f"{n}^1", f"{n}{{,}}000",
        f"√{n}", f"\\sqrt{{{n}}}", f"{n}!", f"{n}π", f"π×{n}", f"{n}天半", f"{n}个半小时", f"三分之{n}", f"{n}分之一",
        f"{n} ½", f"{n}^n", f"({n})²", f"{n}的平方", f"{n}的一半", f"log {n}", f"十{n}", f"{n}十", f"{n}万二",
        "0" * 30 + f"{n}", f"{n}".translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")), "", "三百", "不知道", "many",
    ]  # fmt: on


def broken_blocks(n: int) -> list[str]:
    """Whole completions that hold n, but not in exactly one answer block."""
    return [
        f"{n}",
        f"答案是 {n}",
        f"<think>{n}</think>",
        f"<think>{n}</think><answer></answer>",
        f"<think>a</think><answer>{n}",
        f"<think>a</think>{n}</answer>",
        f"</answer>{n}<answer>",
        f"<answer>{n}</answer><answer>{n}</answer>",
        f"<answer>{n}</answer>" + block(str(n)),
        f"<answer><answer>{n}</answer>",
        f"<Answer>{n}</Answer>",
        f"\\boxed{{{n}}}",
    ]


@pytest.mark.skipif(not MGSM.exists(), reason="the real questions are not here")
def test_audit_on_real_labels():
    lines = MGSM.read_text(encoding="utf-8").splitlines()
    labels = [int(line.split("\t")[1].replace(",", "")) for line in lines]
    assert len(labels) == 250 and 0 not in labels
    assert graded(labels, [line.split("\t")[1] for line in lines]) == [2.0] * 250
    false_rejects = [(n, text) for n in labels for text in right_answers(n) if not correct(block(text), n)]
    false_accepts = [(n, text) for n in labels for text in wrong_answers(n) if correct(block(text), n)]
    false_accepts += [(n, text) for n in labels for text in broken_blocks(n) if correct(text, n)]
    assert false_rejects == []
    assert false_accepts == []


@given(st.integers(-(10**12), 10**12).filter(bool))
@settings(max_examples=50, deadline=None)
def test_audit_on_any_label(n):
    assert correct(block(f"{n:,}"), n) and correct(block(f"**{n}** 元"), n) and correct(block(wide(f"{n:,}.0")), n)
    assert not correct(block(f"{-n}"), n) and not correct(block(f"{n + 1}"), n) and not correct(block(f"{n}万"), n)
