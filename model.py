"""The network: waveforms and a question in, an answer out.

    from model import PolyAudio
    net = PolyAudio.from_dir("weights/af3")             # any of the bases below, or runs/<name>
    print(net.answer("Which clip is louder?", [wave_1, wave_2]))

  samples ─ log-mel ─▶ encoder ─▶ resampler ─▶ slots ─┐
                                                      ├─ splice ─▶ decoder ─▶ logits
  question ─────────── tokens ─▶ embeddings ──────────┘

Bases, read from their Hugging Face folders as they are: Audio Flamingo 3, Qwen2-Audio, our own
(AF3's layout at any size, with a perceiver if it says so), and the text models Qwen2, Qwen2.5 and
Qwen3. Parameters keep their Hugging Face names, so the file's keys are the code's names.

There is no padding anywhere. All windows lie end to end in one row, all examples in another, and
`attention` keeps them apart by their lengths; the hot loops are in kernels/. Dimensions, in the
comments from here on:

  B rows (examples)   N windows in the batch   F mel frames       M mel bins    S encoder positions
  Q slots             T decoder positions      E encoder width    D decoder width
  H heads             G kv heads               K head size        V vocabulary  R LoRA rank
  L valid frames of a window, before the two of context; `rows` where it does not matter which
"""

import hashlib
import math
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, count
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import (
    attention,
    cross_entropy,
    decode,
    layer_norm,
    linear,
    pack,
    pool,
    rms_norm,
    rope,
    splice,
    swiglu,
)
from prepare import (
    COMPANIONS,
    INDEX,
    LAYOUTS,
    BadInput,
    Tokenizer,
    check_fits,
    clip_order,
    expect,
    fits,
    hash_of,
    log_mels,
    n_frames,
    n_slots,
    note,
    open_shard,
    open_tensors,
    read_json,
    shard_files,
    split_windows,
    write_json,
)

# ------------------------------------------------------------------------------------------------
# Configuration: read from the checkpoint's config.json, never typed twice. The defaults are those
# of transformers, because files on the Hub leave out what equals them.


# field: (default, what the files call it, the newer name first)
ENCODER_FIELDS = {
    "width": (1280, "hidden_size", "d_model"),
    "layers": (32, "num_hidden_layers", "encoder_layers"),
    "heads": (20, "num_attention_heads", "encoder_attention_heads"),
    "ffn": (5120, "intermediate_size", "encoder_ffn_dim"),
    "mels": (128, "num_mel_bins"),
    "positions": (1500, "max_source_positions"),
}
DECODER_FIELDS = {
    "width": (4096, "hidden_size"),
    "layers": (32, "num_hidden_layers"),
    "heads": (32, "num_attention_heads"),
    "kv_heads": (None, "num_key_value_heads"),
    "head_size": (None, "head_dim"),
    "ffn": (22016, "intermediate_size"),
    "vocab": (151936, "vocab_size"),
    "eps": (1e-6, "rms_norm_eps"),
    "theta": (10_000.0, "rope_theta"),
    "context": (32768, "max_position_embeddings"),
}
# What this code computes; a checkpoint that asks for something else would load and be wrong.
FIXED = {
    "audio_config.": {"activation_function": "gelu", "scale_embedding": False, "num_mel_bins": 128,
                      "max_source_positions": 1500},
    "text_config.": {"hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"},
    "": {"projector_hidden_act": "gelu", "projector_bias": True},
}  # fmt: skip
# model_type -> (resampler, audio token by default, seconds of a clip that it hears)
BASES = {
    "audioflamingo3": ("mlp", 151669, 600),
    "qwen2_audio": ("linear", 151646, 30),
    "polyaudio": ("perceiver", 151669, 600),
    "qwen2": (None, None, 0),
    "qwen3": (None, None, 0),
}


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network, and `raw`, the file as it was found."""

    raw: dict
    kind: str  # one of BASES
    encoder: SimpleNamespace | None  # ENCODER_FIELDS; None for a text model
    decoder: SimpleNamespace  # DECODER_FIELDS and qkv_bias, qk_norm
    resampler: dict  # kind, and a perceiver's slots, layers, heads
    audio_token: int | None  # the id that a slot takes the place of
    max_seconds: float  # of a clip that is heard
    layout: str  # of its prompts, see prepare.py
    may_tie: bool  # the head may be the embeddings, if the files hold no head

    @classmethod
    def from_dir(cls, dir) -> "Config":
        path = Path(dir) / "config.json"
        expect(Path(dir).is_dir(), dir, "a folder of weights", "no such folder")
        expect(path.exists(), dir, "config.json in a folder of weights", "none")
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, raw: dict, source="config.json") -> "Config":
        expect(isinstance(raw, dict), source, "an object with a model_type", f"{raw!r:.60}")
        kind = raw.get("model_type")
        known = isinstance(kind, str) and kind in BASES
        expect(known, f"{source}: model_type", "one of " + ", ".join(BASES), kind)
        resampler, audio_token, max_seconds = BASES[kind]
        audio, text = raw.get("audio_config") or {}, raw.get("text_config") or {}
        text = text if resampler else raw
        for section in (audio, text, raw.get("resampler") or {}):
            expect(isinstance(section, dict), source, "sections of fields", f"{section!r:.60}")
        resampler = {"kind": resampler, **(raw.get("resampler") or {})}
        sizes = [resampler.get(name, 1) for name in ("slots", "layers", "heads")]
        fine = all(type(n) is int and 0 < n < 1 << 16 for n in sizes)
        fine = fine and (resampler["kind"] != "perceiver" or "slots" in resampler)
        fine = fine and resampler["kind"] in (*RESAMPLERS, None)
        expect(fine, f"{source}: resampler", "a known kind, a perceiver with its slots", resampler)
        slot = raw.get("audio_token_id", raw.get("audio_token_index", audio_token))
        expect(slot is None or type(slot) is int, f"{source}: audio_token_id", "an id", repr(slot))
        layout = raw.get("layout", "native")
        expect(layout in LAYOUTS, f"{source}: layout", " or ".join(LAYOUTS), repr(layout))
        family = text.get("model_type", "qwen2")
        where = f"{source}: text_config.model_type"
        expect(family in (kind, "qwen2", "qwen3"), where, "qwen2 or qwen3", family)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        expect(isinstance(rope, dict), f"{source}: rope_parameters", "fields", f"{rope!r:.60}")
        text = {**text, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
        for name, section in (("audio_config.", audio), ("text_config.", text), ("", raw)):
            for field, wanted in FIXED[name].items():
                found = section.get(field, wanted)
                expect(found == wanted, f"{source}: {name}{field}", wanted, found)
        qwen3 = "qwen3" in (kind, text.get("model_type"))
        encoder = read_fields(ENCODER_FIELDS, audio, source) if resampler["kind"] else None
        decoder = read_fields(DECODER_FIELDS, text, source)
        shared = 32 if "num_key_value_heads" not in text else decoder.heads  # absent is not null
        decoder.kv_heads = decoder.kv_heads or shared
        even = decoder.heads % decoder.kv_heads == 0
        where = f"{source}: num_key_value_heads"
        expect(even, where, f"a divisor of {decoder.heads}", decoder.kv_heads)
        even = not encoder or encoder.width % resampler.get("heads", encoder.heads) == 0
        expect(even, f"{source}: resampler: heads", "a divisor of the width", resampler)
        decoder.head_size = decoder.head_size or (128 if qwen3 else decoder.width // decoder.heads)
        decoder.qkv_bias = text.get("attention_bias", False) if qwen3 else True  # Qwen2 has biases,
        decoder.qk_norm = qwen3  # Qwen3 normalises every head instead
        return cls(
            raw=raw,
            kind=kind,
            encoder=encoder,
            decoder=decoder,
            resampler=resampler,
            audio_token=slot,
            max_seconds=max_seconds,
            layout=layout,
            may_tie=text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False)),
        )


def read_fields(table: dict, section: dict, source) -> SimpleNamespace:
    """Each field by the first of its names that the section holds, or its default."""
    found = {}
    for field, (default, *names) in table.items():
        name = next((name for name in names if section.get(name) is not None), None)
        found[field] = default if name is None else section[name]
        kind, most = (float, 1e15) if field in ("eps", "theta") else (int, 1 << 24)
        most = 1 << 10 if field == "layers" else most
        fine = name is None or (fits(found[field], kind) and 0 < found[field] <= most)
        expect(fine, f"{source}: {name}", f"a number above 0, {most} at most", repr(found[field]))
    even = found["width"] % found["heads"] == 0 or found.get("head_size")
    expect(even, f"{source}: heads", f"divisors of the width {found['width']}", found["heads"])
    return SimpleNamespace(**found)


# ------------------------------------------------------------------------------------------------
# Layers that all parts share.


class Linear(nn.Linear):
    """y = W x + b; with an adapter y = W x + b + (alpha / r) B A x, which `attach` adds.

    A (R, in) starts random and B (out, R) at zero, so that at first nothing changes. Both stay in
    float32 whatever W is. Merging writes W + (alpha / r) B A into a new weight and keeps the old
    tensor aside, so that unmerging gives back every bit.
    """

    scale = dropout = 0.0
    unmerged = ()  # holds the weight from before merging; bare, it would be one more parameter
    blocked = ()  # a copy laid out for few rows, see kernels/linear.py, and of which weight

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def attach(self, rank: int, scale: float, dropout: float = 0.0):
        self.scale, self.dropout = scale, dropout
        where = {"device": self.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):  # (T, in) -> (T, out)
        fresh = self.blocked and self.blocked[1:] == (id(self.weight), self.weight._version)
        y = linear(x, self.weight, self.bias, self.blocked[0] if fresh else None)
        if self.lora_A is None or self.unmerged:
            return y
        dropped = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        low = linear(linear(dropped, self.lora_A), self.lora_B)  # (T, R) -> (T, out)
        return (y + low * self.scale).to(y.dtype)

    def folded(self) -> torch.Tensor:
        """W + (alpha / r) B A, computed in float32."""
        if self.lora_A is None or self.unmerged:
            return self.weight.detach()
        update = self.lora_B.detach() @ self.lora_A.detach() * self.scale
        return (self.weight.detach().float() + update).to(self.weight.dtype)

    def merge(self):
        if self.lora_A is not None and not self.unmerged:
            self.weight, self.unmerged = nn.Parameter(self.folded(), False), (self.weight,)

    def unmerge(self):
        if self.unmerged:
            (self.weight,), self.unmerged = self.unmerged, ()


class Embedding(nn.Embedding):
    """Token embeddings, of which a few rows (BOA, EOA) may be replaced by trainable ones."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_parameter("lora_rows", None)  # (n, D) float32, and
        self.register_buffer("row_ids", None, persistent=False)  # (n,) the tokens they stand for

    def replace(self, ids: list[int]):
        self.row_ids = torch.tensor(ids, device=self.weight.device)
        self.lora_rows = nn.Parameter(self.weight[self.row_ids].detach().float().clone())

    def forward(self, ids):  # (T,) -> (T, D)
        x = F.embedding(ids, self.weight)
        if self.lora_rows is None:
            return x
        same = ids[:, None] == self.row_ids  # (T, n)
        rows = same.to(x.dtype) @ self.lora_rows.to(x.dtype)
        return torch.where(same.any(1, keepdim=True), rows, x)

    def folded(self) -> torch.Tensor:
        if self.lora_rows is None:
            return self.weight.detach()
        rows = self.lora_rows.detach().to(self.weight.dtype)
        return self.weight.detach().index_copy(0, self.row_ids, rows)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


