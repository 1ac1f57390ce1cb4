"""Expressions in LaTeX or plain text, read into trees in a time bounded by the length of the text.

    "\\frac{1}{2}+x^2"  ─ read ─>  ("+", ("/", 1, 2), ("^", x, 2))

`values.py` evaluates them.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 400
MAX_DEPTH = 40

Node = tuple  # ("number", Fraction) | ("name", text) | (operation, Node, ...)

NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![\d.]))?")
MIXED_LATEX = re.compile(r"\s*\\frac\s*(\{\s*\d+\s*\}|\d)\s*(\{\s*\d+\s*\}|\d)")
MIXED_PLAIN = re.compile(r"\s+(\d+)\s*/\s*(\d+)(?![\d.])")
REPEATING = re.compile(r"\s*\\(?:overline|bar)\s*\{\s*(\d+)\s*\}")
SUBSCRIPT = re.compile(r"\s*_\s*(\{\s*\w+\s*\}|\w)")
WORD = re.compile(r"[A-Za-z]+")
COMMAND = re.compile(r"\\([A-Za-z]+)")
FUNCTIONS_TEXT = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan asin acos atan log ln lg exp sqrt abs floor ceil"
)
FUNCTIONS = FUNCTIONS_TEXT.split()
GREEK_TEXT = "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega Omega Delta Gamma zeta eta"
GREEK = set(GREEK_TEXT.split())
SMALL_WORDS_TEXT = (
    "it is so of to be no we in at by or an as and the are was has had for not but all one two she he his "
    "her its you yes any how"
)
SMALL_WORDS = set(SMALL_WORDS_TEXT.split())
CLOSING = {"(": ")", "[": "]", "{": "}"}


class Unreadable(ValueError):
    """The text is no expression that this file understands, or one whose value would cost too much."""


def read(text: str) -> Node:
    """The tree of an expression. Raises Unreadable."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"{len(text)} characters")
    reader = Reader(text)
    tree = reader.sum(0)
    reader.skip()
    if reader.at < len(text):
        raise Unreadable(f"{text[reader.at : reader.at + 20]!r} is left over")
    return tree


