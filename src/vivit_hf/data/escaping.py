"""Escape text from strangers before it is printed, such as file names, labels and replies of servers."""


def printable(text: str) -> str:
    """Escape everything that a terminal could take for a command, such as ESC as `\\x1b`.

    Line feeds stay, for messages of several lines.
    """
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in str(text)
    )


def one_line(text: str) -> str:
    """Like `printable`, but escape line feeds too, so that a label cannot look like another line of output."""
    return printable(text).replace("\n", r"\n")
