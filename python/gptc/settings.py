"""Options declared once: dataclass fields with a help text, section, default and range.

    @dataclass(frozen=True)
    class TrainOptions:
        lr: float = option(6e-4, "Peak learning rate.", section="Optimizer", above=0)

That line generates the command-line option --lr (cli/declared.py), the TOML key `lr`, the checks
of type and range, and a row of docs/options.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from urllib.parse import quote_from_bytes, unquote_to_bytes

from gptc.errors import UsageError
from gptc.files.elsewhere import meant
from gptc.files.limits import read_any
from gptc.files.sizes import parse_size
from gptc.files.values import is_finite

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple: "a list",
}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Range(NamedTuple):
    """The numbers that an option accepts; a bound of None = unbounded."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def holds(self, x: float) -> bool:
        """Whether the number is in range; infinity and NaN never are."""
        return (
            is_finite(x)
            and (self.above is None or x > self.above)
            and (self.least is None or x >= self.least)
            and (self.below is None or x < self.below)
            and (self.most is None or x <= self.most)
        )

    def __str__(self) -> str:
        """In words, such as "at least 0 and below 1"."""
        if self.least is not None and self.most is not None:
            return f"between {self.least:g} and {self.most:g}"
        low = "" if self.above is None else f"above {self.above:g}"
        low = low if self.least is None else f"at least {self.least:g}"
        high = "" if self.below is None else f"below {_power(self.below)}"
        high = high if self.most is None else f"at most {_power(self.most)}"
        if self.least is not None and not high:
            return f"{self.least:g} or more"
        return " and ".join(filter(None, (low, high))) or "a finite number"


def _power(x: float) -> str:
    exponent = math.log2(x) if x > 0 else 0.0
    return f"2**{exponent:.0f}" if x > 1 << 16 and exponent.is_integer() else f"{x:g}"


@dataclass(frozen=True)
class Declared:
    """The declaration of one option."""

    name: str  # the field's name
    kind: type  # int, float, str, bool or tuple (an option that may be repeated)
    optional: bool  # None is allowed
    default: Any
    help: str
    section: str
    choices: tuple[str, ...]
    range: Range
    shown: str | None  # the default in words, if it is not a plain value
    metavar: str | None
    flag: str  # the name on the command line, without --
    words: Mapping[str, int]  # that stand for numbers, on the command line and in files
    several: bool = False  # a list of such values is allowed, too

    @property
    def default_text(self) -> str:
        """The default as shown in help; "" = not shown."""
        if self.shown is not None:
            return self.shown
        if self.kind is bool:
            return "yes" if self.default else "no"
        if self.default is None or self.default == () or self.default == "":
            return ""
        if self.kind is tuple:
            return ", ".join(map(str, self.default))
        return f"{self.default:g}" if self.kind is float else str(self.default)

    @property
    def placeholder(self) -> str:
        """The placeholder of the value in help; "" if the choices are shown instead."""
        return self.metavar or ("" if self.choices else _METAVARS.get(self.kind, ""))

    def check(self, value: Any, spelled: str, number: Callable[[float], float] = float) -> None:
        """Raises UsageError for a value outside the choices or range of the option `spelled`."""
        if value is None and self.optional:
            return
        if self.choices and value not in self.choices:
            raise UsageError(f"{spelled} is {value!r}; it must be one of {', '.join(self.choices)}")
        if self.kind is int and value >= 2**63:
            raise UsageError(f"{spelled} is {value}; it must be below 2**63")
        if self.kind in (int, float):
            try:
                inside = self.range.holds(number(value))
            except OverflowError:  # a whole number that no float can hold
                inside = False
            if not inside:
                raise UsageError(f"{spelled} is {value}; it must be {self.range}")

    def check_type(self, value: Any, spelled: str) -> None:
        """Raises UsageError for a value of the wrong type, such as one from a file."""
        if value is None and self.optional:
            return
        if self.several and isinstance(value, list | tuple):
            if not all(type(one) is self.kind for one in value):
                raise UsageError(
                    f"{spelled} is {value!r}; it must be a list of {_KINDS[self.kind]}s"
                )
            return
        is_bool = isinstance(value, bool)
        fits = {
            bool: is_bool,
            int: isinstance(value, int) and not is_bool,
            float: isinstance(value, int | float) and not is_bool,
            str: isinstance(value, str),
            tuple: isinstance(value, list | tuple),
        }[self.kind]
        if not fits:
            raise UsageError(f"{spelled} is {value!r}; it must be {_KINDS[self.kind]}")


def option(
    default: Any,
    help: str,
    *,
    section: str = "",
    choices: tuple[str, ...] = (),
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    shown: str | None = None,
    metavar: str | None = None,
    flag: str | None = None,
    words: Mapping[str, int] | None = None,
) -> Any:
    """A dataclass field that declares an option; `Declared` documents the arguments."""
    facts = {
        "help": help,
        "section": section,
        "choices": choices,
        "range": Range(above, least, below, most),
        "shown": shown,
        "metavar": metavar,
        "flag": flag,
        "words": words or {},
    }
    return field(default=default, metadata={"option": facts})


