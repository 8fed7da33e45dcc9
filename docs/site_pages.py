"""Pages of the site that nobody writes: one per command and per pass, the API, the navigation.

They are made from what the code says of itself at build time, so they cannot fall behind it.
"""

import ast
import importlib
import inspect
import pkgutil
from dataclasses import MISSING, fields
from pathlib import Path

import skimp
import skimp.passes
import typer
from mkdocs.structure.files import File, InclusionLevel
from skimp.cli import app
from skimp.passes.base import Pass

WRITTEN = {
    "index.md": "Start",
    "how.md": "How it works",
    "decode.md": "Decoding with trees",
    "decoder.md": "A decoder made sparse",
    "decode_step.md": "One decoding step",
    "serving.md": "Serving",
    "router.md": "Routing over several hops",
    "judge.md": "Judging",
    "export.md": "Export",
    "koala.md": "Diffusion U-Nets",
    "ray.md": "More than one machine",
    "ablation.md": "What each ingredient is worth",
    "kernels.md": "GPU kernels",
    "peers.md": "Beside its peers",
    "hardening.md": "Damaged files",
    "faq.md": "Questions",
}
"""The written pages in the order of reading; what no benchmark has written yet is left out."""


def on_config(config):
    """Put the navigation together."""
    docs = Path(config.docs_dir)
    pages = [{title: name} for name, title in WRITTEN.items() if (docs / name).exists()]
    config.nav = [
        *pages[:2],
        {"Guides and measurements": pages[2:-1]},
        {"Commands": ["commands/index.md", *(f"commands/{n}.md" for n in sorted(commands()))]},
        {"Passes": ["passes/index.md", *(f"passes/{n}.md" for n in sorted(passes()))]},
        {"Python": "api.md"},
        {"Examples": "examples.md"},
        pages[-1],
    ]
    return config


def on_files(files, config):
    """Add the generated pages."""
    made = {
        "api.md": api(),
        "examples.md": examples(),
        "commands/index.md": all_commands(),
        "passes/index.md": all_passes(),
    }
    made |= {f"commands/{n}.md": command_page(n, c) for n, c in commands().items()}
    made |= {f"passes/{n}.md": pass_page(c) for n, c in passes().items()}
    for path, text in made.items():
        file = File.generated(config, path, content=text, inclusion=InclusionLevel.INCLUDED)
        files.append(file)
    return files


def table(head, rows):
    """A Markdown table; cells are on one line."""

    def line(cells):
        flat = (" ".join(str(c).split()).replace("|", "\\|") for c in cells)
        return "| " + " | ".join(flat) + " |\n"

    return "\n" + line(head) + line("---" for _ in head) + "".join(map(line, rows)) + "\n"


# -- commands -------------------------------------------------------------------------------------


def commands():
    """By name, ``economics-sweep`` of a group; groups themselves are not commands."""
    found = {}

    def walk(command, prefix):
        for name, child in getattr(command, "commands", {}).items():
            path = f"{prefix}{name}"
            if getattr(child, "commands", None):
                walk(child, path + "-")
            elif not child.hidden:
                found[path] = child

    walk(typer.main.get_command(app), "")
    return found


def spoken(name):
    """A command as it is typed."""
    groups = [n for n, c in typer.main.get_command(app).commands.items() if hasattr(c, "commands")]
    group = next((g for g in groups if name.startswith(g + "-")), None)
    return f"skimp {group} {name[len(group) + 1 :]}" if group else f"skimp {name}"


def command_page(name, command):
    """What ``--help`` says, as a page."""
    text = f"# {spoken(name)}\n\n{inspect.cleandoc(command.help or '')}\n"
    rows = []
    for p in command.params:
        given = ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))
        if p.param_type_name == "argument":
            given = f"`{p.metavar or p.name.upper()}`" + (" (required)" if p.required else "")
        default = p.default if isinstance(p.default, str | int | float | Path) else None
        shown = "" if default in (None, "", False) else f"`{default}`"
        rows.append([given, getattr(p, "help", "") or "", shown])
    text += table(["option", "what it does", "default"], rows)
    if command.epilog:
        example = command.epilog.removeprefix("Example:").strip()
        text += f"\n## Example\n\n```text\n{example}\n```\n"
    return text


