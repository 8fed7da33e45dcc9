"""What benchmarks/peers.py found, and docs/peers.md of it."""

import platform
import statistics
from importlib.metadata import version

import torch
from decode_report import after_first, rate, ratio
from page import table
from peers_known import PEERS
from skimp.ir.measure import machine

SUBJECTS = {"encoder": ("skimp",), "decoder": ("skimp, trees", "skimp, one by one")}
BUSY = 3.0
"""Load average, of which the two threads of the benchmark itself are most."""
SLOWER = 0.97
"""Below this, a peer is said to win; nearer to 1 is a tie."""


def result_of(records, missing, tests):
    """Everything as figures: a row per peer, measured or with the reason why not."""
    versions = {"Python": platform.python_version(), platform.system(): platform.release()}
    versions |= {name: version(name) for name in ("transformers", "tokenizers", "numpy", "onnx")}
    found = dict(machine=machine(), torch=torch.__version__, versions=versions, load=[])
    for kind, whys in missing.items():
        rows = {name: records.read(kind, name) for name in PEERS}
        found["load"] += [r["load"] for kept in rows.values() for r in kept.values()]
        found[kind] = []
        for name, peer in PEERS.items():
            row = dict(name=name, version=peer.version, precision=peer.precision, note=peer.note)
            kept = rows[name]
            if whys[name] or "refused" in kept or not kept:
                refused = f"refused: {kept['refused']['why']}" if "refused" in kept else ""
                row["why"] = whys[name] or refused or "not run"
            elif kind == "encoder":
                row |= dict(quality=kept.pop("quality", None), shapes=kept)
            else:
                row |= written(name, rows)
            found[kind].append(row)
    found["load"] = statistics.median(found["load"] or [0.0])
    found["capabilities"] = [seen(row, found) for row in tests]
    return found


def written(name, rows):
    """A decoder's row."""
    texts = {n: {w: r for w, r in kept.items() if "texts" in r} for n, kept in rows.items()}
    mine, reference = texts[name], texts["HF generate"]
    if not mine:
        return dict(why="not run")
    same = [r["texts"] == reference[w]["texts"] for w, r in mine.items() if w in reference]
    return dict(
        perplexity=rows[name].get("perplexity", {}).get("value"),
        texts=len(same),
        same=sum(same),
        ties=sum(r["ties"] for r in mine.values()),
        rate=rate(mine.values()),
        rate_after_first=after_first(mine.values()),
        first_ms=1e3 * statistics.median(r["first"] for r in mine.values()),
        times={s: ratio(texts[s], mine) for s in SUBJECTS["decoder"] if s != name and texts[s]},
    )


def seen(row, found):
    """A claim with what the benchmark saw of peers; none of those that it did not try."""
    peers = {}
    for name in (n for n in PEERS if not n.startswith("skimp")):
        mine = {k: next(r for r in found[k] if r["name"] == name) for k in SUBJECTS}
        ran = {k: r for k, r in mine.items() if "why" not in r}
        exact = PEERS[name].precision == "float32" and name != "HF generate"
        if row["seen"] == "shapes" and len(ran.get("encoder", {}).get("shapes", ())) > 1:
            peers[name] = "yes"
        elif row["seen"] == "text" and "decoder" in ran and exact:
            peers[name] = f"{ran['decoder']['same']} of {ran['decoder']['texts']}"
        elif row["seen"] == "int8" and ran and "8-bit" in PEERS[name].precision:
            peers[name] = "yes"
    return row | dict(peers=peers)


# -- the page -------------------------------------------------------------------------------------