def declared(cls: type) -> dict[str, Declared]:
    """The options that a dataclass declares, by field name."""
    hints = get_type_hints(cls)
    section = getattr(cls, "SECTION", "")
    options = [f for f in fields(cls) if "option" in f.metadata]
    return {f.name: _declared(f, hints[f.name], section) for f in options}


def _declared(f: Field[Any], hint: Any, section: str) -> Declared:
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = next(get_origin(arm) or arm for arm in arms if arm is not NoneType)
    kind = str if kind is Literal else kind
    facts = dict(f.metadata["option"])
    facts["section"] = facts["section"] or section
    facts["flag"] = facts["flag"] or spelled(f.name)
    default = None if f.default is MISSING else f.default
    several = kind is not tuple and any(get_origin(arm) is tuple for arm in arms)
    return Declared(f.name, kind, NoneType in arms, default, **facts, several=several)


def spelled(name: str) -> str:
    """A field's name as spelled on the command line."""
    return name.replace("_", "-")


def check(instance: Any, number: Callable[[float], float] = float) -> None:
    """Raises UsageError, such as "--lr is 0", for an option outside its range.

    `number` rounds as the engine does.
    """
    for name, declaration in declared(type(instance)).items():
        declaration.check(getattr(instance, name), f"--{declaration.flag}", number)


def check_types(cls: type, given: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown option or a value of the wrong type."""
    known = declared(cls)
    for name, value in given.items():
        if name not in known:
            close = meant(name, known)
            hint = f"; did you mean {spelled(close)}?" if close else ""
            raise UsageError(f"unknown option {spelled(name)!r}{hint}")
        known[name].check_type(value, spelled(name))


# ---- TOML ----


def read_toml(cls: type, path: Path) -> dict[str, Any]:
    """The options in a TOML file. The keys are the command-line names, with - or _."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]
    try:
        with path.open("rb") as file:
            data = tomllib.loads(read_any(file, str(path), "header").decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    known = declared(cls)
    for key, value in data.items():
        if _is_table(value) and key.replace("-", "_") not in known:
            raise UsageError(
                f"{path}: [{key}] is a table, and tables are not read: write its options without it"
            )
    try:
        given = {
            name: _sized(known.get(name), _from_toml(value))
            for key, value in data.items()
            for name in [key.replace("-", "_")]
        }
        check_types(cls, given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return given


def _sized(declaration: Declared | None, value: Any) -> Any:
    """The number of a size given as text, such as "64K"; other values unchanged."""
    if declaration is None or declaration.kind is not int or not isinstance(value, str):
        return value
    if value in declaration.words:
        return declaration.words[value]
    try:
        return parse_size(value)
    except ValueError as error:
        raise UsageError(f"{spelled(declaration.name)}: {error}") from None


def to_toml(instance: Any, leave_out: tuple[str, ...] = ()) -> str:
    """The options as TOML for `read_toml`, without those that are None."""
    lines = []
    for name in declared(type(instance)):
        value = getattr(instance, name)
        if value is not None and name not in leave_out:
            lines.append(f"{spelled(name)} = {_to_toml(value)}")
    return "\n".join(lines) + "\n"


def _to_toml(value: Any) -> str:
    """A value as TOML, which writes text, numbers and booleans as JSON does, but escapes DEL.

    A path with bytes that are not UTF-8 becomes { percent = "b%FF.txt" }: TOML cannot hold them.
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_to_toml, value))}]"
    if isinstance(value, str) and not _is_unicode(value):
        encoded = quote_from_bytes(value.encode("utf-8", "surrogateescape"))
        return f'{{ percent = "{encoded}" }}'
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _from_toml(value: Any) -> Any:
    """The value that `_to_toml` wrote."""
    if isinstance(value, list):
        return [_from_toml(item) for item in value]
    encoded = value.get("percent") if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(encoded, str):
        return unquote_to_bytes(encoded).decode("utf-8", "surrogateescape")
    return value


def _is_table(value: Any) -> bool:
    """Whether a value is a table, or an array of some, and not one that `_to_toml` wrote."""
    if isinstance(value, list):
        return any(map(_is_table, value))
    return isinstance(value, dict) and isinstance(_from_toml(value), dict)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- documentation ----


def markdown(cls: type, sections: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of Markdown tables of the options, one table per section."""
    for section in ordered_sections(cls, sections):
        yield from (f"### {section}", "") if section else ()
        yield from ("| option | meaning | default | values |", "| --- | --- | --- | --- |")
        for declaration in declared(cls).values():
            if declaration.section == section:
                yield _row(declaration)
        yield ""


def _row(d: Declared) -> str:
    values = ", ".join(d.choices)
    if d.kind in (int, float) and any(bound is not None for bound in d.range):
        values = str(d.range)
    flag = f"--{d.flag}" if d.kind is not bool else f"--{d.flag} / --no-{d.flag}"
    cells = (f"`{flag}`", d.help, d.default_text, values)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def ordered_sections(cls: type, first: tuple[str, ...] = ()) -> list[str]:
    """The sections of a dataclass: those of `first` in that order, then the others."""
    found = dict.fromkeys(declaration.section for declaration in declared(cls).values())
    return [name for name in first if name in found] + [n for n in found if n not in first]
