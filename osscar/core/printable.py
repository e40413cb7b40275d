"""Names and messages as a terminal may show them."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Return a text in which nothing can move a cursor, change a colour or fail to be encoded.

    Names come from files and from strangers: control characters, marks that reverse the direction
    of writing, and halves of surrogate pairs are written as escapes.

    Parameters
    ----------
    text
        Any text.
    keep
        Characters to be left as they are, such as line feeds.

    Examples
    --------
    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
