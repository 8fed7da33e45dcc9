"""What pages written by benchmarks are made of."""


def table(head, rows):
    """A table; cells are made text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
