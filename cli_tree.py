"""The commands that decode: ``skimp generate``, and ``skimp train-drafter`` for its drafts."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_console import AsJson, err, print_json, progress
from .ir.errors import SkimpError

_DTYPES = ("float32", "bfloat16")


def generate(
    model: Annotated[str, typer.Argument(help="'smollm2', a folder, or a model on the hub.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeat it for a batch; by default standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 256,
    draft: Annotated[
        str, typer.Option(help="ngram, model:PATH, head:PATH, sparse; several with commas between.")
    ] = "ngram",
    mode: Annotated[str, typer.Option(help="lambda, cast, eagle2, drawn or plain.")] = "lambda",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="The likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="So many likeliest tokens; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 for none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default as the model is.")
    ] = None,
    tree: Annotated[
        Path | None, typer.Option(help="Write a picture of one tree here, as HTML.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with token trees sized by what they cost; the text is the model's own.

    Text goes to standard output as it comes, a report to standard error. The first run on a machine
    measures costs, for some seconds.
    """
    import torch

    from .ir.cost import write_atomically
    from .runtime.models import load_decoder
    from .runtime.tree.generate import TreeDecoder
    from .runtime.tree.report import picture
    from .runtime.tree.stream import Printer
    from .runtime.tree.verify import Sampling

    if dtype is not None and dtype not in _DTYPES:
        raise SkimpError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    prompts = list(prompt or [])
    if not prompts:
        if sys.stdin.isatty():
            raise SkimpError("give --prompt TEXT, or text on standard input")
        prompts = [sys.stdin.read()]
    loaded = load_decoder(model)
    decoder = TreeDecoder(
        loaded.model,
        draft=draft,
        mode=mode,
        tokenizer=loaded.tokenizer,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    ids = [_encode(loaded.tokenizer, p, raw) for p in prompts]

    def text(tokens: list[int]) -> str:
        return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    printer = None if as_json or len(ids) > 1 else Printer(text, write)
    found = decoder.run(
        ids,
        limits=[max_tokens] * len(ids),
        stop=_ends(loaded.model),
        sampling=sampling,
        stream=None if printer is None else lambda _, tokens: printer(tokens),
    )
    report = decoder.report
    if tree is not None:
        if report.example is None:
            raise SkimpError("no tree was verified, so there is none to draw: the text is printed")
        page = picture(report.example, lambda t: str(loaded.tokenizer.decode([t])))
        write_atomically(tree, page.encode())
    if as_json:
        print_json({"texts": [text(t) for t in found], "tokens": found, "report": report.as_dict()})
        return
    if printer is not None:
        printer.end()
        write("\n")
    else:
        for i, tokens in enumerate(found):
            write(f"[{i}] {text(tokens)}\n")
    table = Table(show_header=False, box=None)
    for name, value in report.lines():
        table.add_row(name, value)
    err.print(table)


def train_drafter(
    model: Annotated[str, typer.Argument(help="'smollm2', a folder, or a model on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder for the head.")] = Path("out/head"),
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts like those to come, one a line; else Python's own.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="To write text and train, in all.")] = 40.0,
    words: Annotated[int, typer.Option(help="Tokens it may draft, the most used ones.")] = 8192,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a head that drafts for a model, on text that the model writes itself.

    Start it again after an interruption with the same options, and it goes on where it was. Then
    decode with ``skimp generate MODEL --draft ngram,head:FOLDER``.
    """
    from .passes.data import embedded_text
    from .runtime.models import load_decoder
    from .runtime.tree.fused import FusedTarget
    from .runtime.tree.train import Recipe, train

    if prompts is None:
        texts = [f"Explain this: {p}" for p in embedded_text()[:4000]]
    else:
        try:
            texts = [x for x in prompts.read_text(encoding="utf-8").splitlines() if x.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise SkimpError(f"{prompts} cannot be read: {error}") from error
    loaded = load_decoder(model)
    ids = [_encode(loaded.tokenizer, t, raw) for t in texts]
    bars, told = progress()
    with bars:
        found = train(
            FusedTarget(loaded.model), ids, out, Recipe(minutes=minutes, words=words),
            stop=_ends(loaded.model),
            progress=lambda stage, done, total, note="": told(stage, done, total),
        )  # fmt: skip
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, box=None)
    table.add_row("likeliest token right", f"{found['first']:.0%} (then {found['later']:.0%})")
    table.add_row("trained on", f"{found['tokens']:,} tokens, {found['steps']:,} steps")
    table.add_row("head", f"{found['file']} ({found['bytes'] / 1e6:.1f} MB)")
    err.print(table)


def _encode(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    """Tokens of a prompt, as a chat's first turn where the tokenizer has a template for it."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt)["input_ids"])
    turns = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def _ends(model: Any) -> frozenset[int]:
    """Tokens that end a text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())
