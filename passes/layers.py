"""Keep what a pass has done to each layer until the pass is done, to go on from after a kill."""

import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ir import artefact
from ..ir.cost import sweep
from ..ir.errors import ArtefactError
from .base import Context, Each
from .offload import begin_adam


class Layers:
    """The store of what one pass has done to each layer so far.

    Args:
        folder: Of stages. A folder in it holds an artefact for each layer while a pass is at work;
            what the same pass of the same conversion has left there is gone on from.
        identity: Of the conversion, the passes before this one, and this one.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder / "layers", identity
        self.turn = 0

    @contextmanager
    def kept(self, context: Context) -> Iterator[None]:
        """Within it, what the context's ``each`` gives is stored as it comes."""
        each = context.each
        context.each = partial(self.each, context, each)
        try:
            yield
        finally:
            context.each = each

    def each(
        self, context: Context, each: Each, work: Any, items: Iterable[tuple[Any, ...]], /
    ) -> Iterator[tuple[Any, ...]]:
        """What :class:`Each` gives, without doing again what is stored.

        A pass may go over the layers in turns, as Sparsify does for each chunk of tokens; only the
        last turn of a layer is stored, so what is stored stands for the turns before it too.
        """
        turn, self.turn = self.turn, self.turn + 1
        ahead: deque[tuple[int, tuple[Any, ...] | None]] = deque()

        def to_do() -> Iterator[tuple[Any, ...]]:
            for i, item in enumerate(items):
                found = self._read(i, turn, item)
                ahead.append((i, None if found is None else context.offload.move(found)))
                if found is None:
                    yield item

        for result in each(work, to_do()):
            yield from _leading(ahead)
            i, _ = ahead.popleft()
            self._write(i, turn, result)
            yield result
        yield from _leading(ahead)

    def _write(self, i: int, turn: int, result: tuple[Any, ...]) -> None:
        block, optimizer, rest = _sorted_out(result)
        record = {"identity": self.identity, "turn": turn, "rest": rest}
        artefact.write(self.folder / str(i), _Layer(block, optimizer), record)

    def _read(self, i: int, turn: int, item: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The result that is stored, put into the block and the optimiser of ``item``."""
        folder = self.folder / str(i)
        try:
            record = artefact.read_index(folder)["record"]
            if record["identity"] != self.identity or record["turn"] < turn:
                return None
            block, optimizer, _ = _sorted_out(item)
            artefact.read_into(folder, _Layer(block, optimizer))
        except (ArtefactError, KeyError):  # none, or damaged since
            return None
        return (block, *([] if optimizer is None else [optimizer]), *record["rest"])


def forget(folder: Path) -> None:
    """Remove the layers beside the stages: the pass is done, and stored as a whole.

    With them goes what a kill long ago left: nothing is written after the last stage to do so.
    """
    shutil.rmtree(folder / "layers", ignore_errors=True)
    sweep(folder)


def _leading(ahead: deque[tuple[int, tuple[Any, ...] | None]]) -> Iterator[tuple[Any, ...]]:
    while ahead and (found := ahead[0][1]) is not None:
        ahead.popleft()
        yield found


def _sorted_out(
    parts: tuple[Any, ...],
) -> tuple[nn.Module, torch.optim.Optimizer | None, list[Any]]:
    block, *rest = parts
    optimizer = next((p for p in rest if isinstance(p, torch.optim.Optimizer)), None)
    return block, optimizer, [p for p in rest if p is not optimizer]


class _Layer(nn.Module):
    """A block, and what an Adam knows of its parameters, as one module that shares their memory."""

    def __init__(self, block: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        super().__init__()
        self.block = block
        groups = [] if optimizer is None else optimizer.param_groups
        for i, p in enumerate(p for group in groups for p in group["params"]):
            assert optimizer is not None
            for name, value in (optimizer.state[p] or begin_adam(optimizer, p)).items():
                self.register_buffer(f"{name}_{i}", value)
