"""Python assignments, evaluated without running Python: literals, names already known, and bounded arithmetic on them."""

from __future__ import annotations

import ast
import io
import operator
import tokenize
import warnings
from collections.abc import Mapping
from typing import Any

from fastgpt.doctor.reading.values import Refused

LONGEST = 10_000
"""A line or string of more characters is not a setting."""
PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What ``parse`` raises for text that is not Python."""
NOT_READ = "it is not executed: only literals, names set before and arithmetic on them are read"


def parse(text: str) -> ast.Module:
    """ast.parse, silent about odd escapes and closed to absurd lines. Raises one of PARSE_ERRORS."""
    if max(map(len, text.split("\n"))) > LONGEST:
        raise ValueError("a line is too long to be a setting")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string is a SyntaxWarning
        return ast.parse(text)


def literal_or_text(text: str) -> bool | int | float | str:
    """What a command-line value means to nanoGPT: a Python number, boolean or quoted string; else the text itself."""
    try:
        body = parse(text.strip()).body
        value = evaluate(body[0].value, {}) if len(body) == 1 and isinstance(body[0], ast.Expr) else text
    except (*PARSE_ERRORS, ArithmeticError, TypeError, Refused):
        value = text
    return value if isinstance(value, (bool, int, float, str)) else text


def comment_of(line: str) -> str:
    """What follows the # on a line, or ""."""
    if "#" not in line or len(line) > LONGEST:
        return ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
            if token.type == tokenize.COMMENT:
                return token.string.lstrip("#").strip()
    except (tokenize.TokenError, SyntaxError, ValueError):
        pass
    return ""


def names_set_by(node: ast.AST) -> set[str]:
    """Every name that a statement may assign."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}


def assign(node: ast.stmt, known: Mapping[str, Any]) -> dict[str, Any]:
    """The names that a statement sets, with their values. Raises Refused."""
    try:
        if isinstance(node, ast.Pass):
            return {}
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            return {node.target.id: evaluate(ast.BinOp(ast.Name(node.target.id), node.op, node.value), known)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            return {} if node.value is None else {node.target.id: evaluate(node.value, known)}
        if isinstance(node, ast.Assign):
            value = evaluate(node.value, known)
            assigned: dict[str, Any] = {}
            for target in node.targets:
                assigned.update(_unpack(target, value))
            return assigned
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise Refused(f"its value cannot be computed ({error})") from error
    raise Refused(NOT_READ)


def _unpack(target: ast.expr, value: Any) -> dict[str, Any]:
    if isinstance(target, ast.Name):
        return {target.id: value}
    if (
        isinstance(target, (ast.Tuple, ast.List))
        and isinstance(value, (tuple, list))
        and len(target.elts) == len(value)
    ):
        return {name: part for t, v in zip(target.elts, value) for name, part in _unpack(t, v).items()}
    raise Refused("it sets something other than a name")


_OPERATORS: Mapping[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


def evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of a literal, a known name, or arithmetic on them: 5 * 8, -1e-3, "a" + "b". Raises Refused, and what
    the arithmetic raises. Results are bounded: no config holds 10 ** 10 ** 10."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.Name):
        if node.id in known:
            return known[node.id]
        raise Refused(f"{node.id} is not known")
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(evaluate(item, known) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        operand = evaluate(node.operand, known)
        if isinstance(operand, (int, float)):
            return _OPERATORS[type(node.op)](operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = evaluate(node.left, known), evaluate(node.right, known)
        strings = isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add)
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if numbers and isinstance(node.op, ast.Pow) and (abs(left) > 1e9 or abs(right) > 64):
            raise Refused("its value is too large to be a setting")
        if strings or numbers:
            value = _OPERATORS[type(node.op)](left, right)
            if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > 2048):
                raise Refused("its value is not a number that a setting can have")
            if isinstance(value, str) and len(value) > LONGEST:
                raise Refused("its value is too long to be a setting")
            return value
    raise Refused(NOT_READ)
