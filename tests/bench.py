"""How fast, and how much memory, beside transformers on the same weights.

    python -m tests.bench                    # resample to decode: both types, five rounds
    python -m tests.bench first --dtype f32  # one of them
    python -m tests.bench learn              # a LoRA step beside transformers and PEFT
    python -m tests.bench start              # a question on two clips, beside `import torch`
    python -m tests.bench load               # 16.5 GB in shards, made, loaded, measured (~15 min)

The network is Whisper-small's encoder (12 x 768) with Qwen2.5-0.5B's decoder (24 x 896), on a GPU
one of Audio Flamingo 3's own size; weights random. Both arms answer the same question on five
clips of 4 s. They must agree first; then they take turns for some rounds in one process, and the
medians are compared. What the machine can do at most, a large matrix product and a long read, is
measured in the same rounds. Peak memory is taken once from a process of its own for each arm.
Learning is a step of AdamW on adapters of rank 16, of four examples of three clips of 1 to 10 s:
packed here, padded to the longest there, as its processor and collator do.
`others` is how many cores other programs used meanwhile: above 0.2 the row is not worth quoting.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import soxr  # noqa: E402
import torch  # noqa: E402

import kernels  # noqa: E402
from model import PolyAudio, free_memory  # noqa: E402
from prepare import INDEX, Parser, cli, expect, log_mels, n_slots, resample  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "data" / "bench"
SLOT, VOCAB = 151669, 151936
CLIPS, SECONDS, NEW = 5, 4, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECODER = 7_070_000_000 if DEVICE == "cuda" else 494_000_000  # parameters read for one token
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
MUST = {  # (must, aim) of the ratio, where one was set
    ("resample", "f32"): (0.5, 1),
    ("mel", "f32"): (7, 12), ("encoder", "f32"): (9, 11), ("encoder", "bf16"): (11, 15),
    ("first", "f32"): (3.5, 6), ("first", "bf16"): (3.5, 5),
    ("decode", "f32"): (1.35, 2), ("decode", "bf16"): (2, 2.4),
    ("learn", "f32"): (2.5, 3.5), ("learn", "bf16"): (2.5, 3.5),
}  # fmt: skip


# --- the network and the question


def checkpoint() -> Path:
    """The random checkpoint, made once (2.3 GB; on a GPU of AF3's size, 16.5 GB)."""
    if DEVICE == "cuda":
        if not (HOME / "af3" / INDEX).exists():
            write_af3(HOME / "af3")
        return HOME / "af3"
    dir = HOME / "small"
    if (dir / "whole").exists():
        return dir
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        AudioFlamingo3ForConditionalGeneration,
        Qwen2Config,
    )

    torch.manual_seed(0)
    audio = {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    text = {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "vocab_size": VOCAB,
        "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "tie_word_embeddings": True,
    }  # fmt: skip
    config = AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(hidden_size=768, **audio),
        text_config=Qwen2Config(**text),
        audio_token_id=SLOT,
        tie_word_embeddings=True,
    )
    model = AudioFlamingo3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.save_pretrained(dir)
    (dir / "whole").touch()
    return dir


def clips() -> list[np.ndarray]:
    dice = np.random.default_rng(1)
    n = SECONDS * 16000
    return [
        (0.1 * dice.standard_normal(n) * np.linspace(0.2, 1, n)).astype(np.float32)
        for _ in range(CLIPS)
    ]


def recording() -> np.ndarray:
    """30 s at 44.1 kHz, nothing above 7 kHz, where the two filters differ by design."""
    time_ = np.arange(30 * 44100) / 44100
    tones = (np.sin(2 * np.pi * hertz * time_) for hertz in (50, 440, 1234, 5000, 6900))
    return (0.1 * sum(tones)).astype(np.float32)


