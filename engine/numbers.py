"""Completion text -> the number it answers, its format and its thinking. Standard library only.

Model output is untrusted: no text raises, and the work is linear in its length.
"""

import re
from decimal import Decimal
from numbers import Real

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# --- The number grammar ---
# One match of _NUMBER is one number. Everything behind its digits is optional, so that no match is ever taken back and
# tried again one character later. This keeps the search linear; so do `*+`, which gives nothing back, and the limits on
# the lengths of words.


def _any(*patterns: str) -> str:
    return f"(?:{'|'.join(patterns)})"


# Only these characters become ASCII: ① ٣ ² are no digits. After this step [0-9] are all digits that there are.
_TO_ASCII = str.maketrans("０１２３４５６７８９，．－＋％−", "0123456789,.-+%-")

# What may stand in or around a number without changing it: **3** $3$ \$3 \boxed{3} \text{3}
_CURRENCY = "$＄£￡¥￥₠-₿"  # inside of [ ]; ₠-₿ is Unicode's block of currency signs
_MARKUP = r"(?:\\?[*}" + _CURRENCY + r"]|\\(?:boxed|(?:text|math)(?:rm|bf)?)\{)"
_OPEN = r"[(（\[{]"
_GAP = rf"(?:[^\S\n]|{_MARKUP}|{_OPEN}|[)）\]|×·⋅~]|\\[,;: ()\[\]]|\\times|\\cdot)*+"  # up to what belongs to it

# The digits. 1,080 is grouped as a whole or not at all, so it is only tried from its beginning. The full stop of "42."
# does not belong to the number. A point before the digits counts only behind certain characters: .5 but not 是...18
_GROUPED = r"(?<![0-9],)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])(?:\.[0-9]+)?"
_PLAIN = r"[0-9]+(?:\.[0-9]+)?"
_POINT = r"(?<![^\s+\-负*(\[{（［｛【「『《〈" + _CURRENCY + r"])\.[0-9]+"
_DIGITS = _any(_GROUPED, _PLAIN, _POINT)

# The sign before them: -18 -$18 -(18) 负 18, but "- 18" is a list item. A plus changes nothing.
_MINUS = rf"(?:-(?:{_MARKUP}|{_OPEN})*|负(?:\s|{_MARKUP})*)"

# The multipliers behind them: 3万 3千万, but 百分点 and 千克 are units
_UNIT = "[克米瓦卡焦赫帕伏升]|字节|比特"
_MULTIPLIERS = rf"(?:(?:\s|{_MARKUP})*(?:百(?!分)|千(?!{_UNIT})|万|亿))*"
_POWERS_OF_TEN = {"百": 2, "千": 3, "万": 4, "亿": 8}

# What changes the value of the number beside it makes it unreadable. Words of estimation (约 近 多 余) do not.
_SCRIPTS, _FRACTIONS = "²³¹⁰-ₜ", "¼½¾⅐-⅟↉"
_NUMERALS = "零〇一二两三四五六七八九十"

_SYMBOL = f"[√∛∜π𝜋兀{_FRACTIONS}]|根号下?"  # √9 π×9 ½×9
_DENOMINATOR = f"分之(?:(?<!百分之)|(?<=[0-9{_NUMERALS}]百分之))"  # 三分之1 三百分之1, but not 百分之50
# \sqrt[3]{27} \pi*3 log 9 root of 9
_NAME = _any(r"sqrt(?:\[[^]]{0,9}\])?", *"pi log ln lg sin cos tan cot exp abs".split(), "root of")
_FUNCTION = rf"(?=[\\a-z])(?<![A-Za-z])\\?{_NAME}(?![A-Za-z])"
_ABSOLUTE = r"(?:[|｜∣]|(?:\\left\||\\l?vert)\s?|-[(（{])(?=[-负])"  # |-5| -(-5), but | -5 | is a cell of a table
_OPERATOR = _any(_SYMBOL, _DENOMINATOR, _FUNCTION) + rf"[{_SCRIPTS}]*+{_GAP}\.?"
_BEFORE = _any(_OPERATOR, "[十拾]", _ABSOLUTE)

