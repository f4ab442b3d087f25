"""Text from the data as HTML that cannot do anything: markup escaped, invisible characters written out."""

from markupsafe import Markup, escape

from goldfish.pieces import visible

BLOCK = "█"
WHITE_SPACE = {"\n": Markup("<s>↵</s>\n"), "\t": Markup("<s>⇥</s>\t")}


def show(text: str, limit: int = 200) -> Markup:
    """At most `limit` characters of `text` for an element with `white-space: pre-wrap`; visible escapes are in <s>."""
    cut = text[:limit] + ("…" if len(text) > limit else "")
    return _escaped(cut) if cut.isprintable() else Markup("").join(map(_marked, cut))


def blocks(text: str) -> str:
    """One block per character, spaces included: word lengths would give away a text that the reader knows."""
    return BLOCK * len(text)


def _marked(char: str) -> Markup:
    shown = visible(char)
    return _escaped(char) if shown == char else WHITE_SPACE.get(char) or Markup("<s>{}</s>").format(shown)


def _escaped(text: str) -> Markup:
    """For the inside of an element, never an attribute: quotes stay, they are a tenth of a page about code."""
    return Markup(str(escape(text)).replace("&#34;", '"').replace("&#39;", "'"))
