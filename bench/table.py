"""A Markdown table, printed row by row, as RESULTS.md holds it."""


def print_head(*names: str) -> None:
    """Print the names of the columns and the line below them.

    >>> print_head("side", "seconds")
    | side | seconds |
    |---|---|
    """
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)


def print_row(*cells: str) -> None:
    """Print one row at once, so that a long bench shows how far it is.

    >>> print_row("nanophi", "1.5")
    | nanophi | 1.5 |
    """
    print("| " + " | ".join(cells) + " |", flush=True)