# 5² (9)³ 2^n, but 72^\circ is 72. 9! is a factorial, while 9 ! and a full-width ！ only exclaim.
_POWER = rf"(?<![\s(（\[])(?:[{_SCRIPTS}\u0300-\u036f!]|\^(?!\W{{0,3}}(?:[0-9oº]|circ|text|th)|\W?[°∘]))"
_FACTOR = rf"[π𝜋兀{_FRACTIONS}]|\\?pi(?![A-Za-z])|(?=[√∛∜]|\\sqrt|根号)"  # 3π 1 ½ 3√2
_FRACTION = rf"(?=分之\s?[0-9{_NUMERALS}])|又\s?[半{_NUMERALS}{_FRACTIONS}]"  # 5分之三 3又三分之一, not 14分之后
_AND_A_HALF = "(?:[A-Za-z]{1,9} )?and a half|and (?:a|one) (?:half|third|quarter)"  # 3 hours and a half
# Up to three characters of a unit, and then 3天半 2个半小时 (but 6个半圆 is 6) 5米的一半 5的两倍 5的平方 2的n次方
_NOUN = rf"(?:(?:(?![半一的上下前后大过多各减另])[㐀-鿿A-Za-z]){{1,3}}{_GAP})?"
_HALF = "半(?![径圆球价夜成满])"
_TIMES, _NTH_POWER = f"[{_NUMERALS}百]{{1,4}}[倍分]", ".{1,3}次[方幂]"
_OPERATION = _any("一半", _TIMES, "(?:算术)?[平立]方(?!米)", "倒数", "阶乘", "相反数", "绝对值", _NTH_POWER)
_NUMERAL = "(?<=[0-9])[十拾](?!分)|(?<=[百千万亿])(?:[零〇二三四五六七八九]|[一两][十百千])"  # 3十 3百二, not 3万两
_BEHIND = _any(_POWER, _FACTOR, _FRACTION, _AND_A_HALF, _NOUN + _any(_HALF, f"的{_OPERATION}"), _NUMERAL)

# The power of a unit is no second number: 72 m2, 72 cm^{2}, 72\text{ cm}^2, 72（米^2）, 9.8 m/s^2. Without ^ the next
# character must not make it count something: 5m3cm, 72m2.5.
_LENGTH = r"[kdhcm]?m|ft|in|yd|(?<=/)s"
_WORD_OF_LENGTH = r"feet|inch(?:es)?|yards?|miles?|(?:centi|kilo)?met(?:er|re)s?|units?|s|[㐀-鿿]{0,3}[米尺里]"
_UNIT_POWER = (
    rf"(?i:(?:[a-z㐀-鿿]{{1,6}}{_MARKUP}*+[/·]{_MARKUP}*+)?(?:(?:{_LENGTH})[23](?![a-z米分厘毫])"
    rf"|(?:{_LENGTH}|{_WORD_OF_LENGTH}){_MARKUP}*+\s?(?:\^|<sup>)\s?\{{?-?[1-4])(?![,.]?[0-9]))"
)

# In 10-20 the hyphen belongs to the 10, so that it is no sign of the 20.
_HYPHEN = rf"(?:{_MARKUP}*-)"

_NUMBER = re.compile(
    rf"(?P<before>{_BEFORE})?(?P<minus>{_MINUS})?(?P<digits>{_DIGITS})(?P<multipliers>{_MULTIPLIERS})"
    rf"(?:{_GAP}(?P<behind>{_BEHIND}))?(?:{_GAP}{_UNIT_POWER})?{_HYPHEN}?"
)
_MAX_DIGITS = 30  # no honest answer is longer, and arithmetic on a million digits takes minutes


