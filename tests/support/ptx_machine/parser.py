"""Reads PTX.

Statements end with a semicolon, labels with a colon, and the directives of debuggers with their
line. What is not known is an error, so nothing of a program is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ptx_machine.errors import ParseError
from ptx_machine.syntax import (
    SINK,
    Address,
    Instruction,
    Kernel,
    Literal,
    Module,
    Name,
    Operand,
    Register,
    Variable,
    Vector,
)

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_OF_DEBUGGERS = re.compile(r"^[ \t]*\.(?:loc|file)\b[^\n]*", re.MULTILINE)
_SECTION = re.compile(r"\.section\s+[.\w]+\s*\{[^{}]*\}")
_SHARED = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)*\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([\w$]+)(?:\[(\d*)\])?"
)
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|shared|const)\s+)?(?:\.align\s+\d+\s+)?([\w$]+)"
)
_INSTRUCTION = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LITERAL = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+)U?")
_ADDRESS = re.compile(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+)\s*)?\]")


class _Statement(NamedTuple):
    line: int
    text: str


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        ParseError: If a part of it is not known; nothing of it is left out.
    """
    text = _blanked(_COMMENT, text)
    text = _blanked(_SECTION, _blanked(_OF_DEBUGGERS, text))
    target, kernels, shared = "", {}, dict[str, Variable]()
    position = 0
    while (position := _skip_blank(text, position)) < len(text):
        line = _line(text, position)
        if entry := _ENTRY.match(text, position):
            position = _end_of_body(text, entry.end())
            kernel = _parse_entry(entry, line)
            kernel.shared = shared
            _parse_body(kernel, text, entry.end(), position - 1)
            kernels[kernel.name] = kernel
        elif directive := re.compile(r"\.(version|target|address_size)\s+(\S+)").match(
            text, position
        ):
            target = directive[2] if directive[1] == "target" else target
            position = directive.end()
        else:
            end = text.find(";", position)
            statement = text[position : end if end >= 0 else None].strip()
            # What lies in global memory has no address here: who names it is refused.
            if not statement.startswith(".global ") and not _declare_shared(shared, statement):
                raise ParseError(line, f"unknown directive: {statement[:60]!r}")
            position = end + 1
    return Module(target, kernels)


def _blanked(pattern: re.Pattern[str], text: str) -> str:
    """The text without what matches; lines stay where they are."""
    return pattern.sub(lambda match: "\n" * match[0].count("\n") or " ", text)


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _end_of_body(text: str, position: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise ParseError(_line(text, position), "a kernel without an end")


def _declare_shared(shared: dict[str, Variable], statement: str) -> bool:
    found = _SHARED.fullmatch(statement)
    if found is None:
        return False
    alignment, scalar, name, count = found.groups()
    width = int(scalar[1:]) // 8
    size = None if count == "" else width * int(count or 1)
    shared[name] = Variable(size, int(alignment or width))
    return True


def _parse_entry(entry: re.Match[str], line: int) -> Kernel:
    name, parameters, directives = entry.groups()
    kernel = Kernel(name)
    for each in filter(None, map(str.strip, parameters.split(","))):
        parameter = _PARAMETER.fullmatch(each)
        if parameter is None:
            raise ParseError(line, f"unknown parameter: {each!r}")
        kernel.parameters[parameter[2]] = parameter[1]
    for each in filter(None, re.split(r"(?=\.)", directives)):
        word, *numbers = each.replace(",", " ").split() or [""]
        if word == ".reqntid":
            x, y, z = (*map(int, numbers), 1, 1)[:3]
            kernel.threads = x, y, z
        elif word not in ("", ".maxntid", ".minnctapersm", ".maxnreg"):
            raise ParseError(line, f"unknown directive: {each.strip()!r}")
    return kernel


def _parse_body(kernel: Kernel, text: str, start: int, end: int) -> None:
    for line, statement in _statements(text, start, end):
        if statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.instructions)
        elif registers := _REGISTERS.fullmatch(statement):
            for name in _register_names(registers[2], line):
                kernel.registers[name] = registers[1]
        elif not statement.startswith("."):
            kernel.instructions.append(_parse_instruction(statement, line))
        elif not _declare_shared(kernel.shared, statement):
            raise ParseError(line, f"unknown directive: {statement!r}")


def _statements(text: str, start: int, end: int) -> Iterator[_Statement]:
    """Each statement without its semicolon, each label with its colon."""
    pattern = re.compile(r"[\w$]+:(?!:)|[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;")
    line, counted = _line(text, start), start
    while (start := _skip_blank(text, start)) < end:
        line, counted = line + text.count("\n", counted, start), start
        found = pattern.match(text, start, end)
        if found is None:
            raise ParseError(line, f"no statement: {text[start:end].strip()[:60]!r}")
        yield _Statement(line, found[0].rstrip(";").strip())
        start = found.end()


def _register_names(declared: str, line: int) -> Iterator[str]:
    for each in declared.split(","):
        found = re.fullmatch(r"(%[\w$]+?)(?:<(\d+)>)?", each.strip())
        if found is None:
            raise ParseError(line, f"no register: {each.strip()!r}")
        if found[2] is None:
            yield found[1]
        else:
            yield from (f"{found[1]}{index}" for index in range(int(found[2])))


def _parse_instruction(statement: str, line: int) -> Instruction:
    found = _INSTRUCTION.fullmatch(statement)
    if found is None:
        raise ParseError(line, f"no instruction: {statement!r}")
    negation, predicate, opcode, rest = found.groups()
    operands = tuple(_parse_operand(each, line) for each in _split(rest or ""))
    text = " ".join(statement.split())
    return Instruction(opcode, operands, predicate, bool(negation), line, text)


def _split(operands: str) -> list[str]:
    """At the commas outside of braces."""
    return [each.strip() for each in re.findall(r"(?:\{[^{}]*\}|[^,{}])+", operands)]


def _parse_operand(text: str, line: int) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_parse_element(each.strip(), line) for each in text[1:-1].split(",")))
    if text.startswith("["):
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise ParseError(line, f"no address: {text!r}")
        base = _parse_word(found[1], line)
        return Address(base, int(found[2] or "0", 0))
    return _parse_word(text, line)


def _parse_element(text: str, line: int) -> Register | Literal:
    if text == SINK.name:
        return SINK
    word = _parse_word(text, line)
    if isinstance(word, Name):
        raise ParseError(line, f"no element of a vector: {text!r}")
    return word


def _parse_word(text: str, line: int) -> Register | Literal | Name:
    if re.fullmatch(r"%[\w$]+(?:\.[xyz])?", text):
        return Register(text)
    if _LITERAL.fullmatch(text):
        return Literal(text)
    if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
        return Name(text)
    raise ParseError(line, f"no operand: {text!r}")
