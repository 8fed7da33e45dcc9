"""A member in this process: a causal language model, dense or converted.

One thread generates, so requests queue; the samples of one request are one batch. Members that
name the same model share its weights and that thread, each with its own tau: dense and sparse are
two members of one model in memory.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...ir.errors import SkimpError
from ...passes.budget import set_tau
from ...passes.lift import blocks
from ..models import load_decoder
from .member import Chunk, Kind, MemberError, Reply

MOST_TOKENS = 8192


class Weights:
    """A Hugging Face causal language model in memory, and the thread that runs it.

    Args:
        model: With ``generate``; dense or converted.
        tokenizer: Its tokenizer; chats need its chat template.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="skimp-local")
        self.taus = {name: float(block.tau) for name, block in blocks(model).items()}
        self.members = 0

    def turn(self, tau: float | None) -> None:
        """Set the threshold of all blocks, or what they were saved with; in the thread."""
        if self.taus:
            set_tau(self.model, self.taus if tau is None else tau)


_LOADED: WeakValueDictionary[str, Weights] = WeakValueDictionary()


class LocalModel:
    """A model in memory as a member.

    Args:
        name: Shown as ``model`` in replies.
        weights: What it runs on; other members may run on them too.
        tau: Threshold of a converted model; as it was saved if ``None``.
        defaults: Fields for requests that do not have them.
        max_tokens: For requests that set no limit.

    Raises:
        SkimpError: A tau outside [0, 1], or for a model without dynamic-k blocks.
    """

    batches = True

    def __init__(
        self,
        name: str,
        weights: Weights,
        *,
        tau: float | None = None,
        defaults: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
    ) -> None:
        if tau is not None and not weights.taus:
            raise SkimpError(f"{name} is not converted, so it has no tau: leave it out")
        if tau is not None and not 0 <= tau <= 1:
            raise SkimpError(f"{name}: tau {tau} is outside [0, 1]")
        self.name, self.weights, self.tau = name, weights, tau
        self.model, self.tokenizer = weights.model, weights.tokenizer
        self.defaults = dict(defaults or {})
        self.max_tokens = max_tokens
        weights.members += 1

    @classmethod
    def load(
        cls,
        name: str,
        *,
        tau: float | None = None,
        defaults: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
    ) -> "LocalModel":
        """Load ``smollm2``, a folder that ``skimp.save_pretrained`` wrote, or a model on the hub.

        Members with the same ``name`` share one copy of it.

        Raises:
            SkimpError: It cannot be loaded; says why.
        """
        weights = _LOADED.get(name)
        if weights is None:
            weights = _LOADED[name] = Weights(*_load(name))
        return cls(name, weights, tau=tau, defaults=defaults, max_tokens=max_tokens)

    async def close(self) -> None:
        """Stop the thread with its last member; what it is generating is not waited for."""
        self.weights.members -= 1
        if self.weights.members == 0:
            _LOADED.pop(self.name, None)
            self.weights.worker.shutdown(wait=False, cancel_futures=True)

    async def complete(self, kind: Kind, request: Mapping[str, Any]) -> Reply:
        """Generate ``n`` samples."""
        job = _Job(self, kind, {**self.defaults, **request})
        texts = await self._run(job)
        choices = [job.choice(i, text) for i, text in enumerate(texts)]
        return Reply({**job.head(chunk=False), "choices": choices, "usage": job.usage()})

    async def stream(self, kind: Kind, request: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """Generate one sample, text by text."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def put(text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        job = _Job(self, kind, {**self.defaults, **request, "n": 1}, put)
        task = asyncio.ensure_future(self._run(job))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        head = job.head(chunk=True)
        try:
            while (text := await pieces.get()) is not None:
                yield Chunk.of({**head, "choices": [job.delta(text)]})
            await task
            yield Chunk.of({**head, "choices": [job.delta(None)]})
            yield Chunk.of({**head, "choices": [], "usage": job.usage()})
        finally:
            job.stop.set()
            task.cancel()

    async def _run(self, job: "_Job") -> list[str]:
        future = asyncio.get_running_loop().run_in_executor(self.weights.worker, job.run)
        try:
            return await future
        except asyncio.CancelledError:
            job.stop.set()
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise MemberError("error", f"generation failed: {type(error).__name__}") from error


class _Job:
    """One request to generate."""

    def __init__(
        self,
        member: LocalModel,
        kind: Kind,
        request: Mapping[str, Any],
        put: Callable[[str], None] | None = None,
    ) -> None:
        self.member, self.kind, self.request, self.put = member, kind, request, put
        self.stop = Event()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finishes: list[str] = []
        self.id = f"skimp-{uuid.uuid4().hex[:24]}"
        self.temperature = self._number("temperature", 0.0, 0.0, 10.0)
        self.top_p = self._number("top_p", 1.0, 1e-6, 1.0)
        self.n = int(self._number("n", 1, 1, 128))
        self.ids = self._encode()

    def _number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.request.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _bad(f"`{name}` is not a number")
        if not least <= value <= most:
            raise _bad(f"`{name}` is {value:g}; it lies in [{least:g}, {most:g}]")
        return value

    def _encode(self) -> Tensor:
        request, tokenizer = self.request, self.member.tokenizer
        try:
            if self.kind == "chat/completions":
                messages = [
                    {"role": str(m["role"]), "content": _text(m.get("content"))}
                    for m in request["messages"]
                ]
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            else:
                ids = tokenizer(_text(request["prompt"]), return_tensors="pt")["input_ids"]
        except MemberError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise _bad(f"the messages cannot be rendered: {error}") from error
        most = getattr(self.member.model.config, "max_position_embeddings", MOST_TOKENS)
        if ids.shape[1] + 1 > most:
            raise _bad(f"the prompt has {ids.shape[1]} tokens, and the model takes {most}")
        self.prompt_tokens = ids.shape[1]
        self.room = most - ids.shape[1]
        tokens: Tensor = ids
        return tokens

    def run(self) -> list[str]:
        """Generate, in the thread; stops at the next token once ``stop`` is set."""
        if self.stop.is_set():
            return []
        request, tokenizer = self.request, self.member.tokenizer
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        limit = limit if isinstance(limit, int) and limit > 0 else self.member.max_tokens
        options: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            options = dict(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=0)
        if isinstance(seed := request.get("seed"), int):
            torch.manual_seed(seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.member.weights.turn(self.member.tau)
        with torch.inference_mode():
            out = self.member.model.generate(
                self.ids.repeat(self.n, 1),
                attention_mask=torch.ones_like(self.ids).repeat(self.n, 1),
                max_new_tokens=min(limit, self.room, MOST_TOKENS),
                pad_token_id=pad,
                stopping_criteria=[self._look],
                **options,
            )
        texts = []
        end = self._ends()
        for row in out[:, self.prompt_tokens :].tolist():
            stops = [i for i, t in enumerate(row) if t in end]
            row = row[: stops[0]] if stops else row
            self.completion_tokens += len(row) + bool(stops)
            text, cut = self._cut(tokenizer.decode(row, skip_special_tokens=True))
            texts.append(text)
            self.finishes.append("stop" if stops or cut else "length")
        if self.put is not None:
            self._emit(texts[0])
        return texts

    _sent = ""

    def _look(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """After every token: stop where asked to, and hand on what can be shown."""
        done = self.stop.is_set()
        if self.put is not None or self._stops():
            texts = self.member.tokenizer.batch_decode(
                ids[:, self.prompt_tokens :], skip_special_tokens=True
            )
            cut = [self._cut(t.rstrip("\ufffd")) for t in texts]  # half a character stops nothing
            if self.put is not None and not texts[0].endswith("\ufffd"):
                self._emit(cut[0][0] if cut[0][1] else self._safe(cut[0][0]))
            return torch.tensor([done or found for _, found in cut])
        return torch.full((len(ids),), done)

    def _emit(self, text: str) -> None:
        if self.put is not None and len(text) > len(self._sent) and text.startswith(self._sent):
            self.put(text[len(self._sent) :])
            self._sent = text

    def _safe(self, text: str) -> str:
        """Without what could be the beginning of a stop text."""
        keep = max((len(s) for s in self._stops()), default=1) - 1
        return text[: len(text) - keep] if keep else text

    def _stops(self) -> list[str]:
        stop = self.request.get("stop") or []
        return [stop] if isinstance(stop, str) else [s for s in stop if isinstance(s, str) and s]

    def _cut(self, text: str) -> tuple[str, bool]:
        at = min((i for s in self._stops() if (i := text.find(s)) >= 0), default=-1)
        return (text[:at], True) if at >= 0 else (text, False)

    def _ends(self) -> set[int]:
        end = self.member.model.generation_config.eos_token_id
        end = self.member.tokenizer.eos_token_id if end is None else end
        return set(end if isinstance(end, list) else [end])

    # -- in OpenAI's form -------------------------------------------------------------------------

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """What every object of this request has."""
        chat = self.kind == "chat/completions"
        kind = (
            ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        )
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.member.name,
        }

    def choice(self, index: int, text: str) -> dict[str, Any]:
        """A sample."""
        finish = self.finishes[index]
        if self.kind == "completions":
            return {"index": index, "text": text, "finish_reason": finish}
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": finish}

    def delta(self, text: str | None) -> dict[str, Any]:
        """A piece of the sample, or its end."""
        finish = self.finishes[0] if text is None else None
        if self.kind == "completions":
            return {"index": 0, "text": text or "", "finish_reason": finish}
        delta = {} if text is None else {"role": "assistant", "content": text}
        return {"index": 0, "delta": delta, "finish_reason": finish}

    def usage(self) -> dict[str, int]:
        """Tokens; those of the prompt once, however many samples there are."""
        both = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": both,
        }


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" for p in content
    ):
        return "".join(str(p.get("text", "")) for p in content)
    raise _bad("this model reads text alone")


def _bad(message: str) -> MemberError:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": "bad_request"}}
    return MemberError("400", message, 400, body=body)


def _load(name: str) -> tuple[Any, Any]:
    loaded = load_decoder(name)
    return loaded.model, loaded.tokenizer