def _read_numbers(text: str) -> list[Decimal | None]:
    """Every number in the text, in order; None for one that cannot be read (5², √9, more than 30 digits)."""
    numbers: list[Decimal | None] = []
    for match in _NUMBER.finditer(text.translate(_TO_ASCII)):
        digits = match["digits"].replace(",", "")
        changed = match["before"] is not None or match["behind"] is not None
        if changed or len(digits.replace(".", "")) > _MAX_DIGITS:
            numbers.append(None)
            continue
        power = sum(_POWERS_OF_TEN.get(character, 0) for character in match["multipliers"])
        # Built from text, because Decimal arithmetic would round to 28 digits.
        number = Decimal(f"{'-' if match['minus'] else ''}{digits}E{power}")
        numbers.append(number if number.adjusted() < _MAX_DIGITS else None)
    return numbers


def find_numbers(text: str) -> list[Decimal]:
    """Every readable number in the text, in order: `5分钟是300秒` gives [5, 300]; `5²` and `√9` give none."""
    return [number for number in _read_numbers(text) if number is not None]


def parse_number(text: str) -> Decimal | None:
    """The one number in the text; None if there is no number, more than one, or one that cannot be read (`5²`).

    The Decimal is exact and compares by value; `3万` equals 30000 but prints as 3E+4 unless formatted with `:f`.
    """
    numbers = _read_numbers(text)
    return numbers[0] if len(numbers) == 1 else None


def extract_answer(text: str) -> str | None:
    """The stripped text of the one answer block; None if there is no block, a second one, or one that is not closed."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside, end, _ = text.partition("<answer>")[2].partition("</answer>")
    return inside.strip() if end else None


def answered_number(text: str) -> Decimal | None:
    """The one number of the one answer block; None if there is no such block or number."""
    answer = extract_answer(text)
    return None if answer is None else parse_number(answer)


def is_soft_format(text: str) -> bool:
    # The tags are counted and cut off, because a pattern with .*? would take quadratic time if a tag is missing.
    text = text.strip()
    if any(text.count(tag) != 1 for tag in TAGS) or not text.startswith("<think>") or not text.endswith("</answer>"):
        return False
    reasoning, _, rest = text.removeprefix("<think>").removesuffix("</answer>").partition("</think>")
    between, _, answer = rest.partition("<answer>")
    return bool(reasoning.strip()) and not between.strip() and bool(answer.strip())


def is_hard_format(text: str) -> bool:
    text = text.replace("\r\n", "\n")
    lines = set(text.split("\n"))
    return is_soft_format(text) and lines.issuperset(TAGS) and "</think>\n<answer>" in text


# --- The language of the thinking ---

_CHINESE = re.compile("[㐀-鿿]")
_FOREIGN = re.compile(r"[^\W\d_㐀-鿿]{3,}")  # a word of another language, but not x or km
_COMMAND = re.compile(r"\\[A-Za-z]+")  # LaTeX's, such as \frac and \times, are no words


def thinking_of(text: str) -> str:
    """The text before the answer block, without tags."""
    text = text.partition("<answer>")[0]
    for tag in TAGS:
        text = text.replace(tag, "")
    return text.strip()


def chinese_share(thinking: str, question: str) -> float:
    """The share of Chinese characters among these and the letters of foreign words that are not in the question."""
    known = set(_FOREIGN.findall(question.lower()))
    words = [word for word in _FOREIGN.findall(_COMMAND.sub(" ", thinking).lower()) if word not in known]
    chinese = len(_CHINESE.findall(thinking))
    letters = chinese + sum(map(len, words))
    return chinese / letters if letters else 0.0


def is_label(value: object) -> bool:
    """Whether a value is an integer, or the float that a reader makes of one if another row has no label."""
    return isinstance(value, Real) and not isinstance(value, bool) and value % 1 == 0  # NaN % 1 and inf % 1 are NaN
