"""``model.generate`` with trees: the same call, the same greedy text, sooner."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import SkimpError
from .costs import Costs
from .drafting import Drafting
from .drawn import DrawnPolicy, Draws
from .engine import Engine, Prices, Stream
from .options import Options
from .policy import Base, CostPolicy
from .published import CastPolicy, FixedPolicy
from .report import Report
from .target import Target
from .verify import Sampling

MODES = ("lambda", "cast", "eagle2", "drawn", "plain")


class TreeDecoder:
    """A model that decodes with trees. What it learned of its drafters lasts from call to call.

    On the CPU the step is generated C++ where the model allows it (a copy of what the weights are
    now; make a new decoder after training), else the model's own code.

    Args:
        model: A causal language model of transformers.
        draft: What proposes: see :class:`~skimp.runtime.tree.drafting.Drafting`.
        mode: ``lambda`` drafts and verifies what pays by measured costs, ``cast`` by the rule of
            arXiv 2510.26577, ``eagle2`` always 60 nodes in 7 layers of 10; ``drawn`` verifies
            chains drawn from the law of a ``model``, for sampled text; ``plain`` drafts nothing.
        tokenizer: Of the model; needed where a drafter has another one.
        dtype: Of weights and cache in the generated step; by default the model's.
        profiling: Seconds that measuring costs may take the first time on a machine.
        target: Verifies instead of what would be made of the model.
        prices: Costs instead of measured ones.

    Attributes:
        report: Of the last call.

    Raises:
        TargetError: The model cannot verify trees, and why; or a drafter does not fit it.
    """

    def __init__(
        self,
        model: Any,
        *,
        draft: str | Drafting = "ngram",
        mode: str = "lambda",
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        profiling: float = 12.0,
        target: Target | None = None,
        prices: Prices | None = None,
    ) -> None:
        if mode not in MODES:
            raise SkimpError(f"mode {mode!r} is none of {', '.join(MODES)}")
        drafting = Drafting.parse(draft) if isinstance(draft, str) else draft
        if mode == "plain":
            drafting = Drafting(())
        self.tokenizer = tokenizer
        self.target: Target
        if target is not None:
            self.target, self.model = target, model
        else:
            self.target, self.model = drafting.target(model, dtype)
        device = "cuda" if getattr(model, "device", torch.device("cpu")).type == "cuda" else "cpu"
        self.prices = prices or Costs(self.target.name, device, profiling)
        drafters = drafting.make(self.target, self.prices, self.model, tokenizer)
        if mode == "drawn" and not (drafters and isinstance(drafters[0], Draws)):
            raise SkimpError("mode drawn needs a drafter that has a law to draw from: model:PATH")
        kinds: dict[str, type[Base]] = {
            "cast": CastPolicy, "eagle2": FixedPolicy, "drawn": DrawnPolicy,
        }  # fmt: skip
        policy = kinds.get(mode, CostPolicy)(drafters, _unknown)
        self.engine = Engine(self.target, drafters, policy, self.prices)

    @property
    def report(self) -> Report:
        """Of the last call."""
        return self.engine.report

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        limits: Sequence[int],
        stop: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        stream: Stream | None = None,
    ) -> list[list[int]]:
        """Continue prompts given as tokens; see :meth:`Engine.run`."""
        return self.engine.run(prompts, limits=limits, stop=stop, sampling=sampling, stream=stream)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor:
        """Do what ``model.generate`` does.

        Args:
            inputs: Prompts, ``[B, n]``.
            generation_config: By default the model's.
            input_ids: Another name for ``inputs``.
            attention_mask: ``[B, n]``, 0 where a prompt is padded, on the left or on the right.
            streamer: Of transformers; for one row.
            options: Fields of a generation config, which it overrides.

        Returns:
            Prompts and what follows, ``[B * num_return_sequences, n + longest]``.

        Raises:
            SkimpError: Something is asked for that trees do not do.
        """
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            raise SkimpError("give input_ids: prompts are not made up")
        options.pop("token_type_ids", None)
        config = generation_config or self.model.generation_config
        asked = Options.of(options, config, self.model.config.get_text_config())
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        ids = ids.repeat_interleave(asked.copies, 0)
        mask = mask.repeat_interleave(asked.copies, 0)
        prompts = [row[m.bool()].tolist() for row, m in zip(ids.cpu(), mask.cpu(), strict=True)]
        if streamer is not None and len(prompts) > 1:
            raise SkimpError("a streamer takes one row; give one prompt")

        def told(_: int, tokens: list[int]) -> None:
            for token in tokens:
                streamer.put(torch.tensor([token]))

        if streamer is not None:
            streamer.put(ids.cpu())
        texts = self.run(
            prompts,
            limits=asked.limits([len(p) for p in prompts], ids.shape[1]),
            stop=asked.stop,
            sampling=asked.sampling,
            stream=None if streamer is None else told,
        )
        if streamer is not None:
            streamer.end()
        longest = max(map(len, texts))
        padded = [t + [asked.pad] * (longest - len(t)) for t in texts]
        return torch.cat([ids, torch.tensor(padded, device=ids.device)], 1)


class _Held(dict[tuple[str, str], TreeDecoder]):
    """A model's decoders, kept on the model: they refer to it, so they are freed with it only so.

    A copy of the model has other weights to come and gets none of them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return _Held()

    def __reduce__(self) -> tuple[type["_Held"], tuple[()]]:
        return _Held, ()


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    draft: str = "ngram",
    mode: str = "lambda",
    tokenizer: Any = None,
    **options: Any,
) -> Tensor:
    """``model.generate(...)`` with trees; ``skimp.generate(model, **tokenizer(text))``.

    A decoder is made of the model at the first call and kept as long as the model; its weights are
    those of that call. :class:`TreeDecoder` says more, and has a report of each call.

    Args:
        model: A causal language model of transformers.
        inputs: Prompts, ``[B, n]``.
        draft: What proposes: ``ngram``, ``model:PATH``, .., joined by commas.
        mode: How much is drafted and verified.
        tokenizer: Of the model; needed where a drafter has another one.
        options: Of ``generate``: ``attention_mask``, ``max_new_tokens``, ``do_sample``, ...

    Returns:
        Prompts and what follows.

    Raises:
        SkimpError: The model cannot verify trees, or something is asked for that they do not do.
    """
    held: _Held = model.__dict__.setdefault("_skimp_decoders", _Held())
    decoder = held.get((draft, mode))
    if decoder is None:
        decoder = TreeDecoder(model, draft=draft, mode=mode, tokenizer=tokenizer)
        held[draft, mode] = decoder
    return decoder.generate(inputs, **options)


def _unknown(rows: int) -> float:
    raise SkimpError(f"nobody has said what {rows} rows cost")  # the engine does before each step
