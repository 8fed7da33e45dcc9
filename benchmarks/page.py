"""What pages written by benchmarks are made of."""


def table(head, rows):
    """A table; cells are made text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def replace_section(path, name, text):
    """Put text between ``<!-- name -->`` and ``<!-- /name -->`` of a page."""
    page = path.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no section {name!r}")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")