def numbers(values, device=None, dtype=torch.int64) -> torch.Tensor:
    """A list as a tensor there. To a GPU it goes from pinned memory, so that nobody has to wait
    until the work before it is done."""
    made = torch.tensor(values, dtype=dtype)
    if torch.device(device or "cpu").type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


def cumulative(lengths, device=None) -> torch.Tensor:
    """Lengths of segments -> where each begins and the last one ends, as attention wants it."""
    return numbers([0, *accumulate(lengths)], device, torch.int32)


def concat(parts) -> torch.Tensor:
    """torch.cat, which would copy a single part too."""
    return torch.cat(parts) if parts[1:] else parts[0]


def ranges(starts, lengths, device=None) -> torch.Tensor:
    """The indices start .. start + length - 1 of every segment, one after another."""
    return numbers([i for s, n in zip(starts, lengths) for i in range(s, s + n)], device)


# ------------------------------------------------------------------------------------------------
# The encoder: Whisper's, on the frames that exist.


class EncoderAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x, seen, cu_q, cu_k):  # queries from x (S, E), keys and values from `seen`
        q, k, v = self.q_proj(x), self.k_proj(seen), self.v_proj(seen)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))  # (S, H, K)
        return self.out_proj(attention(q, k, v, cu_q, cu_k, False).flatten(1))


class EncoderLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(width)
        self.self_attn = EncoderAttention(width, heads)
        self.final_layer_norm = LayerNorm(width)
        self.fc1 = Linear(width, ffn)
        self.fc2 = Linear(ffn, width)

    def forward(self, x, cu, seen=None, cu_seen=None):  # (S, E)
        y = self.self_attn_layer_norm(x)
        seen, cu_seen = (y, cu) if seen is None else (seen, cu_seen)
        x = x + self.self_attn(y, seen, cu, cu_seen)
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:
            x = x.clamp(-64_504, 64_504)  # as in training: one step from infinity in half precision
        return x


