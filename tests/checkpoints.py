"""Small random checkpoints, made by transformers, and its answers on them: the oracle.

transformers leaves biases at zero and norms at one, which would hide a bias that is dropped or a
norm that is skipped. So everything is randomised, and big enough to matter.

    python -m tests.checkpoints weights/random      # one to try sample.py on; it answers gibberish
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperFeatureExtractor,
)

transformers.utils.logging.disable_progress_bar()

VOCAB = 2048
SLOT = 2040  # the audio token of the small checkpoints
WORDS = 2000  # ids below it are drawn as text
SECONDS = (0.03, 0.3, 1.01, 3.0, 29.99, 30.005, 31.0)
HEARS = {"af3": 600, "qwen2_audio": 30, "qwen2": 0, "qwen3": 0}  # seconds of a clip
NOBODY = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # nothing ends early

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "max_position_embeddings": 32768, "tie_word_embeddings": False, **NOBODY,
}  # fmt: skip
AUDIO = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_size": 48,
}


def af3(**text):
    config = AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(**AUDIO),
        text_config=Qwen2Config(**{**TEXT, **text}),
        audio_token_id=SLOT,
    )
    return AudioFlamingo3ForConditionalGeneration(config)


def qwen2_audio(**text):
    theta = {"rope_theta": 1e4, "rope_type": "default"}
    own = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": theta}
    names = {
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "d_model": 48,
    }
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**names),
        text_config=Qwen2Config(**{**TEXT, **own, **text}),
        audio_token_index=SLOT,
    )
    return Qwen2AudioForConditionalGeneration(config)


def qwen2(**text):
    return Qwen2ForCausalLM(Qwen2Config(**{**TEXT, **text}))


def qwen3(**text):
    return Qwen3ForCausalLM(Qwen3Config(**{**TEXT, "head_dim": 16, **text}))


MAKERS = {"af3": af3, "qwen2_audio": qwen2_audio, "qwen2": qwen2, "qwen3": qwen3}


def randomise(model, seed=0):
    """Weights of variance 1.6^2 / inputs, embeddings of 0.35, biases and norms moved by 0.2."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=dice)
            if "embed" in name:
                p.copy_(0.35 * noise)
            elif p.ndim == 1:
                p.add_(0.2 * noise)
            else:
                p.copy_(noise * 1.6 / math.sqrt(p[0].numel()))
    model.generation_config.eos_token_id = None
    return model.eval()


def make(kind, dir=None, seed=0, shard="200KB", **text):
    """A random checkpoint of that kind; with a folder, saved there as transformers saves it."""
    model = randomise(MAKERS[kind](**text), seed)
    if dir is not None:
        model.save_pretrained(dir, max_shard_size=shard)
    return model


def waves(seconds, seed=0) -> list[np.ndarray]:
    """Noise that swells, a different one for each clip."""
    dice = np.random.default_rng(seed)
    lengths = [round(s * 16000) for s in seconds]
    return [
        (dice.standard_normal(n) * np.linspace(0.02, 0.2, n)).astype(np.float32) for n in lengths
    ]


def slots_of(wave, max_seconds=600) -> int:
    """By HF's own formula, window after window."""
    wave = wave[: max_seconds * 16000]
    total = 0
    for start in range(0, len(wave), 480000):
        frames = -(-len(wave[start : start + 480000]) // 160)
        total += ((frames - 1) // 2 + 1 - 2) // 2 + 1
    return total


def text(n, seed=0) -> list[int]:
    return np.random.default_rng(seed).integers(0, WORDS, n).tolist()


def interleave(
    clips, seed=0, adjacent=False, gap=5, max_seconds=600, before=0, after=None
) -> list[int]:
    """Text and slots in turn, as ids: `before` ids of text, the clips with `gap` ids between them
    (none if adjacent), `after` ids of text (as many as between them)."""
    gap = 0 if adjacent else gap
    spaces = [before, *[gap] * (len(clips) - 1), gap if after is None else after]
    ids = text(spaces[0] if clips else sum(spaces), seed)
    for i, clip in enumerate(clips, 1):
        ids += [SLOT] * slots_of(clip, max_seconds)
        ids += text(spaces[i], seed + 1000 * i)
    return ids


def inputs(kind, rows: list[tuple[list[int], list]], max_seconds=600) -> dict:
    """What HF's model wants for a batch of (ids, clips): padded on the left, windows flattened."""
    longest = max(len(ids) for ids, _ in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, (ids, _) in enumerate(rows):
        padded[i, longest - len(ids) :] = torch.tensor(ids)
        mask[i, longest - len(ids) :] = 1
    out = {"input_ids": padded, "attention_mask": mask}
    windows = [
        clip[: max_seconds * 16000][start : start + 480000]
        for _, clips in rows
        for clip in clips
        for start in range(0, min(len(clip), max_seconds * 16000), 480000)
    ]
    if windows:
        extractor = WhisperFeatureExtractor(feature_size=128)
        found = extractor(
            windows, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
        )
        out["input_features"] = found.input_features
        name = "input_features_mask" if kind == "af3" else "feature_attention_mask"
        out[name] = found.attention_mask
    return out


@torch.no_grad()
def oracle_sounds(model, clips, dtype=torch.float32) -> torch.Tensor:
    """What AF3's encoder and projector make of clips, all their slots end to end."""
    given = inputs("af3", [([0], clips)])
    features = given["input_features"].to(dtype)
    return model.get_audio_features(features, given["input_features_mask"]).pooler_output


@torch.no_grad()
def oracle_logits(kind, model, ids, clips, max_seconds=600) -> torch.Tensor:
    return model(**inputs(kind, [(ids, clips)], max_seconds)).logits[0]


@torch.no_grad()
def oracle_greedy(kind, model, rows, n, max_seconds=600) -> list[list[int]]:
    given = inputs(kind, rows, max_seconds)
    plain = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
    out = model.generate(**given, max_new_tokens=n, **plain)
    return out[:, given["input_ids"].shape[1] :].tolist()


def rewrite(source, target, rename=lambda key: key, dtype=None, edit=None):
    """The same tensors as one file, under other names, in another type, or spoiled."""
    from safetensors.torch import load_file, save_file

    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    tensors = {rename(key): tensor for key, tensor in tensors.items()}
    if dtype:
        tensors = {key: tensor.to(dtype(key)) for key, tensor in tensors.items()}
    if edit:
        edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            (target / name).write_text((source / name).read_text())
    return target


def edit_json(path, **changes):
    path = Path(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_speaking(dir):
    """A random AF3 with a tokenizer of its own, so that it can be asked in words."""
    import prepare

    dir = Path(dir)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOA]", "[EOA]"]
    make("af3", dir)
    prepare.train_bpe([Path(prepare.__file__).read_text()], 1000, specials, dir)
    ids = prepare.Tokenizer.from_dir(dir).special
    edit_json(dir / "config.json", audio_token_id=ids["<sound>"])
    edit_json(dir / "generation_config.json", eos_token_id=ids["<|im_end|>"])


if __name__ == "__main__":
    make_speaking(sys.argv[1])