def question() -> list[int]:
    """540 tokens: five runs of 100 slots, and 40 of text before, between and after."""
    dice = np.random.default_rng(2)
    ids = dice.integers(0, 150_000, 8).tolist()
    for _ in range(CLIPS):
        ids += [SLOT] * (SECONDS * 25) + dice.integers(0, 150_000, 2).tolist()
    return ids + dice.integers(0, 150_000, 540 - len(ids)).tolist()


def lessons() -> list[tuple[list, list, list]]:
    """Four examples: ids, clips of 1 to 10 s, and which ids are an answer's."""
    dice, found = np.random.default_rng(3), []
    for _ in range(4):
        waves = [(0.1 * dice.standard_normal(n)).astype(np.float32)
                 for n in dice.integers(16_000, 160_000, 3)]  # fmt: skip
        ids = dice.integers(0, 150_000, 20).tolist()
        for wave in waves:
            ids += [SLOT] * n_slots(len(wave)) + dice.integers(0, 150_000, 6).tolist()
        answer = dice.integers(0, 150_000, 40).tolist()
        found.append((ids + answer, waves, [False] * len(ids) + [True] * len(answer)))
    return found


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Ours:
    def __init__(self, dtype):
        self.net = PolyAudio.from_dir(checkpoint(), DEVICE, DTYPES[dtype])
        self.clips, self.ids, self.recording = clips(), question(), recording()

    def resample(self):
        return [torch.from_numpy(resample(self.recording, 44100))]

    def mel(self):
        return log_mels(self.clips)

    def encoder(self):
        with torch.inference_mode():
            return torch.cat(self.net.encode(self.clips))

    def first(self):
        return self.net.generate(self.ids, self.clips, 1)

    def prepare_learn(self):
        self.net.add_lora(16, 32)
        self.net.train()
        learned = [p for p in self.net.parameters() if p.requires_grad]
        self.opt, self.examples = torch.optim.AdamW(learned, 1e-5), lessons()

    def learn(self):
        loss, weight = self.net.loss(self.examples)
        (loss / weight).backward()
        self.opt.step()
        self.opt.zero_grad()
        return [loss.detach() / weight]

    def prepare_decode(self):
        self.cache = None
        self.extra = self.net.repack()

    def decode(self):
        """NEW tokens after the prompt, which the cache holds."""
        from model import Cache

        if self.cache is None:
            room = len(self.ids) + NEW + 1
            self.cache = Cache(self.net.config.decoder, 1, room, self.net.lm_head.weight)
            self.net.generate(self.ids, self.clips, 1, cache=self.cache)
        return self.net.generate(self.ids, self.clips, NEW, cache=self.cache, stop=[])


