"""Brings an answer into plain LaTeX: one sign for each thing, no spacing commands, no typefaces, no digit groups by spaces."""

from __future__ import annotations

import re
import unicodedata

MINUS_SIGNS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_SIGNS = str.maketrans(
    {
        **{chr(code): "-" for code in MINUS_SIGNS},
        "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "∶": ":",
        "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ",
        "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "∞": r"\infty ",
        "±": r"\pm ", "∓": r"\mp ", "π": r"\pi ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "º": r"^\circ ", "ℯ": "e",
        "⟨": r"\langle ", "⟩": r"\rangle ", "｜": "|", "∣": "|", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
        "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∧": r"\land ", "∨": r"\lor ",
        "€": r"\text{ euro }", "£": r"\text{ pound }", "¥": r"\text{ yen }", "₹": r"\text{ rupee }", "¢": r"\text{ cent }",
        "（": "(", "）": ")", "，": ",", "。": ".", "：": ":", "；": ";", "［": "[", "］": "]", "％": "%", "＝": "=",
        "＋": "+", "＜": "<", "＞": ">", "．": ".", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ",
        "ε": r"\epsilon ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ",
        "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ", "\ufeff": "", "\u200b": "",
        "\u2061": "", "\u2062": "", "\u2060": "",
    }
)  # fmt: skip
_FULL_DIGITS = {ord("０") + n: str(n) for n in range(10)}
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))?")
_DEGREES = {"√": "", "∛": "[3]", "∜": "[4]"}

_THOUSANDS = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:\{,\}|\{\\,\}|,\\!\s*|\\[,;:! ]|~|[ \u2009\u202f\u00a0])\d{3})+)(?!\d|\s*[/\\]?frac)"
)
_LONG_GROUPS = re.compile(r"(?<=\d)\{,\}(?=\d{3})")
_SIZES = re.compile(
    r"\\(?:[mM]?(?:left|right|middle)(?![A-Za-z])\.?|(?:big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])|displaystyle(?![A-Za-z])|"
    r"textstyle(?![A-Za-z])|limits(?![A-Za-z])|nolimits(?![A-Za-z])|rm(?![A-Za-z])|bf(?![A-Za-z])|it(?![A-Za-z]))"
)
_SPACING = re.compile(
    r"(\\\\)|\\(?:[,;:!> ]|q?quad(?![A-Za-z])|enspace|thinspace|medspace|thickspace|hfill|[hv]space\*?\s*\{[^{}]*\})|~"
)
_FACES = re.compile(
    r"\\(?:math(?:rm|bf|it|sf|tt|normal|frak)|boldsymbol|bm|operatorname\*?|pmb|textcolor\s*\{\w+\}|color\s*\{\w+\}|"
    r"underline|boxed|fbox)\s*\{([^{}]*)\}"
)
_TEXTS = re.compile(r"\\(?:textnormal|textbf|textit|textrm|textsf|texttt|mbox|hbox|textup|emph)(?=\s*\{)")
_NAMES = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:neq|not\s*=)(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"=="), "="),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\(?:approxeq|simeq|sim)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\\equiv(?![A-Za-z])"), "="),
    (re.compile(r"\(?\\(?:pmod|bmod|mod)\s*\{?\s*(\d+)\s*\}?\)?"), r"\\text{ mod \1 }"),
    (re.compile(r"(?<=\d)\s*\^\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?"), ""),
    (re.compile(r"\A\s*\\approx(?![A-Za-z])"), ""),
    (re.compile(r"\\pounds(?![A-Za-z])"), r"\\text{ pound }"),
    (re.compile(r"\\euro(?![A-Za-z])"), r"\\text{ euro }"),
    (re.compile(r"\\(?:arccos|acos)(?![A-Za-z])"), r"\\arccos "),
    (re.compile(r"\\setminus|\\backslash(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), r"\\text{ and }"),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), r"\\text{ or }"),
    (re.compile(r"\\(?:R|Reals|reals)(?![A-Za-z])"), r"\\mathbb{R}"),
]
_ASIDE = re.compile(
    r"\A\s*(?:\\text\s*\{\s*)?(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?"
    r"answer\s*(?:is|:)\s*:?\s*(?:(?<=[\s:])\})?\s*",
    re.IGNORECASE,
)
_TEMPERATURE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\text\s*\{\s*)?([CF])\b\s*\}?")
_SPEED = re.compile(r"(?<=\d)\s*((?:k?m|ft|mi|cm)/(?:s|h|hr|sec|min)(?:\^\{?2\}?)?)(?![A-Za-z])")
_CURRENCY = re.compile(r"\\\$")
_WORD_IN_FACE = re.compile(r"[A-Za-z]{2}|[a-zA-Z]+[\s.]")


def plain_signs(text: str) -> str:
    """The text with one character for each sign: minus signs, digits, spaces, raised numbers, roots and fractions."""
    text = text.translate(_FULL_DIGITS)
    if text.isascii():
        return text
    text = _VULGAR.sub(_vulgar, text)
    text = _RAISED.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("\u2212", "-") + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{_DEGREES[m[1]]}" + (f"{{{m[2] or m[3]}}}" if m[2] or m[3] else ""), text)
    return text.translate(_SIGNS)


def clean(text: str) -> str:
    r"""An answer in plain LaTeX. Typefaces go, but never what they hold: \mathrm{e} is e, \mathrm{cm} is \text{cm}."""
    text = text.strip()
    text = _THOUSANDS.sub(lambda m: m[1] + re.sub(r"[^\d]", "", m[2]), text)
    text = _LONG_GROUPS.sub("", text)
    text = _SPACES.sub(" ", plain_signs(text))
    text = _CURRENCY.sub(r"\\text{ dollar }", text).replace("$", " ")
    text = re.sub(
        r"\\[()\[\]]",
        " ",
        re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
        if "matrix" not in text and "array" not in text and "cases" not in text
        else text,
    )
    text = _SPACING.sub(lambda m: m[1] or " ", _SIZES.sub("", text))
    text = _TEXTS.sub(r"\\text", text)
    for _ in range(4):
        text, changed = _FACES.subn(_without_face, text)
        if not changed:
            break
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    text = _SPEED.sub(r"\\text{ \1 }", _TEMPERATURE.sub(lambda m: rf"\text{{ deg {m[1]} }}", text))
    text = text.replace("**", " ").replace("`", " ") if "**" in text or "`" in text else text
    text = _ASIDE.sub("", text).strip()
    return re.sub(r"(?:\s|(?<!\\)[.,;:]|\\\\)+\Z", "", text)


def _vulgar(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _without_face(match: re.Match[str]) -> str:
    content = match[1]
    if "mathbb" in match[0]:
        return match[0]
    if re.match(r"\\operatorname", match[0]):
        return rf"\{content.strip()} " if content.strip().isalpha() else content
    if re.match(r"\\(?:boxed|fbox|underline|textcolor|color)", match[0]) or not _WORD_IN_FACE.search(content):
        return f" {content} " if content[:1].isalnum() and len(content) > 1 else (content or " ")
    return rf"\text{{{content}}}"