def spread(s, scale=1.0, digits=2):
    """A median with its quartiles."""
    middle, low, high = (f"{scale * s[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{middle} ({low}-{high})"


HEAD = """# Beside its peers

Written by `python benchmarks/peers.py` from `benchmarks/results/peers.json`.

The same weights on the same inputs, on one machine, in turn, by skimp and by what else one would
take. A peer runs at the best setting that was found, warm. One whose outputs disagree with the
model that it runs is not timed, and one that is not installed says how to install it.

"""


def write_page(result, page):
    """Write docs/peers.md."""
    about = f"{result['machine']}, torch {result['torch']}. Median load average meanwhile: "
    text = HEAD + about + f"{result['load']:.1f}.\n"
    if result["load"] > BUSY:
        text += "\nOthers used the machine, so take no figure of speed here for more than a hint.\n"
    text += encoder(result) + decoder(result) + who(result) + claims(result)
    page.write_text(text)


def applying(rows):
    """Without those that a part is not about: nobody looks for an encoder's text."""
    return [r for r in rows if not r.get("why", "").startswith("does not apply")]


def encoder(result):
    """Quality and milliseconds by shape."""
    rows, shapes = applying(result["encoder"]), {}
    for row in rows:
        shapes |= dict.fromkeys(w for w in row.get("shapes", ()))
    order = sorted(shapes, key=lambda w: [int(n) for n in w.split(" x ")])
    cells, wins, ratios = [], [], []
    for row in rows:
        head = [row["name"], row["precision"]]
        if "why" in row:
            cells.append([*head, row["why"], *[""] * (1 + len(order))])
            continue
        q = row["quality"]
        rated = [f"{q['cosine']:.4f}", f"{q['overlap']:.3f}"] if q else ["", ""]
        times = [row["shapes"].get(w) for w in order]
        cells.append([*head, *rated, *(spread(t["timing"], 1e3) if t else "" for t in times)])
        found = {w: t["speedup"] for w, t in zip(order, times, strict=True) if t and t["speedup"]}
        if found:
            ratios.append([row["name"], *(spread(found[w]) if w in found else "" for w in order)])
        wins += [
            f"{row['name']} at {w} ({1 / s['median']:.2f} times as fast)"
            for w, s in found.items()
            if s["median"] < SLOWER
        ]
    passages = next((r["quality"]["passages"] for r in rows if r.get("quality")), 0)
    text = "\n## An encoder: all-MiniLM-L6-v2\n\n"
    text += f"Quality is against the dense model in eager PyTorch, on {passages} passages that the "
    text += (
        "conversion never saw: cosine of embeddings, and overlap of the ten nearest neighbours. "
    )
    text += "Milliseconds by batch x length, medians of interleaved runs with quartiles:\n\n"
    text += table(["", "precision", "cosine", "overlap", *order], cells)
    text += "\nHow many times as fast skimp is, neighbouring runs against each other:\n\n"
    text += table(["against", *order], ratios)
    text += f"\n**Faster than skimp:** {won(wins, rows)}.\n"
    rated = {r["name"]: r["quality"]["cosine"] for r in rows if r.get("quality")}
    closer = [n for n, cosine in rated.items() if cosine > rated.get("skimp", 1)]
    text += f"\n**Closer to the dense model than skimp:** {', '.join(closer) or 'none of these'}. "
    return text + "Its speed is bought with what the two columns of quality show.\n"


def won(wins, rows):
    """Peers that were faster, if any was timed at all."""
    timed = any("why" not in r and not r["name"].startswith("skimp") for r in rows)
    return ", ".join(wins) or ("none of these" if timed else "no peer was timed")


def decoder(result):
    """Rates and texts."""
    cells, wins = [], []
    best = "skimp, trees"
    for row in applying(result["decoder"]):
        head = [row["name"], row["precision"]]
        if "why" in row:
            cells.append([*head, row["why"], *[""] * 5])
            continue
        text = f"{row['same']} of {row['texts']}"
        text += f", {row['ties']} at a near tie" if row["ties"] else ""
        perplexity = f"{row['perplexity']:.3f}" if row["perplexity"] else ""
        after = f"{row['rate_after_first']:.1f}" if row["rate_after_first"] else ""
        against = row["times"].get(best)
        cells.append([
            *head, text, perplexity, f"{row['rate']:.1f}", after, f"{row['first_ms']:.0f}",
            spread(against) if against else "",
        ])  # fmt: skip
        wins += [
            f"{row['name']} ({1 / t['ratio']:.2f} times as fast as {subject})"
            for subject, t in row["times"].items()
            if t and t["ratio"] < SLOWER and not row["name"].startswith("skimp")
        ]
    text = "\n## A decoder: SmolLM2-135M\n\nGreedy text of prompts of Spec-Bench and GSM8K. A peer "
    text += (
        "in float32 has to write what `model.generate` writes, but for a near tie; where sums or "
    )
    text += (
        "weights are of another kind the text is its own, and perplexity on WikiText-2 is held. "
    )
    text += "Tokens per second are of all prompts together; the last column is how many times as "
    text += f"fast `{best}` is, median of prompts with quartiles:\n\n"
    head = ["", "precision", "same text", "perplexity", "tokens/s", "without the prompt",
            "first token, ms", f"{best} / it"]  # fmt: skip
    text += table(head, cells)
    return text + f"\n**Faster than skimp:** {won(wins, result['decoder'])}.\n"


def who(result):
    """Versions, and how each was run."""
    rows = [[r["name"], r["version"] or "not installed", r["note"]] for r in result["encoder"]]
    others = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = "\n## Versions, and how each was run\n\n" + table(["", "version", "how"], rows)
    return text + f"\nAlso {others}.\n"


def claims(result):
    """The table of capabilities."""
    rows, run = result["capabilities"], result["tests"]
    names = [n for n in PEERS if any(n in r["peers"] for r in rows)]
    cells = []
    for row in rows:
        many = f"{row['passed']} test" + "s" * (row["passed"] != 1)
        own = f"yes ({many})" if row["verdict"] == "yes" else row["verdict"]
        cells.append([row["claim"], own, *(row["peers"].get(n, "") for n in names)])
    last = f"of {run}" if run else "of which there is no report yet: `make test` leaves one"
    text = "\n## What each can do\n\nMade from tests, not typed. skimp's column says yes where the "
    text += f"tests of a claim ran and passed in the last run ({last}). A peer's says what this "
    text += "benchmark saw of it, and is empty where it did not look, which says nothing about the "
    return text + "peer.\n\n" + table(["", "skimp", *names], cells)
