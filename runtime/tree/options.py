"""What ``model.generate`` is told, as far as it can be done with trees; the rest is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import SkimpError
from .verify import Sampling

_USED = {
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length",
    "max_new_tokens", "eos_token_id", "pad_token_id", "num_return_sequences",
}  # fmt: skip
_HARMLESS = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size",
    "bos_token_id", "decoder_start_token_id", "transformers_version", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "use_mtp", "max_time", "early_stopping", "length_penalty", "renormalize_logits",
    "token_healing", "_from_model_config", "constraints", "force_words_ids", "dola_layers",
}  # fmt: skip
"""Of the assistant and the cache that are not used, or without effect where there are no beams."""
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "min_length": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0.0, "guidance_scale": 1.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one call.

    Attributes:
        sampling: How tokens are chosen.
        most: New tokens per row; ``None``: as many as lead to ``length`` in all.
        length: Of a row, padding included.
        stop: Tokens that end a row.
        pad: Fills rows that ended earlier than others.
        copies: Rows per prompt.
    """

    sampling: Sampling
    most: int | None
    length: int
    stop: frozenset[int]
    pad: int
    copies: int

    @classmethod
    def of(cls, given: Mapping[str, Any], config: Any, model_config: Any) -> "Options":
        """Merge keyword arguments over a generation config, with the defaults of transformers.

        Args:
            given: Keyword arguments of ``generate``.
            config: A ``GenerationConfig``.
            model_config: The model's own, of which the ends may be taken.

        Raises:
            SkimpError: Something is asked for that trees do not do.
        """
        merged = {k: v for k, v in config.to_dict().items() if v is not None}
        if "max_length" in given and "max_new_tokens" not in given:
            merged.pop("max_new_tokens", None)  # what is asked for now counts
        merged |= {k: v for k, v in given.items() if v is not None}
        refused = sorted(
            name
            for name, value in merged.items()
            if name not in _USED
            and name not in _HARMLESS
            and not (value is False or value == [] or _NEUTRAL.get(name) == value)
        )
        if refused:
            raise SkimpError(
                f"skimp.generate does not know {', '.join(refused)}: it does greedy decoding and "
                "sampling with temperature, top_k, top_p and repetition_penalty; use the model's "
                "own generate() for others"
            )
        if not merged.get("do_sample", False):
            sampling = Sampling(repetition_penalty=float(merged.get("repetition_penalty", 1.0)))
        else:
            sampling = Sampling(
                temperature=float(merged.get("temperature", 1.0)),
                top_k=int(merged.get("top_k", 50)),
                top_p=float(merged.get("top_p", 1.0)),
                repetition_penalty=float(merged.get("repetition_penalty", 1.0)),
                seed=int(torch.randint(1 << 31, ())),  # of torch's stream, as transformers does
            )
        copies = int(merged.get("num_return_sequences", 1))
        if copies > 1 and sampling.greedy:
            raise SkimpError("num_return_sequences > 1 gives equal texts unless do_sample is set")
        ends = merged.get("eos_token_id", getattr(model_config, "eos_token_id", None))
        stop = frozenset([ends] if isinstance(ends, int) else ends or ())
        pad = merged.get("pad_token_id", getattr(model_config, "pad_token_id", None))
        if pad is None:
            pad = min(stop, default=0)
        most = merged.get("max_new_tokens")
        length = int(merged.get("max_length", 0))
        if not length and most is None:
            most = 20  # as transformers has it
        return cls(sampling, None if most is None else int(most), length, stop, int(pad), copies)

    def limits(self, lengths: list[int], width: int) -> list[int]:
        """Most new tokens by row.

        Args:
            lengths: Of prompts, without padding.
            width: Of the padded batch, which ``max_length`` counts.

        Raises:
            SkimpError: The prompts leave no room.
        """
        most = self.most if self.most is not None else self.length - width
        if most < 1:
            raise SkimpError(
                f"prompts of {width} tokens leave no room below max_length={self.length}: give "
                "max_new_tokens"
            )
        return [most] * len(lengths)