class Reader:
    """Recursive descent over the characters, because `\\frac12` and `x^23` depend on them."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        self.skip()
        return self.text[self.at : self.at + 1]

    def take(self, wanted: str) -> bool:
        self.skip()
        if self.text.startswith(wanted, self.at):
            self.at += len(wanted)
            return True
        return False

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        left = self.product(depth + 1)
        while True:
            if self.take("+"):
                left = ("+", left, self.product(depth + 1))
            elif self.take("-"):
                left = ("-", left, self.product(depth + 1))
            else:
                return left

    def product(self, depth: int) -> Node:
        left = self.signed(depth)
        while True:
            if self.take("*"):
                if self.take("*"):
                    raise Unreadable("**")
                left = ("*", left, self.signed(depth))
            elif self.take("/"):
                left = ("/", left, self.signed(depth))
            elif self.starts_factor():
                before = self.text[self.at - 1]
                right = self.power(depth)
                if right[0] == "number" and left[0] == "number" and before != ")":
                    raise Unreadable("two numbers side by side")
                left = ("*", left, right)
            else:
                return left

    def starts_factor(self) -> bool:
        character = self.peek()
        if character == "\\":
            return not self.text.startswith(("\\}", "\\rfloor", "\\rceil", "\\rvert"), self.at)
        return bool(character) and (character.isalnum() or character in "({[.")

    def signed(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        if self.take("-"):
            return ("neg", self.signed(depth + 1))
        if self.take("+"):
            return self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Node:
        base = self.atom(depth + 1)
        while True:
            if self.take("!"):
                base = ("!", base)
            elif self.take("°"):
                base = ("*", base, ("degree",))
            elif self.take("%"):
                base = ("/", base, ("number", Fraction(100)))
            elif self.take("^"):
                negative = self.take("-")
                exponent = self.argument(depth + 1, whole_number=True)
                if self.peek() == "^":
                    self.take("^")
                    exponent = ("^", exponent, self.argument(depth + 1, whole_number=True))
                base = ("^", base, ("neg", exponent) if negative else exponent)
            else:
                return base

    def argument(self, depth: int, whole_number: bool = False) -> Node:
        """What a command takes: a group in braces, another command, or one character (a whole number after ^ in plain text)."""
        character = self.peek()
        if character == "{" or character == "(" or character == "\\" or (whole_number and character.isdigit()):
            return self.atom(depth)
        if character.isdigit():
            self.at += 1
            return ("number", Fraction(int(character)))
        if character.isascii() and character.isalpha():
            self.at += 1
            return ("name", character)
        raise Unreadable("an argument is missing")

    def atom(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        character = self.peek()
        if not character:
            raise Unreadable("the expression ends early")
        if character.isdigit() or character == ".":
            return self.number()
        if character in CLOSING:
            self.at += 1
            inner = self.sum(depth + 1)
            if not self.take(CLOSING[character]):
                raise Unreadable(f"no {CLOSING[character]}")
            return inner
        if character == "|":
            self.at += 1
            inner = self.sum(depth + 1)
            if not self.take("|"):
                raise Unreadable("no |")
            return ("abs", inner)
        if character == "\\":
            return self.command(depth)
        return self.word(depth)

    def number(self) -> Node:
        found = self.match(NUMBER)
        if not found or len(found.group()) > 200:
            raise Unreadable("no number")
        literal = found.group()
        value = Fraction(literal.rstrip(".") if literal.endswith(".") else literal)
        if "e" in literal.lower():
            return ("number", value)
        if "." in literal:
            repeated = self.match(REPEATING)
            if repeated:
                places = len(literal.split(".")[1])
                digits = repeated.group(1)
                value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
            return ("number", value)
        mixed = self.match(MIXED_LATEX) or self.match(MIXED_PLAIN)
        if mixed:
            top, bottom = (int(part.strip("{} ")) for part in mixed.groups())
            if bottom == 0:
                raise Unreadable("a denominator is 0")
            value += Fraction(top, bottom)
        return ("number", value)

    def command(self, depth: int) -> Node:
        found = self.match(COMMAND)
        if not found:
            raise Unreadable("an unknown mark")
        name = found.group(1)
        if name == "frac":
            return ("/", self.argument(depth + 1), self.argument(depth + 1))
        if name == "binom":
            return ("binom", self.argument(depth + 1), self.argument(depth + 1))
        if name == "sqrt":
            degree: Node | None = None
            if self.take("["):
                degree = self.sum(depth + 1)
                if not self.take("]"):
                    raise Unreadable("no ]")
            inner = self.argument(depth + 1)
            return ("sqrt", inner) if degree is None else ("root", inner, degree)
        if name in ("lfloor", "lceil", "lvert"):
            inner = self.sum(depth + 1)
            if not self.take("\\r" + name[1:]):
                raise Unreadable("an open bracket")
            return ({"lfloor": "floor", "lceil": "ceil", "lvert": "abs"}[name], inner)
        if name == "pi":
            return ("pi",)
        if name == "infty":
            return ("infinity",)
        if name in FUNCTIONS:
            return self.function(name, depth)
        if name in GREEK:
            return self.variable(name)
        raise Unreadable(f"\\{name}")

    def word(self, depth: int) -> Node:
        found = self.match(WORD)
        if not found:
            raise Unreadable(f"{self.text[self.at : self.at + 10]!r}")
        name = found.group()
        lowered = name.lower()
        if lowered in FUNCTIONS:
            return self.function(lowered, depth)
        if lowered == "pi":
            return ("pi",)
        if lowered in ("inf", "infinity", "oo"):
            return ("infinity",)
        if len(name) > 3 or lowered in SMALL_WORDS:
            raise Unreadable(f"the word {name}")
        self.at = found.start() + 1  # letters side by side are a product
        return self.variable(name[0])

    def variable(self, name: str) -> Node:
        index = self.match(SUBSCRIPT)
        if index:
            return ("name", f"{name}_{index.group(1).strip('{} ')}")
        return {"e": ("e",), "i": ("i",)}.get(name, ("name", name))

    def function(self, name: str, depth: int) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        if name == "log" and self.take("_"):
            base = self.argument(depth + 1, whole_number=True)
        if self.take("^"):
            exponent = self.argument(depth + 1, whole_number=True)
        if self.peek() in ("(", "{"):
            inner = self.atom(depth + 1)
        else:  # sin 2x: all factors up to the next sign
            inner = self.power(depth + 1)
            while self.starts_factor() and not self.text.startswith(tuple("\\" + f for f in FUNCTIONS), self.at):
                inner = ("*", inner, self.power(depth + 1))
        node: Node = (name, inner) if base is None else ("/", ("ln", inner), ("ln", base))
        return node if exponent is None else ("^", node, exponent)


def names(tree: Node) -> set[str]:
    """The variables in a tree."""
    if tree[0] == "name":
        return {tree[1]}
    return set().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))