def all_commands():
    """The index of commands."""
    rows = [
        [f"[`{spoken(n)}`]({n}.md)", inspect.cleandoc(c.help or "").split("\n\n")[0]]
        for n, c in sorted(commands().items())
    ]
    return "# Commands\n" + table(["command", "what it does"], rows)


# -- passes ---------------------------------------------------------------------------------------


def passes():
    """Every pass by its name."""
    for module in pkgutil.iter_modules(skimp.passes.__path__, "skimp.passes."):
        importlib.import_module(module.name)
    found, todo = {}, [Pass]
    while todo:
        todo += (kinds := todo.pop().__subclasses__())
        found |= {c.name: c for c in kinds if c.__module__.startswith("skimp.")}
    return found


def pass_page(kind):
    """What a pass rewrites, why, and its options."""
    module = inspect.getdoc(inspect.getmodule(kind)) or ""
    doc = inspect.getdoc(kind) or ""
    said, _, listed = doc.partition("Attributes:")
    about = {}
    for line in inspect.cleandoc("\n" + listed).splitlines():
        if line and not line.startswith(" "):
            name, _, rest = line.partition(":")
            about[name.strip()] = rest.strip()
        elif about:
            about[next(reversed(about))] += " " + line.strip()
    rows = []
    for f in fields(kind):
        default = "required" if f.default is MISSING else f"`{f.default!r}`"
        rows.append([f"`{f.name}`", about.get(f.name, ""), default])
    text = f"# {kind.name}\n\n{said.strip()}\n\n`{kind.__module__}.{kind.__name__}`\n"
    text += table(["option", "what it does", "default"], rows) if rows else ""
    return text + "\n## What it does to the graph or the loss\n\n" + pictures(module) + "\n"


def pictures(doc):
    """A docstring whose indented rewrite pictures keep their form."""
    parts = []
    for part in doc.split("\n\n"):
        indented = part.startswith("    ")
        parts.append(f"```text\n{inspect.cleandoc(part)}\n```" if indented else part)
    return "\n\n".join(parts)


def all_passes():
    """The index of passes."""
    rows = [
        [f"[`{n}`]({n}.md)", (inspect.getdoc(c) or "").split("\n\n")[0]]
        for n, c in sorted(passes().items())
    ]
    return (
        "# Passes\n\nA conversion is a list of these, in order; `skimp.recipe()` is the usual one, "
        "and `convert(..., passes=[...])` takes any other.\n" + table(["pass", ""], rows)
    )


def api():
    """The public names, by what they are called from outside."""
    text = "# Python\n"
    for name in (*(n for n in skimp.__all__ if n != "SkimpError"), "SkimpError"):
        where = getattr(skimp, name)
        text += f"\n::: {where.__module__}.{where.__qualname__}\n"
        text += f"    options:\n      heading: skimp.{name}\n      toc_label: {name}\n"
    return text


def examples():
    """What each example says of itself; small.py and member.py only serve others."""
    root = Path(__file__).parent.parent / "examples"
    text = (
        "# Examples\n\nEach is one job in under 80 lines with a `main()`. Those with `--quick` run "
        "in seconds on a small random model, as in continuous integration. `examples/tour.ipynb` "
        "is a notebook to read from top to bottom: convert, look, turn the knob, generate.\n"
    )
    for path in sorted(root.rglob("*.py")):
        if path.name not in ("small.py", "member.py"):
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            text += f"\n## examples/{path.relative_to(root)}\n\n{pictures(doc)}\n"
    return text