class Theirs:
    def __init__(self, dtype):
        from transformers import AudioFlamingo3ForConditionalGeneration, WhisperFeatureExtractor

        kind = AudioFlamingo3ForConditionalGeneration
        self.net = kind.from_pretrained(checkpoint(), dtype=DTYPES[dtype]).eval().to(DEVICE)
        self.extractor = WhisperFeatureExtractor(feature_size=128)
        self.clips, self.ids = clips(), torch.tensor([question()], device=DEVICE)
        self.recording = recording()
        self.features()

    def resample(self):
        """soxr, which transformers' loader calls."""
        return [torch.from_numpy(soxr.resample(self.recording, 44100, 16000))]

    def features(self):
        found = self.extractor(
            self.clips, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
        )
        heard = found.input_features.to(self.net.device, self.net.dtype)
        self.given = heard, found.attention_mask.to(DEVICE)

    def mel(self):
        self.features()
        return list(self.given[0])

    @torch.inference_mode()
    def encoder(self):
        self.features()
        return self.net.get_audio_features(*self.given, return_dict=True).pooler_output

    @torch.inference_mode()
    def read(self):
        self.features()
        given = {"input_features": self.given[0], "input_features_mask": self.given[1]}
        return self.net(input_ids=self.ids, use_cache=True, logits_to_keep=1, **given)

    def first(self):
        return [int(self.read().logits[0, -1].argmax())]

    def prepare_learn(self):
        from peft import LoraConfig, get_peft_model

        where = rf".*language_model.*\.({'|'.join(TARGETS)})"
        self.net = get_peft_model(self.net, LoraConfig(r=16, lora_alpha=32, target_modules=where))
        self.net.train()
        learned = [p for p in self.net.parameters() if p.requires_grad]
        self.opt, self.examples = torch.optim.AdamW(learned, 1e-5), lessons()

    def learn(self):
        longest = max(len(ids) for ids, _, _ in self.examples)
        shape = (len(self.examples), longest)
        ids, labels, seen = (torch.full(shape, fill, device=DEVICE) for fill in (0, -100, 0))
        for row, (text, _, learned) in enumerate(self.examples):
            ids[row, : len(text)] = torch.tensor(text)
            seen[row, : len(text)] = 1
            for t, flag in enumerate(learned):
                labels[row, t] = text[t] if flag else -100
        self.clips = [wave for _, waves, _ in self.examples for wave in waves]
        self.features()
        heard = {"input_features": self.given[0], "input_features_mask": self.given[1]}
        loss = self.net(input_ids=ids, attention_mask=seen, labels=labels, **heard).loss
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        return [loss.detach()]

    def prepare_decode(self):
        self.extra, self.cache = 0, None

    @torch.inference_mode()
    def decode(self):
        """The same NEW tokens: the last of the prompt again, then one by one."""
        if self.cache is None:
            self.cache = self.read().past_key_values
        self.cache.crop(self.ids.shape[1] - 1 - self.cache.get_seq_length())
        token, new = int(self.ids[0, -1]), []
        for _ in range(NEW):
            step = self.net(
                input_ids=torch.tensor([[token]], device=DEVICE),
                past_key_values=self.cache,
                use_cache=True,
            )
            token = int(step.logits[0, -1].argmax())
            new.append(token)
        return new


# --- measuring


def busy() -> float:
    """Seconds of CPU that the whole machine has spent."""
    numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def timed(run) -> tuple[float, float]:
    """(seconds, cores that others used meanwhile)"""
    spent, own, start = busy(), sum(os.times()[:2]), time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, max(0.0, (busy() - spent - (sum(os.times()[:2]) - own)) / seconds)


def in_turn(arms: dict, rounds: int) -> dict:
    """Each arm once a round. -> {name: (median seconds, median of others' cores)}"""
    samples = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            samples[name].append(timed(run))
    return {name: tuple(map(median, zip(*found))) for name, found in samples.items()}


