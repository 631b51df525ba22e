"""Completion text -> the number it answers, its format and its thinking. Standard library only.

Model output is untrusted: no text raises, and the work is linear in its length.
"""

import re
from decimal import Decimal
from numbers import Real

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# --- The number grammar ---
# One match of _NUMBER is one number. Behind its digits everything is optional, so that no match is ever taken back
# and tried again one character on: that keeps the search linear.

# Only these read as ASCII; ① ٣ ² are no digits. After this step [0-9] is all that counts, never \d or str.isdigit.
_TO_ASCII = str.maketrans("０１２３４５６７８９，．－＋％−", "0123456789,.-+%-")
_CURRENCY = "$＄£￡¥￥₠-₿"  # the inside of a character class; ₠-₿ is Unicode's block of currency signs
# What may stand in or around a number without changing it: bold, currency, $...$, \$, \boxed{...}, \text{...}.
_MARKUP = r"(?:\\?[*}" + _CURRENCY + r"]|\\(?:boxed|text)\{)"

_MINUS = rf"(?:-{_MARKUP}*|负(?:\s|{_MARKUP})*)"  # -18 -$18 负 18; "- 18" is a list item. A plus changes nothing.
# 1,080: a run of digits and commas is grouped as a whole or not at all, so it is only tried from its beginning.
_GROUPED = r"(?<![0-9],)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])(?:\.[0-9]+)?"
_PLAIN = r"[0-9]+(?:\.[0-9]+)?"  # 72 3.50; the full stop of "42." stays outside
# .5 at the start or behind a blank, sign, currency sign, bracket or bold; the dots of "是...18" are no point.
_POINT = r"(?<![^\s+\-负*(\[{（［｛【「『《〈" + _CURRENCY + r"])\.[0-9]+"
_SCRIPT = rf"{_MARKUP}*[²³¹⁰-ₜ¼½¾⅐-⅟↉]"  # 5² and 1½ are neither 5 nor 1
_UNIT = "[克米瓦卡焦赫帕伏升]|字节|比特"  # 千克 is a unit and multiplies nothing
_MULTIPLIER = rf"(?:\s|{_MARKUP})*(?:百(?!分)|千(?!{_UNIT})|万|亿)"
_HYPHEN = rf"{_MARKUP}*-"  # 10-20: read with the 10, so that it is no sign of the 20

_NUMBER = re.compile(
    rf"(?P<minus>{_MINUS})?(?P<digits>{_GROUPED}|{_PLAIN}|{_POINT})"
    rf"(?P<script>{_SCRIPT})?(?P<multipliers>(?:{_MULTIPLIER})*)(?:{_HYPHEN})?"
)
_POWERS_OF_TEN = {"百": 2, "千": 3, "万": 4, "亿": 8}
_MAX_DIGITS = 30  # no honest answer is longer, and arithmetic on a million digits takes minutes


def _read_numbers(text: str) -> list[Decimal | None]:
    """Every number in the text, in order; None stands for one that cannot be an answer (5², 1½, over 30 digits)."""
    numbers: list[Decimal | None] = []
    for match in _NUMBER.finditer(text.translate(_TO_ASCII)):
        digits = match["digits"].replace(",", "")
        if match["script"] or len(digits.replace(".", "")) > _MAX_DIGITS:
            numbers.append(None)
            continue
        power = sum(_POWERS_OF_TEN.get(character, 0) for character in match["multipliers"])
        # Built from text, because Decimal arithmetic would round to 28 digits.
        number = Decimal(f"{'-' if match['minus'] else ''}{digits}E{power}")
        numbers.append(number if number.adjusted() < _MAX_DIGITS else None)
    return numbers


def find_numbers(text: str) -> list[Decimal]:
    """Every readable number in the text, in order: `5分钟是300秒` gives [5, 300]; `5²` and `1½` give none."""
    return [number for number in _read_numbers(text) if number is not None]


def parse_number(text: str) -> Decimal | None:
    """The one number in the text; None where there is none, more than one, or one that cannot be read (`5²`).

    The Decimal is exact and compares by value; `3万` equals 30000 but prints as 3E+4 unless formatted with `:f`.
    """
    numbers = _read_numbers(text)
    return numbers[0] if len(numbers) == 1 else None


def extract_answer(text: str) -> str | None:
    """The stripped text of the one answer block; None where there is no block, a second one or an open one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside, end, _ = text.partition("<answer>")[2].partition("</answer>")
    return inside.strip() if end else None


def answered_number(text: str) -> Decimal | None:
    """The one number of the one answer block; None where there is no such block or not one number in it."""
    answer = extract_answer(text)
    return None if answer is None else parse_number(answer)


def is_soft_format(text: str) -> bool:
    # Counting and cutting at the tags: a pattern with .*? between them would go quadratic on a missing tag.
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
_FOREIGN = re.compile(r"[^\W\d_㐀-鿿]{3,}")  # a word of another language; x and km are none
_COMMAND = re.compile(r"\\[A-Za-z]+")  # \frac and \times are no words


def thinking_of(text: str) -> str:
    """What stands before the answer block, without any tags."""
    text = text.partition("<answer>")[0]
    for tag in TAGS:
        text = text.replace(tag, "")
    return text.strip()


def chinese_share(thinking: str, question: str) -> float:
    """Chinese characters over these and the letters of foreign words, but for the words of the question."""
    known = set(_FOREIGN.findall(question.lower()))
    words = [word for word in _FOREIGN.findall(_COMMAND.sub(" ", thinking).lower()) if word not in known]
    chinese = len(_CHINESE.findall(thinking))
    letters = chinese + sum(map(len, words))
    return chinese / letters if letters else 0.0


def is_label(value: object) -> bool:
    """An integral number: an integer, or the float that a reader makes of it where another row is empty."""
    return isinstance(value, Real) and not isinstance(value, bool) and value % 1 == 0  # NaN and inf leave NaN