class Encoder(nn.Module):
    """Frames of any number of windows -> pooled rows, 40 ms each.

    A window comes as its L valid frames and two more (log_mel), laid into one row behind a frame
    of zeros, so that each begins at an odd place:

        place   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17
        frame   0  a  a  a  a  a  a  0  0  b  b  b  0  c  c  c  c  c     L + 2 = 6, 3, 5

    The zero is the first convolution's left padding. Its output there is set back to zero, for it
    is the second one's padding too. That one has stride 2 from place 0 on, so its output j of a
    window lands at (place of the window - 1) / 2 + j. The two extra frames are the right context
    of the last valid output; what is computed on them is not read.
    """

    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv1d(config.mels, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2)
        self.embed_positions = nn.Embedding(config.positions, config.width)
        shape = (config.width, config.heads, config.ffn)
        self.layers = nn.ModuleList(EncoderLayer(*shape) for _ in range(config.layers))
        self.layer_norm = LayerNorm(config.width)

    def forward(self, mels, frames):
        """mels: (M, F) of each window, frames: its L. -> (Q, E), slots of each window."""
        lengths = [(n + 1) // 2 for n in frames]
        x = self.stem(mels, lengths)  # (S, E)
        cu = cumulative(lengths, x.device)
        for layer in self.layers:
            x = layer(x, cu)
        # Neighbours in pairs, inside their window. The last position of an odd window has no
        # partner; the others have attended to it, and that was its use.
        slots = [n // 2 for n in lengths]
        x = pool(x, cu, cumulative(slots, x.device), sum(slots))  # (S, E) -> (Q, E)
        return self.layer_norm(x), slots

    def stem(self, mels, lengths):
        """Both convolutions over all windows at once. -> (S, E) with positions added."""
        given = [mel.shape[1] for mel in mels]
        spans = [(1 + n + 1) // 2 * 2 for n in given]  # the zero, the frames, made even
        starts, like = cumulative(spans), self.conv1.weight
        places = int(starts[-1])
        edges = cumulative(given, like.device), starts.to(like.device)
        row = pack(torch.cat(mels, 1).to(like), *edges, places)[None]  # (1, M, places)
        x = F.gelu(self.conv1(row))  # (1, E, places)
        x = x.index_fill(2, edges[1][:-1].long(), 0.0)
        x = F.gelu(self.conv2(x))[0].T  # (places / 2 - 1, E)
        x = x[ranges((starts[:-1] // 2).tolist(), lengths, x.device)]  # (S, E), what is read
        return x + self.embed_positions.weight[ranges([0] * len(lengths), lengths, x.device)]


# ------------------------------------------------------------------------------------------------
# Resamplers: rows of the encoder -> slots of the decoder.


class MLP(nn.Module):
    """AF3: two linears."""

    def __init__(self, encoder, width, resampler):
        super().__init__()
        self.linear_1 = Linear(encoder.width, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x, lengths):  # (Q, E), slots of each clip -> (Q, D), the same
        return self.linear_2(F.gelu(self.linear_1(x))), lengths


class Projection(nn.Module):
    """Qwen2-Audio: one linear."""

    def __init__(self, encoder, width, resampler):
        super().__init__()
        self.linear = Linear(encoder.width, width)

    def forward(self, x, lengths):
        return self.linear(x), lengths


class Perceiver(nn.Module):
    """The fixed-K interface of the paper: K learned queries look at a clip, however long it is.

    Its layers are the encoder's, only that keys and values come from the clip, so that a query
    sees all of its own clip, no other query and no other clip. Ours alone: no published
    checkpoint has one.
    """

    def __init__(self, encoder, width, resampler):
        super().__init__()
        self.slots = resampler["slots"]
        shape = (encoder.width, resampler.get("heads", encoder.heads), encoder.ffn)
        self.queries = nn.Parameter(torch.randn(self.slots, encoder.width) * encoder.width**-0.5)
        self.layers = nn.ModuleList(EncoderLayer(*shape) for _ in range(resampler.get("layers", 2)))
        self.layer_norm = LayerNorm(encoder.width)
        self.linear = Linear(encoder.width, width)

    def forward(self, x, lengths):  # (sum of lengths, E) -> (clips * slots, D)
        slots = [self.slots] * len(lengths)
        cu, cu_seen = cumulative(slots, x.device), cumulative(lengths, x.device)
        z = self.queries.repeat(len(lengths), 1)
        for layer in self.layers:
            z = layer(z, cu, x, cu_seen)
        return self.linear(self.layer_norm(z)), slots


RESAMPLERS = {"mlp": MLP, "linear": Projection, "perceiver": Perceiver}


# ------------------------------------------------------------------------------------------------
# The decoder: Qwen2's, over packed rows, with or without a cache.


class Cache:
    """Keys and values of every layer, allocated once: rows x capacity. It also remembers what each
    row has read, so that a conversation that goes on reads only what is new."""

    def __init__(self, config, rows: int, capacity: int, like: torch.Tensor):
        shape = (config.layers, rows, config.kv_heads, capacity, config.head_size)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * rows
        self.ids = [[] for _ in range(rows)]
        self.clips = [[] for _ in range(rows)]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def plan(self, rows: list[int], lengths: list[int]) -> SimpleNamespace:
        """Where so many new tokens of each row go and what the rows hold then. It is the same in
        every layer, so a step works it out once, and a GPU is never waited for."""
        device, pasts = self.keys.device, [self.lengths[row] for row in rows]
        totals = [past + n for past, n in zip(pasts, lengths)]
        owners = [row for row, n in zip(rows, lengths) for _ in range(n)]
        return SimpleNamespace(
            fresh=not any(pasts),
            single=max(lengths) == 1,
            spans=list(zip(rows, totals)),
            places=(numbers(owners, device), ranges(pasts, lengths, device)),
            cu_seen=cumulative(totals, device),
            rows=numbers(rows, device, torch.int32),
            totals=numbers(totals, device, torch.int32),
        )

    def attend(self, plan, layer: int, q, k, v, cu):
        """Note the new k and v, then let each query see its row up to itself."""
        keys, values = self.keys[layer], self.values[layer]  # (B, G, capacity, K)
        owners, positions = plan.places
        keys[owners, :, positions], values[owners, :, positions] = k, v
        if plan.single:
            return decode(q, keys, values, plan.rows, plan.totals)
        if plan.fresh:
            return attention(q, k, v, cu, cu, True)
        k, v = (  # (T of all, G, K); of one row it is a view, and nothing is copied
            concat([part[row, :, :total].transpose(0, 1) for row, total in plan.spans])
            for part in (keys, values)
        )
        return attention(q, k, v, cu, plan.cu_seen, True)

    def record(self, rows, ids):
        """Note what the rows have read, after all layers have seen it."""
        for row, new in zip(rows, ids):
            self.lengths[row] += len(new)
            self.ids[row] = [*self.ids[row], *new]

    def rewind(self, row: int, ids: list[int], clips: list, slots: list[int], slot: int):
        """Keep what the row shares with a new conversation from its start on: (tokens, clips).

            read before   what is <a a a> and <b b b> ? a dog .      clips a, b
            new           what is <a a a> and <c c c> ? ...          clips a, c
            kept          what is <a a a> and                        6 tokens, 1 clip

        The last token is read again in any case, for its logits; a clip is kept whole or not at
        all. From here on the row counts the new clips as its own: they are read next."""
        tokens = len(os.path.commonprefix([self.ids[row], ids[:-1]]))
        places = [i for i, id in enumerate(ids) if id == slot]
        kept, first = 0, 0
        for old, clip, n in zip(self.clips[row], clips, slots):
            if old is not clip or places[first + n - 1] >= tokens:
                break
            kept, first = kept + 1, first + n
        if kept < len(clips):
            tokens = min(tokens, places[first])
        self.lengths[row], self.ids[row], self.clips[row] = tokens, ids[:tokens], list(clips)
        return tokens, kept


class DecoderAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, size, bias = config.width, config.head_size, config.qkv_bias
        self.head_size = size
        self.q_proj = Linear(width, config.heads * size, bias=bias)
        self.k_proj = Linear(width, config.kv_heads * size, bias=bias)
        self.v_proj = Linear(width, config.kv_heads * size, bias=bias)
        self.o_proj = Linear(config.heads * size, width, bias=False)
        self.q_norm = RMSNorm(size, config.eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos_sin, cu, remembering):
        """x: (T, D), cos_sin: 2 of (T, 1, K / 2); remembering: a layer of a Cache, or None."""
        heads = (-1, self.head_size)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # (T, H, K)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # (T, G, K)
        v = self.v_proj(x).unflatten(-1, heads)
        q, k = rope(q, k, *cos_sin)
        o = remembering(q, k, v, cu) if remembering else attention(q, k, v, cu, cu, True)
        return self.o_proj(o.flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn, bias=False)
        self.up_proj = Linear(config.width, config.ffn, bias=False)
        self.down_proj = Linear(config.ffn, config.width, bias=False)

    def forward(self, x):  # (T, D), some rows at a time: what lies between is several times as wide
        parts = x.split(4096)
        return concat([self.down_proj(swiglu(self.gate_proj(p), self.up_proj(p))) for p in parts])


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = GatedMLP(config)

    def forward(self, x, cos_sin, cu, remembering):  # (T, D)
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, cu, remembering)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.recompute = False  # keep only each layer's input for its gradient

    def forward(self, x, lengths, cache: Cache | None = None, rows=()):
        """x (T, D): examples end to end, of these lengths; with a cache they go on in its rows."""
        pasts = [cache.lengths[row] for row in rows] if cache else [0] * len(lengths)
        cu = cumulative(lengths, x.device)
        cos_sin = self.cos_sin(ranges(pasts, lengths, x.device), x.dtype)
        plan = cache.plan(rows, lengths) if cache else None
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, cos_sin, cu, partial(cache.attend, plan, i) if cache else None)
        return self.norm(x)

    def cos_sin(self, positions, dtype):
        """cos and sin of every position and plane: (T, 1, K / 2) each, computed in float32."""
        planes = torch.arange(0, self.config.head_size, 2, device=positions.device).float()
        speed = 1.0 / self.config.theta ** (planes / self.config.head_size)
        angle = (positions.float()[:, None] * speed)[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)


# ------------------------------------------------------------------------------------------------
# The whole network.

ENCODER_FRAMES = 60_000  # frames (10 minutes) that the encoder takes at a time


class PolyAudio(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.dir, self.layout = config, None, config.layout
        self.text_only = config.encoder is None
        self.adapter = {}  # PEFT's adapter_config of what is attached
        if config.encoder:
            shape = (config.encoder, config.decoder.width, config.resampler)
            self.audio_tower = Encoder(config.encoder)
            self.multi_modal_projector = RESAMPLERS[config.resampler["kind"]](*shape)
        self.language_model = Decoder(config.decoder)
        self.lm_head = Linear(config.decoder.width, config.decoder.vocab, bias=False)

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings."""
        return self.lm_head.weight is self.language_model.embed_tokens.weight

    @cached_property
    def tokenizer(self) -> Tokenizer:
        expect(self.dir is not None, "tokenizer", "a network from a folder", "one without")
        return Tokenizer.from_dir(self.dir)

    @cached_property
    def stops(self) -> list[int]:
        """Ids that end an answer, as the checkpoint's generation_config says."""
        path = self.dir / "generation_config.json" if self.dir else None
        made = read_json(path) if path and path.exists() else {}
        expect(isinstance(made, dict), path, "an object of fields", f"{made!r:.60}")
        found = made.get("eos_token_id")
        text = self.config.raw.get("text_config", self.config.raw)
        found = text.get("eos_token_id") if found is None else found
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    @property
    def ends(self) -> list[int]:
        """The same, and the tokenizer's own ends: for answers in words."""
        return [*self.stops, *self.tokenizer.ends]

    @cached_property
    def known_ids(self) -> int:
        """Rows of the vocabulary that have a token; the rest is padding and never to be said."""
        files = ("tokenizer.json", "vocab.json")
        if self.dir is None or not any((self.dir / name).exists() for name in files):
            return self.config.decoder.vocab
        return min(len(self.tokenizer), self.config.decoder.vocab)

    # --- sounds in

    # A clip is its samples, 1-D float32; or, so that nothing is worked out twice, what was made of
    # them before: its windows, as `windows` gives them, or the encoder's rows of it, (Q, E).

    def n_slots(self, clip) -> int:
        """Rows that the decoder will read for that clip, of which the number of samples is enough;
        0 if it is too short to be heard."""
        expect(self.config.encoder, "clips", "a network that hears", self.config.kind)
        if isinstance(clip, int):  # not read yet: so many samples
            slots = n_slots(clip, self.config.max_seconds)
        elif isinstance(clip, list):
            slots = sum((frames + 1) // 2 // 2 for _, frames in clip)
        elif is_rows(clip):
            slots = len(clip)
        else:
            fine = hasattr(clip, "ndim") and clip.ndim == 1
            expect(fine, "clip", "samples of one channel", getattr(clip, "shape", type(clip)))
            expect("float" in str(clip.dtype), "clip", "floats in -1 .. 1", clip.dtype)
            slots = n_slots(len(clip), self.config.max_seconds)
        return self.config.resampler.get("slots", slots) if slots else 0

    def windows(self, waves) -> list[list[tuple[torch.Tensor, int]]]:
        """Of each clip's samples its windows: the mel, (M, F), and how many frames are valid."""
        split = [split_windows(wave, self.config.max_seconds) for wave in waves]
        mels = iter(log_mels([part for parts in split for part in parts]) if waves else ())
        return [[(next(mels), n_frames(len(part))) for part in parts] for parts in split]

    def listen(self, clips) -> list[torch.Tensor]:
        """What the encoder makes of clips: rows, (Q, E) each."""
        made = iter(self.windows([clip for clip in clips if getattr(clip, "ndim", 0) == 1]))
        split = [c if isinstance(c, list) else [] if is_rows(c) else next(made) for c in clips]
        windows = [window for part in split for window in part]
        rows, slots = [], []
        for batch in batches([frames for _, frames in windows], ENCODER_FRAMES) if windows else ():
            x, lengths = self.audio_tower(*zip(*windows[batch]))
            rows.append(x)
            slots += lengths
        slots = iter(slots)
        per_clip = [sum(next(slots) for _ in part) for part in split]
        heard = torch.cat(rows).split(per_clip) if rows else per_clip
        return [
            c.to(self.device, self.dtype) if is_rows(c) else part for c, part in zip(clips, heard)
        ]

    def encode(self, clips) -> list[torch.Tensor]:
        """Each clip as its slots, (Q, D). The same object is encoded once."""
        distinct = list({id(clip): clip for clip in clips}.values())
        rows = self.listen(distinct)
        x, slots = self.multi_modal_projector(torch.cat(rows), [len(part) for part in rows])
        found = {id(clip): part for clip, part in zip(distinct, x.split(slots))}
        return [found[id(clip)] for clip in clips]

    def check(self, ids: list[list[int]], clips: list[list]):
        """Refuse ids outside the vocabulary, and examples whose clips do not fill their slots."""
        vocab, slot = self.config.decoder.vocab, self.config.audio_token
        expect(len(ids) == len(clips), "clips", f"a list for each of {len(ids)} rows", len(clips))
        for row, sounds in zip(ids, clips):
            known = row and min(row) >= 0 and max(row) < vocab
            expect(known, "ids", f"at least one, each in 0..{vocab - 1}", f"{row!r:.60}")
            for i, clip in enumerate(sounds, 1):
                expect(self.n_slots(clip), f"clip {i}", "at least 321 samples", len(clip))
            slots, places = sum(map(self.n_slots, sounds)), row.count(slot)
            expect(places == slots, f"ids: {len(sounds)} clips", f"{slots} slots for them", places)

    def embed(self, ids: list[list[int]], clips: list[list]) -> torch.Tensor:
        """Examples end to end, (T, D): embedded tokens, the slots' places taken by the clips."""
        tokens = [id for row in ids for id in row]
        x = self.language_model.embed_tokens(numbers(tokens, self.device))
        sounds = [clip for row in clips for clip in row]
        if not sounds:
            return x
        slots, number = torch.cat(self.encode(sounds)).to(x.dtype), count()
        source = [next(number) if id == self.config.audio_token else -1 for id in tokens]
        return splice(x, slots, numbers(source, self.device, torch.int32))

    # --- numbers out

    def project(self, hidden) -> torch.Tensor:
        """(T, D) -> (T, V). Called on those rows only whose logits are wanted."""
        logits = self.lm_head(hidden)
        table = self.language_model.embed_tokens  # where the head is this table, its rows moved too
        if table.lora_rows is not None and self.tied:
            rows = hidden @ table.lora_rows.to(hidden.dtype).T
            logits = logits.index_copy(1, table.row_ids, rows)
        return logits

    def surprise(self, hidden, targets) -> torch.Tensor:
        """-log p(target) of each row, (T,) in float32. Where nothing is attached to the head, the
        kernel of a GPU never holds all logits at once."""
        table, head = self.language_model.embed_tokens, self.lm_head
        moved = table.lora_rows is not None and self.tied
        if head.lora_A is None and not moved:
            return cross_entropy(hidden, head.weight, targets)
        return F.cross_entropy(self.project(hidden).float(), targets, reduction="none")

    def hidden(self, ids: list[list[int]], clips: list[list]) -> torch.Tensor:
        """The decoder's last hidden states of examples end to end, (T, D)."""
        self.check(ids, clips)
        return self.language_model(self.embed(ids, clips), [len(row) for row in ids])

    def logits(self, ids: list[int], clips: list) -> torch.Tensor:
        """(T, V) of one example: clips are 1-D float32 arrays, one for each run of slots."""
        return self.project(self.hidden([ids], [clips]))

    def loss(self, examples) -> tuple[torch.Tensor, float]:
        """examples: (ids, clips, learned), where learned[t] is the weight of predicting ids[t], 0
        or False for not at all. -> the weighted sum of the negative log-likelihoods in float32, and
        the sum of the weights. Without any clip the encoder has no part in it, and its gradients
        stay None."""
        ids, clips, learned = ([e[i] for e in examples] for i in range(3))
        hidden = self.hidden(ids, clips)
        starts = cumulative([len(row) for row in ids]).tolist()
        pairs = [
            (start + t - 1, row[t])
            for start, row, flags in zip(starts, ids, learned)
            for t in range(1, len(row))
            if flags[t]
        ]
        pairs = numbers(pairs, self.device).view(-1, 2)
        places, targets = pairs.T
        weights = [w for flags in learned for w in flags[1:] if w]
        each = self.surprise(hidden[places], targets)
        return (each * numbers(weights, each.device, torch.float32)).sum(), sum(weights)

    @torch.inference_mode()
    def loglik(self, ids: list[int], clips: list, answer_ids: list[int]) -> float:
        """log p(answer | prompt and clips), summed over the answer's tokens."""
        learned = [False] * len(ids) + [True] * len(answer_ids)
        return -self.loss([([*ids, *answer_ids], clips, learned)])[0].item()

    # --- answers out

    @torch.inference_mode()
    def generate(
        self, ids, clips, max_new_tokens=256, temperature=0.0, on_token=None, *, top_p=1.0,
        seed=0, stop=None, cache=None,
    ):  # fmt: skip
        """New ids only, up to and with the one that stops. One prompt, or lists for a batch.

        temperature below 1e-4 is greedy; else sampling from the likeliest that make up top_p.
        on_token(id) is called for each new id, on_token(id, row) in a batch. A cache of one row
        may be passed again with a longer conversation: what it has read is not read again.
        """
        single = len(ids) == 0 or not isinstance(ids[0], (list, tuple))
        prompts, sounds = ([ids], [clips]) if single else (ids, clips)
        if max_new_tokens < 1 or not prompts:
            return [] if single else [[] for _ in prompts]
        prompts = [[int(id) for id in prompt] for prompt in prompts]
        self.check(prompts, sounds)
        slots = [[self.n_slots(clip) for clip in row] for row in sounds]
        for prompt, row in zip(prompts, slots):
            check_fits(len(prompt), row, self.config.decoder.context, max_new_tokens)
        if cache is None:
            longest = max(map(len, prompts)) + max_new_tokens
            cache = Cache(self.config.decoder, len(prompts), longest, self.lm_head.weight)
        active = list(range(len(prompts)))
        new = [[] for _ in prompts]
        stop = set(self.stops if stop is None else stop)
        dice = torch.Generator(self.device).manual_seed(seed)
        logits = self.prefill(prompts, sounds, slots, cache, max_new_tokens)
        while True:
            chosen = choose(logits[:, : self.known_ids].float(), temperature, top_p, dice)
            for row, id in zip(active, chosen):
                new[row].append(id)
                if on_token:
                    on_token(id) if single else on_token(id, row)
            active = [r for r in active if new[r][-1] not in stop and len(new[r]) < max_new_tokens]
            if not active:
                return new[0] if single else new
            logits = self.step([new[row][-1:] for row in active], cache, active)

    def prefill(self, prompts, clips, slots, cache, reserve):
        """Read the prompts into the cache's rows, as far as it does not hold them. -> (B, V)"""
        rests, sounds = [], []
        for row, (prompt, row_clips, row_slots) in enumerate(zip(prompts, clips, slots)):
            tokens, heard = cache.rewind(row, prompt, row_clips, row_slots, self.config.audio_token)
            rests.append(prompt[tokens:])
            sounds.append(row_clips[heard:])
            need = len(prompt) + reserve
            expect(need <= cache.capacity, "cache", f"room for {need} tokens", cache.capacity)
        return self.step(rests, cache, list(range(len(prompts))), sounds)

    def step(self, ids, cache, rows, clips=None) -> torch.Tensor:
        """Read further ids into those rows of the cache. -> logits after each one's last, (B, V)"""
        lengths = [len(row) for row in ids]
        x = self.embed(ids, clips or [[] for _ in ids])
        hidden = self.language_model(x, lengths, cache, rows)
        cache.record(rows, ids)
        return self.project(hidden[cumulative(lengths, x.device)[1:] - 1])

    def prompt(self, messages, clips, layout=None) -> tuple[list[int], list]:
        """A conversation as ids, in the layout that this network was trained on or another, and its
        clips in the order in which the text names them, a repeated one repeated."""
        slots = [self.n_slots(clip) for clip in clips]
        named, meant = self.tokenizer.slot, self.config.audio_token
        expect(named == meant or not clips, f"{self.dir}: audio token", named, meant)
        ids = self.tokenizer.encode_prompt(messages, slots, layout or self.layout)
        return ids, [clips[i - 1] for i in clip_order(messages, len(clips))]

    def answer(self, question, clips, max_new_tokens=256, **how) -> str:
        """A question (or a list of messages) on clips (1-D float32 arrays, 16 kHz): the answer."""
        asked = [{"role": "user", "content": question}]
        messages = question if isinstance(question, list) else asked
        how.setdefault("stop", self.ends)
        new = self.generate(*self.prompt(messages, clips), max_new_tokens, **how)
        return self.tokenizer.decode(new).strip()

    # --- weights

    def repack(self, reserve: int = 1 << 30) -> int:
        """Lay the decoder's weights out a second time, for reading them at one token a step, if
        the memory is there and it helps (see kernels/linear.py). -> bytes that the copies take."""
        layers = [*modules_of(self.language_model, Linear).values(), self.lm_head]
        size = sum(layer.weight.nbytes for layer in layers)
        wanted = self.device.type == "cpu" and self.dtype == torch.bfloat16
        if not wanted or size + reserve > free_memory():
            return 0
        copies = [kernels.repack(layer.weight) for layer in layers]
        if copies[0] is None:
            return 0
        for layer, copy in zip(layers, copies):
            layer.blocked = (copy, id(layer.weight), layer.weight._version)
        return size

    @classmethod
    def from_dir(cls, dir, device="cpu", dtype=torch.float32, adapter=None) -> "PolyAudio":
        """From a folder in Hugging Face's layout, or from a run's, which names its base. dtype
        "auto": bf16 on CUDA; on the CPU float32 if that fits in free memory, else the file's."""
        dir = Path(dir)
        if adapter is None and (dir / "adapter_config.json").exists():
            dir, adapter = base_of(dir), dir
        config = Config.from_dir(dir)
        with torch.device("meta"), Unset():
            net = cls(config)
        net.dir = dir.resolve()  # the program may go elsewhere
        load_weights(net, dir, device, dtype)
        net.requires_grad_(False).eval()
        if adapter is not None:
            net.load_adapter(adapter)
        return net

    def save(self, dir, shard_bytes: int = 5_000_000_000):
        """Write a plain checkpoint, adapters folded in, that transformers loads unchanged."""
        dir = Path(dir)
        dir.mkdir(parents=True, exist_ok=True)
        parameters = self.base_parameters()
        names, sizes = list(parameters), [p.nbytes for p in parameters.values()]
        shards = [names[part] for part in batches(sizes, shard_bytes)]
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            part = f"-{i:05}-of-{len(shards):05}" if shards[1:] else ""
            tensors = {hub_name(name, self.text_only): self.folded(name) for name in shard}
            write_tensors(dir / f"model{part}.safetensors", tensors)
            weight_map |= dict.fromkeys(tensors, f"model{part}.safetensors")
        index = dir / INDEX
        if shards[1:]:
            write_json(index, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
        else:
            index.unlink(missing_ok=True)
        old = [dir / "model.safetensors", *dir.glob("model-*-of-*.safetensors")]
        for path in old:  # of a checkpoint that lay here before
            if path.name not in weight_map.values():
                path.unlink(missing_ok=True)
        for name in COMPANIONS:
            if self.dir and (self.dir / name).exists() and self.dir.resolve() != dir.resolve():
                shutil.copyfile(self.dir / name, dir / name)
        config = {**self.config.raw, "dtype": str(self.dtype)[6:]}
        config.pop("torch_dtype", None)
        config["tie_word_embeddings"] = "lm_head.weight" not in parameters
        if self.config.encoder:
            text = config.get("text_config") or {}
            config["text_config"] = {**text, "tie_word_embeddings": False}
        if self.layout != "native":
            config["layout"] = self.layout
        write_json(dir / "config.json", config)

    def base_parameters(self) -> dict:
        """The checkpoint's own parameters by name, no adapter's. A head that is the embeddings is
        left out where transformers ties it: in text models, as long as nothing adapts it."""
        found = {name: p for name, p in self.named_parameters() if ".lora_" not in name}
        if self.config.encoder or self.lm_head.lora_A is not None:
            found["lm_head.weight"] = self.lm_head.weight
        return found

    def folded(self, name) -> torch.Tensor:
        """A parameter as the network uses it, adapter and all."""
        module, _, field = name.rpartition(".")
        module = self.get_submodule(module)
        if module is self.lm_head and self.tied:
            adapted = module.lora_A is not None  # else it follows the trained rows
            return (module if adapted else self.language_model.embed_tokens).folded().clone()
        if field == "weight" and isinstance(module, (Linear, Embedding)):
            return module.folded().contiguous()
        return getattr(module, field).detach().contiguous()

    # --- adapters

    def add_lora(self, rank=16, alpha=32, targets=None, dropout=0.0, rows=(), rslora=False):
        """Attach a new adapter and leave nothing else trainable. targets: a regex or a list of
        names as PEFT takes them; rows: tokens (BOA, EOA) whose embeddings are trained too."""
        expect(not self.adapter, "LoRA", "a network without an adapter", "one that has one")
        adapter = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
            "lora_dropout": dropout, "use_rslora": rslora, "bias": "none", "inference_mode": True,
            "target_modules": DECODER_TARGETS if targets is None else targets,
            "base_model_name_or_path": str(self.dir or ""),
        }  # fmt: skip
        layers = modules_of(self, Linear)
        paths = {peft_name(name, self.text_only): layer for name, layer in layers.items()}
        found = [path for path in paths if is_target(adapter["target_modules"], path)]
        self.check_tied("LoRA", rows and "lm_head" in found)
        expect(found, "LoRA: target_modules", "layers of this network", adapter["target_modules"])
        for path in found:
            paths[path].attach(*rank_and_scale(adapter, path), dropout)
        if rows:
            adapter["trainable_token_indices"] = {"embed_tokens": list(rows)}
            self.language_model.embed_tokens.replace(list(rows))
        self.adapter = adapter
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def save_adapter(self, dir):
        """Write what was trained, and only that, as PEFT reads it."""
        dir = Path(dir).resolve()
        dir.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in self.named_parameters():
            module, _, field = name.rpartition(".")
            whole = any(in_module(module, m) for m in self.adapter.get("modules_to_save") or ())
            if field == "lora_rows":
                key = f"{peft_name(module, self.text_only)}.token_adapter.trainable_tokens_delta"
            elif field in ("lora_A", "lora_B"):
                key = f"{peft_name(module, self.text_only)}.{field}.weight"
            elif whole:
                key = peft_name(name, self.text_only)
            else:
                continue
            tensors["base_model.model." + key] = parameter.detach().contiguous()
        write_tensors(dir / "adapter_model.safetensors", tensors)
        adapter = {k: v for k, v in self.adapter.items() if k != "layout"}
        if self.dir:
            adapter["base_model_name_or_path"] = os.path.relpath(self.dir, dir)
        if self.layout != "native":  # PEFT does not know the field and passes over it, warning
            adapter["layout"] = self.layout
        write_json(dir / "adapter_config.json", adapter)

    def check_tied(self, source, both):
        """A head that is the embeddings follows their trained rows; with an adapter of its own it
        could not say which of the two it is."""
        expect(not (self.tied and both), source, "LoRA on a tied head, or trained rows", "both")

    def load_adapter(self, dir, trainable=False):
        """Attach a PEFT adapter: LoRA, trained token rows, modules saved whole. What its file does
        not hold stays as it is; what the network has no place for is refused."""
        dir = Path(dir)
        path = dir / "adapter_model.safetensors"
        adapter = read_json(dir / "adapter_config.json")
        check_adapter(adapter, dir / "adapter_config.json")
        expect(not self.adapter, dir, "a network without an adapter", "one that has one")
        expect(path.is_file(), dir, "adapter_model.safetensors (a pickle is not read)", "none")
        layers, halves = modules_of(self, Linear), {}
        with open_tensors(path) as file:
            expect(file.keys(), path, "an adapter's tensors", "none")
            for key in file.keys():
                tensor = file.get_tensor(key).to(self.device)
                floating = tensor.is_floating_point()
                expect(floating, f"{path}: {key}", "floating point", tensor.dtype)
                name = canonical(key.removeprefix("base_model.model."))
                name = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
                if half := re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name):
                    halves.setdefault(half[1], {})[half[2]] = tensor.float()
                elif "trainable_tokens_delta" in name:
                    table = name.startswith("language_model.embed_tokens")
                    expect(table, f"{path}: {key}", "rows of embed_tokens", "others")
                    self.load_rows(path, adapter, tensor)
                else:
                    assign(self, name, tensor.to(self.dtype), f"{path}: {key}")
        self.check_tied(path, "lm_head" in halves and adapter.get("trainable_token_indices"))
        for name, pair in halves.items():
            whole = name in layers and set(pair) == {"A", "B"}
            expect(whole, f"{path}: {name}", "A and B of a layer of this network", sorted(pair))
            layer = layers[name]
            rank, scale = rank_and_scale(adapter, peft_name(name, self.text_only), name)
            shapes = ((rank, layer.in_features), (layer.out_features, rank))
            found = (tuple(pair["A"].shape), tuple(pair["B"].shape))
            expect(shapes == found, f"{path}: {name}: A and B", shapes, found)
            layer.attach(rank, scale, adapter.get("lora_dropout", 0.0))
            layer.lora_A, layer.lora_B = (nn.Parameter(pair[x].contiguous(), False) for x in "AB")
        note(f"{dir}: an adapter on {len(halves)} of {len(layers)} layers")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable and ".lora_" in name)
        self.adapter = adapter
        self.layout = adapter.get("layout", self.layout)

    def load_rows(self, path, adapter, rows):
        """Trained embeddings of a few tokens. Rows of the head alone would be something else."""
        named = adapter.get("trainable_token_indices") or {}
        named = {"embed_tokens": named} if isinstance(named, list) else named
        others = set(named) - {"embed_tokens"}
        expect(not others, f"{path}: trainable_token_indices", "embed_tokens", sorted(others))
        ids = named.get("embed_tokens", [])
        fine = all(type(id) is int and 0 <= id < self.config.decoder.vocab for id in ids)
        fine = fine and len(set(ids)) == len(ids)
        expect(fine, f"{path}: trainable_token_indices", "tokens, each once", f"{ids!r:.60}")
        table = self.language_model.embed_tokens
        shape, found = (len(ids), table.weight.shape[1]), tuple(rows.shape)
        expect(shape == found, f"{path}: trainable_tokens_delta", shape, found)
        table.replace(ids)
        table.lora_rows = nn.Parameter(rows.float().contiguous(), False)

    def merge(self):
        """Fold the adapter's products into the weights, for speed; unmerge gives back every bit."""
        for layer in modules_of(self, Linear).values():
            layer.merge()

    def unmerge(self):
        for layer in modules_of(self, Linear).values():
            layer.unmerge()


def modules_of(root: nn.Module, kind) -> dict[str, nn.Module]:
    return {name: module for name, module in root.named_modules() if isinstance(module, kind)}


def is_rows(clip) -> bool:
    return getattr(clip, "ndim", 0) == 2


def batches(sizes: list[int], limit: int):
    """Slices of neighbours whose sizes sum to at most `limit`; a larger one stands alone."""
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > limit:
            yield slice(first, i)
            first, total = i, 0
        total += size
    yield slice(first, len(sizes))


def choose(logits, temperature, top_p, dice) -> list[int]:
    """One token for each row of logits (B, V)."""
    if temperature < 1e-4:  # nothing but the likeliest, and some rows would be 0 / 0
        return logits.argmax(-1).tolist()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    p, order = logits.softmax(-1).sort(descending=True)
    cut = p.cumsum(-1) - p >= top_p
    cut[:, 0] = False  # the likeliest stays, whatever top_p
    p[cut] = 0
    return order.gather(1, torch.multinomial(p, 1, generator=dice))[:, 0].tolist()


def answer_all(net, items, batch_tokens=16_384, batch_rows=32, max_new_tokens=256, **how):
    """The loop that validation and judging share. items yields (key, messages, clips) and perhaps
    a layout, out comes (key, answer) in their order, or (key, BadInput) for an item that cannot be
    asked. Prompts of different lengths share a batch as they are; only one batch of clips is held
    at a time."""
    how.setdefault("stop", net.ends)

    def flush(batch):
        asked = [(ids, clips) for _, ids, clips in batch if not isinstance(ids, BadInput)]
        prompts, sounds = ([pair[i] for pair in asked] for i in (0, 1))
        new = iter(net.generate(prompts, sounds, max_new_tokens, **how) if prompts else [])
        for key, ids, _ in batch:
            failed = isinstance(ids, BadInput)
            yield key, ids if failed else net.tokenizer.decode(next(new)).strip()

    batch, longest = [], 0  # a row's place in the cache is as long as the longest row's
    for key, messages, clips, *layout in items:
        try:
            ids, placed = net.prompt(messages, clips, *layout)
            slots = [net.n_slots(clip) for clip in placed]
            check_fits(len(ids), slots, net.config.decoder.context, max_new_tokens)
        except BadInput as mistake:
            ids, placed = mistake, []
        size = 0 if isinstance(ids, BadInput) else len(ids) + max_new_tokens
        longest = max(longest, size)
        if batch and (longest * (len(batch) + 1) > batch_tokens or len(batch) == batch_rows):
            yield from flush(batch)
            batch, longest = [], size
        batch.append((key, ids, placed))
    yield from flush(batch)


# ------------------------------------------------------------------------------------------------
# Weights on disk: safetensors only, and nothing is let through that does not fit.


def canonical(key: str) -> str:
    """A key of any of the three published layouts -> our name of the parameter.

    audio_tower.*         language_model.model.*         language_model.lm_head.*    Hub
    model.audio_tower.*   model.language_model.*         lm_head.*                   in memory
    audio_tower.*         language_model.model.model.*   language_model.lm_head.*    re-saved
    """
    key = re.sub(r"^(model\.)+", "", key)
    key = re.sub(r"^language_model\.(model\.)*", "language_model.", key)
    key = re.sub(r"^language_model\.lm_head\b", "lm_head", key)
    return re.sub(r"^(embed_tokens|layers|norm)\b", r"language_model.\1", key)


def hub_name(name: str, text_only: bool) -> str:
    """Our name -> the key in the files of the Hub."""
    if text_only:
        return re.sub(r"^language_model\b", "model", name)
    name = re.sub(r"^language_model\b", "language_model.model", name)
    return re.sub(r"^lm_head\b", "language_model.lm_head", name)


def peft_name(name: str, text_only: bool) -> str:
    """Our name -> the module's path in transformers' memory, which PEFT's files use."""
    if name.startswith("lm_head"):
        return name
    return hub_name(name, True) if text_only else "model." + name


def write_tensors(path, tensors):
    beside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.replace(path)
    except (SafetensorError, OSError) as error:  # a full disk is the former
        beside.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written ({error})") from None


def match_names(keys, expected, may_tie: bool, source) -> dict[str, str]:
    """{our name: the file's key}, every name once and no key left over."""
    table = {}
    for key in keys:
        name = canonical(key)
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old files carry
            continue
        pair = f"{key} and {table.get(name)}"
        expect(name not in table, f"{source}: {name}", "one such tensor", pair)
        table[name] = key
    left = sorted(set(table) - set(expected))
    missing = sorted(set(expected) - set(table))
    if may_tie and missing == ["lm_head.weight"]:
        missing = []
    if missing:
        raise BadInput(f"{source}: {missing[0]} is missing ({len(missing)} tensors in all)")
    if left:
        raise BadInput(f"{source}: {table[left[0]]} is left over ({len(left)} tensors in all)")
    return table


class Unset(TorchFunctionMode):
    """Inside, new layers draw no numbers. On the meta device there are none to draw, and torch
    would import its compiler, which takes a second or two, to find that out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_weights(net: PolyAudio, dir: Path, device, dtype):
    """Take each tensor from the memory map, cast it on the way, put it in place of its meta twin.
    Where no cast is needed the parameter is the map itself, and costs no memory of its own."""
    shards = {path: open_shard(path, keys) for path, keys in shard_files(dir).items()}
    where = {key: path for path, file in shards.items() for key in file.keys()}
    expected = dict(net.named_parameters())
    table = match_names(where, expected, net.config.may_tie, dir)
    if dtype == "auto":
        first = shards[where[table["language_model.embed_tokens.weight"]]]
        held = first.get_tensor(table["language_model.embed_tokens.weight"]).dtype
        dtype = auto_dtype(device, sum(p.numel() for p in expected.values()), held)
    for name, key in table.items():
        tensor = shards[where[key]].get_tensor(key)
        expect(tensor.is_floating_point(), f"{where[key]}: {key}", "floating point", tensor.dtype)
        assign(net, name, tensor, f"{where[key]}: {key}", device, dtype)
    head, rows = net.lm_head.weight, net.language_model.embed_tokens.weight
    repeated = net.config.may_tie and not net.config.encoder and not head.is_meta
    if "lm_head.weight" not in table or (repeated and torch.equal(head, rows)):
        net.lm_head.weight = rows


def assign(net, name, tensor, source, device=None, dtype=None):
    """Put a tensor in place of the parameter of that name."""
    module, _, field = name.rpartition(".")
    try:
        old = net.get_parameter(name)
    except AttributeError:
        raise BadInput(f"{source}: this network has no such tensor") from None
    expect(old.shape == tensor.shape, source, tuple(old.shape), tuple(tensor.shape))
    value = tensor.to(device=device, dtype=dtype)
    setattr(net.get_submodule(module), field, nn.Parameter(value, requires_grad=False))


def base_of(run: Path) -> Path:
    """The folder of weights that an adapter was trained on: relative to it, or under weights/."""
    adapter = read_json(run / "adapter_config.json")
    check_adapter(adapter, run / "adapter_config.json")
    name = str(adapter.get("base_model_name_or_path") or "")
    home = Path(__file__).parent / "weights"
    tried = [run / name, home.parent / name, Path(name), home / name, home / Path(name).name]
    found = [dir for dir in tried if name and (dir / "config.json").exists()]
    expect(found, f"{run}: base_model_name_or_path", "a folder of weights", repr(name))
    return found[0]


def weights_hash(dir) -> str:
    """Of all files that decide what a checkpoint says, an adapter's base included."""
    dir = Path(dir)
    names = ("config.json", "adapter_config.json", *COMPANIONS)
    tensors = set(dir.glob("*.safetensors")) - set(dir.glob("state-*"))  # a run's checkpoints
    files = [*sorted(tensors), *(dir / name for name in names)]
    digests = {}
    for path in filter(Path.is_file, files):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    expect(digests, dir, "a folder of weights", "none")
    base = weights_hash(base_of(dir)) if "adapter_config.json" in digests else None
    return hash_of([digests, base])


# ------------------------------------------------------------------------------------------------
# What an adapter's config means, as PEFT reads it.

DECODER_TARGETS = (
    r"(?!.*audio_tower).*\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)


def check_adapter(adapter: dict, source):
    """Refuse kinds of adapters that this code does not compute."""
    expect(isinstance(adapter, dict), source, "an adapter's fields", f"{adapter!r:.60}")
    only = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
    for field, wanted in only.items():
        found = adapter.get(field, wanted)
        expect(found == wanted, f"{source}: {field}", wanted, found)
    for field in ("alora_invocation_tokens", "layer_replication"):
        expect(not adapter.get(field), f"{source}: {field}", "none", adapter.get(field))
    start = adapter.get("init_lora_weights", True)
    plain = not re.match("pissa|olora|corda|loftq|lora_ga", str(start))  # they change the base
    expect(plain, f"{source}: init_lora_weights", "a start that leaves the base alone", start)
    patterns = [adapter.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    fine = all(isinstance(pattern, dict) for pattern in patterns)
    expect(fine, f"{source}: rank_pattern", "numbers by pattern", patterns)
    ranks = [adapter.get("r", 8), *patterns[0].values()]
    fine = all(type(rank) is int and rank > 0 for rank in ranks)
    expect(fine, f"{source}: r", "whole numbers above 0", ranks)
    others = [adapter.get("lora_alpha", 8), adapter.get("lora_dropout", 0), *patterns[1].values()]
    fine = all(fits(number, float) for number in others)
    fine = fine and 0 <= adapter.get("lora_dropout", 0) < 1
    expect(fine, f"{source}: lora_alpha, lora_dropout", "numbers, the latter below 1", others)
    rows = adapter.get("trainable_token_indices") or []
    rows = list(rows.values()) if isinstance(rows, dict) else [rows]
    expect(
        fits(rows, [[int]]), f"{source}: trainable_token_indices", "lists of ids", f"{rows!r:.60}"
    )
    try:
        [re.compile(name) for pattern in patterns for name in pattern]
    except re.error as error:
        raise BadInput(f"{source}: rank_pattern: expected a regex, found {error}") from None


def in_module(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."


def is_target(targets, path: str) -> bool:
    """Whether a layer is meant: by a regex for all of its path, or by one of the paths' ends."""
    if targets == "all-linear":
        return path != "lm_head"
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, path))
    return any(path == target or path.endswith("." + target) for target in targets)


def rank_and_scale(adapter: dict, *paths: str) -> tuple[int, float]:
    """(R, alpha / R) of a layer, or alpha / sqrt(R) for rslora; patterns override by path."""

    def by_pattern(patterns, default):
        for pattern, value in (patterns or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                return value
        return default

    rank = by_pattern(adapter.get("rank_pattern"), adapter.get("r", 8))
    alpha = by_pattern(adapter.get("alpha_pattern"), adapter.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


# ------------------------------------------------------------------------------------------------
# The flags of every script that loads weights.


def free_memory() -> int:
    """Bytes that can still be taken: what the system says, or less where a container limits it."""
    try:
        fields = Path("/proc/meminfo").read_text().split()
        free = int(fields[fields.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no container, or one without a limit ("max")
    return free


def auto_dtype(device, parameters: int, held: torch.dtype) -> torch.dtype:
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    if held == torch.float32 or parameters * 4 > 0.9 * free_memory():
        return held
    return torch.float32


def add_weight_flags(parser):
    names = {"auto": "auto", "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter to put on the weights")
    parser.add_argument("--device", help="default: the first of cuda, mps, cpu that is there")
    parser.add_argument(
        "--dtype", default="auto", choices=names,
        help="default: bf16 on CUDA; on the CPU f32 if it fits in free memory, else the file's",
    )  # fmt: skip
    parser.set_defaults(dtypes=names)


def find_device(asked) -> torch.device:
    """The one of that name, or the first of cuda, mps, cpu that is there."""
    device = asked
    if device is None:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = next((name for name, found in there.items() if found), "cpu")
    if device == "cuda":  # each process of torchrun has one of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        expect(
            device.split(":")[0] in ("cpu", "cuda", "mps"), "--device", "cuda, mps or cpu", device
        )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise BadInput(f"--device {device}: {str(error).splitlines()[0]}") from None
    try:
        kernels.chosen()
    except ValueError as error:
        raise BadInput(error) from None
    return torch.device(device)


def load_net(args) -> PolyAudio:
    """The network that the flags ask for."""
    device = find_device(args.device)
    return PolyAudio.from_dir(args.weights, device, args.dtypes[args.dtype], args.adapter)