def ceilings(dtype):
    """Work whose limit is known: a large product, and one read of the decoder's size."""
    a, b = (torch.randn(2048, 2048, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    onednn = torch.ops.mkldnn._linear_pointwise
    product = (lambda: a @ b) if DEVICE == "cuda" else lambda: onednn(a, b, None, "none", [], "")
    buffer = torch.ones(DECODER * DTYPES[dtype].itemsize // 4, device=DEVICE)
    return {"product": product, "read": lambda: buffer.sum()}


def agree(name, dtype, ours, theirs) -> str:
    """Parity before speed: refuse to time two things that are not the same."""
    mine, other = getattr(ours, name)(), getattr(theirs, name)()
    if name in ("first", "decode"):
        same = sum(a == b for a, b in zip(mine, other))
        if dtype == "f32" and same < len(mine):
            sys.exit(f"{name} {dtype}: tokens differ, {mine} against {other}")
        return f"{same}/{len(mine)} tokens equal"
    if name == "resample":  # without the ends, where both filters see silence
        mine, other = mine[0][500:-500], other[0][500:-500]
    if name == "learn":
        mine, other = torch.stack(mine), torch.stack(other)
    if name == "mel":
        mine, other = torch.stack(mine), torch.stack(other)[..., : mine[0].shape[1]]
    error = float((mine.float() - other.float()).norm() / other.float().norm())
    limit = {"resample": 1e-3}.get(name, 1e-5 if dtype == "f32" else 3e-2)
    if error > limit:
        sys.exit(f"{name} {dtype}: the two disagree, relative error {error:.1e}")
    return f"relative error {error:.1e}"


def compare(name, dtype, rounds):
    ours, theirs = Ours(dtype), Theirs(dtype)
    for arm in (ours, theirs):
        getattr(arm, f"prepare_{name}", lambda: None)()
    parity = agree(name, dtype, ours, theirs)
    arms = {"ours": getattr(ours, name), "theirs": getattr(theirs, name), **ceilings(dtype)}
    in_turn(arms, 1)
    found = in_turn(arms, rounds)
    mine, other = found["ours"][0], found["theirs"][0]
    must, aim = MUST.get((name, dtype), ("-", "-"))
    scale = NEW if name == "decode" else 1
    flops = 2 * 2048**3 / found["product"][0] / 1e9
    rate = DECODER * DTYPES[dtype].itemsize / found["read"][0] / 1e9
    others = max(f[1] for f in found.values())
    print(
        f"{name:9}{dtype:5}{mine / scale * 1e3:9.1f}{other / scale * 1e3:10.1f} ms"
        f"{other / mine:8.2f}x"
        f"  must {must}, aim {aim}; {parity}; product {flops:.0f} GFLOP/s, read {rate:.0f} GB/s; "
        f"others {others:.2f}",
        flush=True,
    )
    if name == "learn":
        tokens = sum(len(ids) for ids, _, _ in ours.examples)
        print(f"{'':13}{tokens / mine:.0f} tokens/s, theirs {tokens / other:.0f}")
    if name == "decode":
        floor = found["read"][0] / (mine / NEW)
        print(f"{'':13}{floor:.2f} of the read limit; repacked copy {ours.extra / 1e9:.2f} GB")


def peak(arm, name, dtype):
    """One arm alone in this process: print its peak resident size."""
    run = {"ours": Ours, "theirs": Theirs}[arm](dtype)
    getattr(run, f"prepare_{name}", lambda: None)()
    getattr(run, name)()
    print(peak_bytes() / 1e9)


def peak_bytes() -> int:
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(name, dtype):
    found = {}
    for arm in ("ours", "theirs"):
        command = [sys.executable, "-m", "tests.bench", name, "--dtype", dtype, "--peak", arm]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        found[arm] = float(out.split()[-1])
    print(
        f"{name:9}{dtype:5}peak memory {found['ours']:.2f} GB, theirs {found['theirs']:.2f} GB",
        flush=True,
    )


# --- loading a checkpoint of AF3's size


AF3 = {
    "model_type": "audioflamingo3", "audio_token_id": 151669, "dtype": "bfloat16",
    "audio_config": {"model_type": "audioflamingo3_encoder"},
    "text_config": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 151672,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "rope_theta": 1e6, "max_position_embeddings": 32768,
    },
}  # fmt: skip


def write_af3(dir: Path, layers=28, shard=4_900_000_000):
    """Random bf16 tensors of every name and shape of AF3, in shards with an index."""
    from model import Config, hub_name, write_tensors

    dir.mkdir(parents=True, exist_ok=True)
    config = {**AF3, "text_config": {**AF3["text_config"], "num_hidden_layers": layers}}
    (dir / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        net = PolyAudio(Config.from_dict(config))
    groups = [[]]
    for name, parameter in net.named_parameters():
        if sum(p.numel() * 2 for _, p in groups[-1]) + parameter.numel() * 2 > shard:
            groups.append([])
        groups[-1].append((hub_name(name, False), parameter))
    index = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        tensors = {
            name: torch.empty(p.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
            for name, p in group
        }
        write_tensors(dir / file, tensors)
        index |= dict.fromkeys(tensors, file)
    size = sum(path.stat().st_size for path in dir.glob("*.safetensors"))
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (dir / INDEX).write_text(json.dumps(document))
    return size


def load_arm(arm, dir):
    """Load and read every byte once, as the first forward pass would."""
    start = time.perf_counter()
    if arm == "ours":
        net = PolyAudio.from_dir(dir, dtype=torch.bfloat16)
    else:
        from transformers import AudioFlamingo3ForConditionalGeneration as Kind

        net = Kind.from_pretrained(dir, dtype=torch.bfloat16)
    loaded = time.perf_counter() - start
    for parameter in net.parameters():
        parameter.view(torch.int16).max()
    status = Path("/proc/self/status").read_text()
    own = next(int(x.split()[1]) * 1024 for x in status.split("\n") if x.startswith("RssAnon"))
    print(json.dumps([loaded, time.perf_counter() - start, peak_bytes(), own]))


def load(rounds):
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as dir:
        size = write_af3(Path(dir))
        print(
            f"checkpoint of {size / 1e9:.2f} GB, {free_memory() / 1e9:.1f} GB of memory free",
            flush=True,
        )
        for arm in ("ours", "theirs") * rounds:
            command = [sys.executable, "-m", "tests.bench", "load", "--peak", arm, "--dir", dir]
            out = subprocess.run(
                command, cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout
            loaded, read, high, own = json.loads(out.split("\n")[-2])
            print(
                f"load    bf16 {arm:7} {loaded:6.2f} s, with every byte read {read:6.1f} s; "
                f"peak {high / size:.3f} of the file, of it {own / size:.3f} its own",
                flush=True,
            )


# --- the first command of the README


def start(rounds):
    """Both as a user has them, a process each, their files in memory from the first round on."""
    clips = [str(ROOT / "clips" / f"{name}.flac") for name in ("anna", "anna_noisy")]
    ask = [str(ROOT / "sample.py"), "--clips", *clips, "--ask", "Which audio suffers from noise?"]
    arms = {}
    for name, words in (("ours", ask), ("torch", ["-c", "import torch"])):
        line = [sys.executable, *words]
        arms[name] = partial(subprocess.run, line, check=True, stdout=subprocess.DEVNULL)
    in_turn(arms, 1)
    found = in_turn(arms, rounds)
    mine, other = found["ours"][0], found["torch"][0]
    ratio = f"{mine / other:.2f} times that, must 2"
    print(f"start    f32  {mine:.2f} s, `import torch` {other:.2f} s: {ratio}")


WHAT = ("resample", "mel", "encoder", "first", "decode", "learn", "start", "load")


def main():
    parser = Parser(prog="python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(WHAT))
    parser.add_argument("--dtype", nargs="*", default=["f32", "bf16"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, help="default: 5, of load 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.what = args.what or WHAT[:5]
    for name in args.what:
        expect(name in WHAT, "WHAT", f"some of {', '.join(WHAT)}", name)
    expect(args.rounds is None or args.rounds > 0, "--rounds", "1 or more", args.rounds)
    torch.set_num_threads(args.threads)
    if args.peak:
        load_arm(args.peak, args.dir) if args.dir else peak(args.peak, args.what[0], args.dtype[0])
        return
    print(
        f"{'':13}{'ours':>9}{'theirs':>10}   {'ratio':>8}"
        f"   {args.threads} threads, torch {torch.__version__}, kernels: {kernels.chosen()}"
    )
    for name in args.what:
        if name in ("load", "start"):
            {"load": load, "start": start}[name](args.rounds or {"load": 1, "start": 5}[name])
            continue
        checkpoint()
        for dtype in ["f32"] if name in ("resample", "mel") else args.dtype:
            compare(name, dtype, args.rounds or 5)
            if DEVICE == "cpu":
                memory(name, dtype)


if __name__ == "__main__":
    cli(main)
