"""Text as it is printed: escaped where it comes from strangers, and counts of things."""


def printable(text: str) -> str:
    """Escape everything that a terminal could take for a command, such as ESC as `\\x1b`.

    File names, labels and replies of servers come from strangers. Line feeds stay, for messages of several lines.
    """
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in str(text)
    )


def one_line(text: str) -> str:
    """Like `printable`, but escape line feeds too, so that a label cannot look like another line of output."""
    return printable(text).replace("\n", r"\n")


def counted(number: int, thing: str) -> str:
    """Return a number with what it counts, such as "1 video" or "5 videos"."""
    return f"{number} {thing}{'s' * (number != 1)}"
