"""Reads one expression: numbers, letters, fractions, roots, powers, functions. A Pratt parser that looks at each token once."""

from __future__ import annotations

from fractions import Fraction

from rlpost.answers.tokens import DEEPEST, OPENING, UNARY, Token, Tokens, flat, match_of
from rlpost.answers.tree import (
    Call,
    Constant,
    Expression,
    Number,
    Power,
    Product,
    Quotient,
    Sum,
    Symbol,
    Unreadable,
)

_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
    ]
)
_ACCENTS = frozenset(
    [
        "overline",
        "bar",
        "vec",
        "hat",
        "widehat",
        "tilde",
        "widetilde",
        "dot",
        "overrightarrow",
        "mathbb",
        "mathcal",
        "mathscr",
        "mathbf",
    ]
)
_SAME = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "gcd": "gcd", "lcm": "lcm"}
_LARGEST_EXPONENT = 5000  # of scientific notation
_FUNCTION_LETTERS = frozenset("fgFG")
_ZERO_WIDTH = (r"\limits", r"\nolimits")


def read_expression(tokens: Tokens) -> Expression:
    """Reads all of the tokens as one expression.

    Raises:
        Unreadable: they are none.
    """
    reader = _Reader([token for token in tokens if token.text not in _ZERO_WIDTH])
    expression = reader.sum()
    if reader.place < len(reader.tokens):
        raise Unreadable(f"{reader.tokens[reader.place].text!r} was not expected")
    return expression


def number_from(text: str) -> Number:
    """The exact value of a numeral such as 12, .5, 1.20 or 1.2e-5.

    Raises:
        Unreadable: its exponent is too large.
    """
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > _LARGEST_EXPONENT:
        raise Unreadable("exponent")
    places = len(mantissa.partition(".")[2]) if "." in mantissa and not exponent else None
    return Number(
        Fraction(mantissa if mantissa[0] != "." else "0" + mantissa) * Fraction(10) ** int(exponent or 0), places
    )


