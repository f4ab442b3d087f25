"""Text from the data as HTML that cannot do anything: markup escaped, invisible characters written out."""

from html import escape

from markupsafe import Markup

from goldfish.pieces import visible

BLOCK = "█"


def show(text: str, limit: int = 200) -> Markup:
    """At most `limit` characters of `text` for an element with `white-space: pre-wrap`; visible escapes are in <s>.

    For the inside of an element, never an attribute: quotes stay, they are a tenth of a page about code.
    """
    cut = escape(text[:limit], quote=False) + ("…" if len(text) > limit else "")
    return Markup("<s>↵</s>\n".join(map(_line, cut.split("\n"))))


def blocks(text: str) -> str:
    """One block per character, spaces included: word lengths would give away a text that the reader knows."""
    return BLOCK * len(text)


def _line(line: str) -> str:
    if line.isprintable():
        return line
    shown = ((char, visible(char)) for char in line)
    marked = "".join(char if char == seen else f"<s>{seen}</s>" for char, seen in shown)
    return marked.replace("<s>\\t</s>", "<s>⇥</s>\t")
