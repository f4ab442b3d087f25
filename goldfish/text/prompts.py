"""Simple prompts: templates such as "What is the text of {title}?", filled with a row's columns."""

from math import isnan
from string import Formatter
from typing import Any

from goldfish.text.rows import Row


def check_template(template: str) -> None:
    """ValueError for a template that names no column, or names one in another way than {title}."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"--ask {template!r}: {error}; write {{{{ for a brace"
        ) from error
    fields = [part[1:] for part in parts if part[1] is not None]
    # {title.x} and {title[0]} would reach into the value, {title!r} and {title:>9} would change
    # it, {} has no name.
    plain = all(
        name and not set(name) & set(".[") and not spec and not conversion
        for name, spec, conversion in fields
    )
    if not fields or not plain:
        raise ValueError(
            "--ask takes a question with columns of the rows in braces, and nothing but their "
            f"names, such as 'What is the text of {{title}}?'; got {template!r}"
        )


def filled(template: str, row: Row) -> str | None:
    """The question about a row; None if one of its columns is missing or empty.

    Not by str.format, which would evaluate what stands in braces.
    """
    question = ""
    for text, name, _, _ in Formatter().parse(template):
        question += text
        if name is not None:
            value = _as_text(row.get(name))
            if not value.strip():
                return None
            question += value
    return question


def _as_text(value: Any) -> str:
    """A cell; "" for one without a value."""
    if value is None:
        return ""
    if isinstance(value, float):
        if isnan(value):
            return ""
        # A column of years with a gap is a column of floats: 1987, not 1987.0.
        if value.is_integer():
            return str(int(value))
    return str(value)