class _Reader:
    def __init__(self, tokens: list[Token], depth: int = 0) -> None:
        if depth > DEEPEST:
            raise Unreadable("too deep")
        self.tokens = tokens
        self.place = 0
        self.depth = depth
        self.bars = 0  # how many | are open

    def peek(self, ahead: int = 0) -> Token:
        at = self.place + ahead
        return self.tokens[at] if at < len(self.tokens) else Token("end", "")

    def take(self) -> Token:
        token = self.peek()
        self.place += 1
        return token

    def inner(self, tokens: Tokens) -> Expression:
        reader = _Reader(list(tokens), self.depth + 1)
        expression = reader.sum()
        if reader.place < len(reader.tokens):
            raise Unreadable(f"{reader.tokens[reader.place].text!r} was not expected")
        return expression

    def sum(self) -> Expression:
        terms: list[Expression] = []
        sign = self._sign()
        while True:
            term = self.product()
            terms.append(negative(term) if sign < 0 else term)
            if not self.peek().is_mark("+", "-"):
                return terms[0] if len(terms) == 1 else Sum(tuple(terms))
            sign = self._sign()

    def _sign(self) -> int:
        sign = 1
        while self.peek().is_mark("+", "-"):
            sign *= -1 if self.take().text == "-" else 1
        return sign

    def product(self) -> Expression:
        """Factors with and without signs between them. a/bc is refused, since it means one thing or the other."""
        result = self.power()
        divided = False
        while True:
            token = self.peek()
            if token.is_mark("*", r"\cdot", r"\times", r"\ast") or (token.text == "x" and self._is_times()):
                self.take()
                factor = self._signed_power()
                result, divided = multiply(result, factor), False
            elif token.is_mark("/", r"\div"):
                self.take()
                below = self._signed_power()
                result, divided = Quotient(result, below), True
            elif self._begins_factor():
                if divided and not (self.tokens[self.place - 1].kind == "number" and token.text in (r"\pi", r"\sqrt")):
                    raise Unreadable("a quotient followed by a factor")
                before = self.tokens[self.place - 1]
                mixed = self._mixed(result, before)
                result = mixed if mixed is not None else multiply(result, self._implicit(before))
            else:
                return result

    def _is_times(self) -> bool:
        return (
            self.place > 0
            and self.tokens[self.place - 1].kind == "number"
            and self.peek(1).text == "10"
            and self.peek(2).text == "^"
        )

    def _signed_power(self) -> Expression:
        return negative(self.power()) if self._sign() < 0 else self.power()

    def _begins_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "letter"):
            return True
        if token.kind == "mark":
            return token.text in "([{" or (token.text == "|" and self.bars == 0)
        if token.kind != "command":
            return False
        name = token.text[1:]
        return name in _GREEK | _ACCENTS | UNARY or name in (
            "frac", "sqrt", "pi", "log", "binom", "lfloor", "lceil", "infty", "imath", "gcd", "lcm", "min", "max",
        )  # fmt: skip

    def _implicit(self, before: Token) -> Expression:
        """A factor without a sign before it. Two numerals in a row are no product."""
        if self.peek().kind == "number" and before.kind == "number":
            raise Unreadable("two numbers in a row")
        if self.peek().kind == "number" and before.text not in (")", "}", "]"):
            raise Unreadable("a number behind a letter")
        return self.power()

    def _mixed(self, whole: Expression, before: Token) -> Expression | None:
        r"""The proper fraction behind a whole number: 1\frac{1}{2} and 1 1/2 are 3/2."""
        if before.kind != "number" or not isinstance(whole, Number) or whole.places is not None:
            return None
        start = self.place
        if self.peek().text == r"\frac":
            part = self.power()
        elif self.peek().kind == "number" and self.peek(1).text == "/" and self.peek(2).kind == "number":
            part = Quotient(number_from(self.take().text), (self.take(), number_from(self.take().text))[1])
            if self._begins_factor():
                raise Unreadable("a mixed number followed by a factor")
        else:
            return None
        if isinstance(part, Quotient) and isinstance(part.above, Number) and isinstance(part.below, Number):
            above, below = part.above.value, part.below.value
            if 0 < above < below and above.denominator == below.denominator == 1 and whole.value.denominator == 1:
                return Number(whole.value + above / below)
        self.place = start
        return None

    def power(self) -> Expression:
        base = self.atom()
        while True:
            token = self.peek()
            if token.text == "!" and token.kind == "mark":
                self.take()
                if self.peek().text == "!":
                    raise Unreadable("double factorial")
                base = Call("factorial", (base,))
            elif token.text == "^" and token.kind == "mark":
                self.take()
                if self.peek().text == r"\circ" or (self.peek().text == "{" and self.peek(1).text == r"\circ"):
                    self.place = match_of(self.tokens, self.place) + 1 if self.peek().text == "{" else self.place + 1
                    base = multiply(base, Quotient(Constant("pi"), Number(Fraction(180))))
                else:
                    base = Power(base, self.exponent())
            elif token.text in ("%", r"\%"):
                self.take()
                base = Quotient(base, Number(Fraction(100)))
            else:
                return base

    def exponent(self) -> Expression:
        """What is raised: braces, brackets, one digit or letter, or a signed number as people write it (2^-3, 2^10)."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        if self.peek().is_mark("-", "+"):
            return negative(self.exponent()) if self.take().text == "-" else self.exponent()
        token = self.peek()
        atom = self.atom()
        if token.text != "{" and self.peek().text == "^":  # 2^3^4, which LaTeX refuses, is 2^(3^4)
            self.take()
            return Power(atom, self.exponent())
        return atom

    def atom(self) -> Expression:
        token = self.take()
        if token.kind == "number":
            return self._numeral(token)
        if token.kind == "letter":
            return self._letter(token.text)
        if token.kind == "mark" and token.text in "([{":
            self.place -= 1
            return self._group()
        if token.kind == "mark" and token.text == "|":
            return self._bars()
        if token.kind == "command":
            return self._command(token.text[1:])
        raise Unreadable(f"{token.text!r} is no expression")

    def _numeral(self, token: Token) -> Expression:
        number = number_from(token.text)
        if self.peek().text in (r"\overline", r"\dot", r"\bar") and "." in token.text + self.peek(-2).text:
            return self._repeating(token.text)
        if self.peek().text == "_":
            raise Unreadable("a subscript on a number")
        return number

    def _repeating(self, digits: str) -> Expression:
        r"""0.1\overline{6} is 1/6."""
        self.take()
        content = flat(self._argument()).replace(" ", "")
        if not content.isdigit() or self.peek().kind == "number":
            raise Unreadable("repeating decimal")
        places = len(digits.partition(".")[2])
        return Number(Fraction(digits) + Fraction(int(content), 10**places * (10 ** len(content) - 1)))

    def _group(self) -> Expression:
        end = match_of(self.tokens, self.place)
        opening, closing = self.tokens[self.place].text, self.tokens[end].text
        if OPENING[opening] != closing:
            raise Unreadable("brackets of two kinds")
        inside = self.tokens[self.place + 1 : end]
        self.place = end + 1
        for at, token in enumerate(inside):
            if token.text == r"\choose":
                return Call("binom", (self.inner(inside[:at]), self.inner(inside[at + 1 :])))
        return self.inner(inside)

    def _bars(self) -> Expression:
        self.bars += 1
        inside = self.sum()
        if self.take().text != "|":
            raise Unreadable("a bar is not closed")
        self.bars -= 1
        return Call("abs", (inside,))

    def _argument(self) -> list[Token]:
        r"""The tokens of a command's argument: what is in braces, or one digit, letter or command (\frac12)."""
        token = self.peek()
        if token.text == "{":
            end = match_of(self.tokens, self.place)
            inside = self.tokens[self.place + 1 : end]
            self.place = end + 1
            return inside
        if token.kind == "number" and len(token.text) > 1 and "." not in token.text:
            self.tokens[self.place] = Token("number", token.text[1:])
            return [Token("number", token.text[0])]
        if token.kind in ("number", "letter") or token.text in (r"\pi",):
            return [self.take()]
        raise Unreadable("an argument is missing")

    def _letter(self, name: str) -> Expression:
        if name == "e" and self.peek().text not in ("_", "'"):
            return Constant("e")
        if name == "i" and self.peek().text not in ("_", "'"):
            return Constant("i")
        return self._named(name)

    def _named(self, name: str) -> Expression:
        while True:
            if self.peek().text == "'":
                name += self.take().text
            elif self.peek().text == "_":
                self.take()
                if self.peek().kind == "number" and len(self.peek().text) > 1 and self.peek(-1).text == "_":
                    name += "_" + self.take().text
                else:
                    name += "_" + flat(self._argument())
            else:
                break
        if (
            name[0] in _FUNCTION_LETTERS
            and self.peek().text == "("
            and (len(name) > 1 or self.peek(1).kind in ("letter", "number"))
        ):
            end = match_of(self.tokens, self.place)
            inside = self.tokens[self.place + 1 : end]
            self.place = end + 1
            return Call("of " + name, (self.inner(inside),))
        return Symbol(name)

    def _command(self, name: str) -> Expression:
        if name in _GREEK:
            return self._named(name)
        if name in ("pi", "infty", "imath"):
            return Constant({"pi": "pi", "infty": "oo", "imath": "i"}[name])
        if name in _ACCENTS:
            return self._named(f"{name} {flat(self._argument())}")
        if name == "frac":
            above = self.inner(self._argument())
            return Quotient(above, self.inner(self._argument()))
        if name == "binom":
            above = self.inner(self._argument())
            return Call("binom", (above, self.inner(self._argument())))
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            self.place -= 1
            end = match_of(self.tokens, self.place)
            inside = self.inner(self.tokens[self.place + 1 : end])
            self.place = end + 1
            return Call("floor" if name == "lfloor" else "ceil", (inside,))
        if name in UNARY or name == "log":
            return self._function(_SAME.get(name, name))
        raise Unreadable(f"the command {name}")

    def _root(self) -> Expression:
        degree: Expression = Number(Fraction(2))
        if self.peek().text == "[":
            end = match_of(self.tokens, self.place)
            if self.tokens[end].text != "]":
                raise Unreadable("root")
            degree = self.inner(self.tokens[self.place + 1 : end])
            self.place = end + 1
        radicand = self._group() if self.peek().text == "(" else self.inner(self._argument())
        return Call("root", (radicand, degree))

    def _function(self, name: str) -> Expression:
        base: tuple[Expression, ...] = ()
        power: Expression | None = None
        while self.peek().text in ("^", "_"):
            if self.take().text == "_":
                base = (self.inner(self._argument()),)
            else:
                power = self.exponent() if self.peek().text != "{" else self.inner(self._argument())
        if power is not None and isinstance(power, Number) and power.value == -1:
            name, power = ("arc" + name if name in ("sin", "cos", "tan", "cot", "sec", "csc") else "?"), None
        if name == "?" or (base and name != "log"):
            raise Unreadable("function")
        call = Call(name, (self._function_argument(), *base))
        return call if power is None else Power(call, power)

    def _function_argument(self) -> Expression:
        """Brackets, or the factors up to the next function or sign: sin 2x cos y is (sin 2x)(cos y)."""
        if self.peek().text in ("(", "{", "["):
            return self.power_of_group()
        argument = self._signed_power()
        while (
            self._begins_factor() and self.peek().text[1:] not in UNARY | {"log"} and self.peek().text not in ("(", "[")
        ):
            argument = multiply(argument, self.power())
        if self.peek().text == "/" and self.peek(1).kind in ("number", "letter"):
            raise Unreadable("a function of a quotient without brackets")
        return argument

    def power_of_group(self) -> Expression:
        return self._group()


def negative(expression: Expression) -> Expression:
    """The expression with the other sign; a numeral stays one."""
    if isinstance(expression, Number):
        return Number(-expression.value, expression.places)
    return Product((Number(Fraction(-1)), expression))


def multiply(left: Expression, right: Expression) -> Expression:
    """The product, in one level."""
    if isinstance(left, Product):
        return Product((*left.factors, right))
    return Product((left, right))
