"""Training text on a page: everything visible, nothing alive.

A page about memorization shows text that strangers wrote. Here it becomes inert: markup is escaped, and every
character that is invisible or steers the renderer (controls, null bytes, bidi overrides, zero-width characters,
lone surrogates, line separators, odd spaces) is written out as a visible Python escape such as \\x00 or \\u202e.
"""

from markupsafe import Markup, escape

from goldfish.pieces import visible

BLOCK = "█"


def show(text: str, limit: int = 200) -> Markup:
    """`text` as HTML: visible escapes stand in <s>, a line feed is ↵ and a real break. For `white-space: pre-wrap`."""
    cut = text[:limit] + ("…" if len(text) > limit else "")
    if cut.isprintable():
        return _escaped(cut)
    return Markup("").join(_marked(c) for c in cut)


def blocks(text: str) -> str:
    """As many blocks as `text` has characters, white space included: word lengths would give known texts away."""
    return BLOCK * len(text)


def _marked(char: str) -> Markup:
    if visible(char) == char:
        return _escaped(char)
    if char == "\n":
        return Markup("<s>↵</s>\n")
    if char == "\t":
        return Markup("<s>⇥</s>\t")
    return Markup("<s>{}</s>").format(visible(char))


def _escaped(text: str) -> Markup:
    """For the inside of an element, never an attribute: quotes stay, they are a tenth of a page about code."""
    return Markup(str(escape(text)).replace("&#34;", '"').replace("&#39;", "'"))
