"""What model.py promises about weights on disk.

The network built from a published config has the published tensors, each name and each shape, and
transformers builds the same ones. A checkpoint loads in any of the three ways in which its keys
have been written, in shards or in one file, in any floating type, and gives the same logits, bit
for bit. What `save` writes, transformers loads. A folder that is damaged, dangerous or made for
another network is refused in one line that names the file and the tensor or the field. Loading
costs no memory of its own where no type changes.

Oracle: transformers, on small random checkpoints (tests/checkpoints.py) and, without any weights,
on the configs of the real ones.
"""

import argparse
import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import model
from model import Config, PolyAudio, canonical, hub_name, match_names
from prepare import BadInput
from tests.checkpoints import edit_json, interleave, make, oracle_logits, rewrite, waves
from tests.conftest import ROOT

INDEX = "model.safetensors.index.json"
CLOSE = 3e-5  # logits against transformers; their standard deviation is about 1.6

# ------------------------------------------------------------------------------------------------
# The published checkpoints, as their config.json describes them. Qwen2-Audio's says almost nothing
# about the decoder: what is left out equals the defaults of transformers.

AF3 = {
    "model_type": "audioflamingo3", "audio_token_id": 151669, "dtype": "bfloat16",
    "projector_bias": True, "projector_hidden_act": "gelu",
    "audio_config": {
        "model_type": "audioflamingo3_encoder", "num_mel_bins": 128, "hidden_size": 1280,
        "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120,
        "max_source_positions": 1500, "activation_function": "gelu", "scale_embedding": False,
    },
    "text_config": {
        "model_type": "qwen2", "vocab_size": 151672, "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
        "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": False,
    },
}  # fmt: skip
QWEN2_AUDIO = {
    "model_type": "qwen2_audio", "audio_token_index": 151646, "vocab_size": 156032,
    "torch_dtype": "bfloat16",
    "audio_config": {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "d_model": 1280,
        "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
        "max_source_positions": 1500, "activation_function": "gelu", "scale_embedding": False,
    },
    "text_config": {
        "model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def with_audio_config(audio):
    """Fine-tunes of Qwen2-Audio often drop parts of audio_config, or all of it."""
    rest = {key: value for key, value in QWEN2_AUDIO.items() if key != "audio_config"}
    return rest if audio is None else {**rest, "audio_config": audio}


PUBLISHED = {
    "af3": AF3,
    "qwen2_audio": QWEN2_AUDIO,
    "qwen2_audio, encoder in part": with_audio_config({"d_model": 1280, "encoder_layers": 32}),
    "qwen2_audio, encoder left out": with_audio_config(None),
}

# Every tensor by its key in the files of the Hub; * stands for the number of a layer.
TOWER = {
    "audio_tower.conv1.weight": (1280, 128, 3),
    "audio_tower.conv1.bias": (1280,),
    "audio_tower.conv2.weight": (1280, 1280, 3),
    "audio_tower.conv2.bias": (1280,),
    "audio_tower.embed_positions.weight": (1500, 1280),
    "audio_tower.layers.*.self_attn_layer_norm.weight": (1280,),
    "audio_tower.layers.*.self_attn_layer_norm.bias": (1280,),
    "audio_tower.layers.*.self_attn.q_proj.weight": (1280, 1280),
    "audio_tower.layers.*.self_attn.q_proj.bias": (1280,),
    "audio_tower.layers.*.self_attn.k_proj.weight": (1280, 1280),  # the only one without a bias
    "audio_tower.layers.*.self_attn.v_proj.weight": (1280, 1280),
    "audio_tower.layers.*.self_attn.v_proj.bias": (1280,),
    "audio_tower.layers.*.self_attn.out_proj.weight": (1280, 1280),
    "audio_tower.layers.*.self_attn.out_proj.bias": (1280,),
    "audio_tower.layers.*.final_layer_norm.weight": (1280,),
    "audio_tower.layers.*.final_layer_norm.bias": (1280,),
    "audio_tower.layers.*.fc1.weight": (5120, 1280),
    "audio_tower.layers.*.fc1.bias": (5120,),
    "audio_tower.layers.*.fc2.weight": (1280, 5120),
    "audio_tower.layers.*.fc2.bias": (1280,),
    "audio_tower.layer_norm.weight": (1280,),
    "audio_tower.layer_norm.bias": (1280,),
}
PROJECTOR = {
    "af3": {
        "multi_modal_projector.linear_1.weight": (3584, 1280),
        "multi_modal_projector.linear_1.bias": (3584,),
        "multi_modal_projector.linear_2.weight": (3584, 3584),
        "multi_modal_projector.linear_2.bias": (3584,),
    },
    "qwen2_audio": {
        "multi_modal_projector.linear.weight": (4096, 1280),
        "multi_modal_projector.linear.bias": (4096,),
    },
}
DECODER = {
    "af3": {
        "language_model.model.embed_tokens.weight": (151672, 3584),
        "language_model.model.layers.*.input_layernorm.weight": (3584,),
        "language_model.model.layers.*.self_attn.q_proj.weight": (3584, 3584),
        "language_model.model.layers.*.self_attn.q_proj.bias": (3584,),
        "language_model.model.layers.*.self_attn.k_proj.weight": (512, 3584),
        "language_model.model.layers.*.self_attn.k_proj.bias": (512,),
        "language_model.model.layers.*.self_attn.v_proj.weight": (512, 3584),
        "language_model.model.layers.*.self_attn.v_proj.bias": (512,),
        "language_model.model.layers.*.self_attn.o_proj.weight": (3584, 3584),
        "language_model.model.layers.*.post_attention_layernorm.weight": (3584,),
        "language_model.model.layers.*.mlp.gate_proj.weight": (18944, 3584),
        "language_model.model.layers.*.mlp.up_proj.weight": (18944, 3584),
        "language_model.model.layers.*.mlp.down_proj.weight": (3584, 18944),
        "language_model.model.norm.weight": (3584,),
    },
    "qwen2_audio": {
        "language_model.model.embed_tokens.weight": (156032, 4096),
        "language_model.model.layers.*.input_layernorm.weight": (4096,),
        "language_model.model.layers.*.self_attn.q_proj.weight": (4096, 4096),
        "language_model.model.layers.*.self_attn.q_proj.bias": (4096,),
        "language_model.model.layers.*.self_attn.k_proj.weight": (4096, 4096),
        "language_model.model.layers.*.self_attn.k_proj.bias": (4096,),
        "language_model.model.layers.*.self_attn.v_proj.weight": (4096, 4096),
        "language_model.model.layers.*.self_attn.v_proj.bias": (4096,),
        "language_model.model.layers.*.self_attn.o_proj.weight": (4096, 4096),
        "language_model.model.layers.*.post_attention_layernorm.weight": (4096,),
        "language_model.model.layers.*.mlp.gate_proj.weight": (11008, 4096),
        "language_model.model.layers.*.mlp.up_proj.weight": (11008, 4096),
        "language_model.model.layers.*.mlp.down_proj.weight": (4096, 11008),
        "language_model.model.norm.weight": (4096,),
    },
}
HEAD = {
    "af3": {"language_model.lm_head.weight": (151672, 3584)},
    "qwen2_audio": {"language_model.lm_head.weight": (156032, 4096)},
}
LAYERS = {"af3": 28, "qwen2_audio": 32}  # of the decoder; the tower has 32 in both
TOTALS = {"af3": (830, 8_267_215_360), "qwen2_audio": (876, 8_397_094_912)}
PARTS = {  # parameters of tower, projector, decoder with its embeddings, and vocabulary head
    "af3": (636_968_960, 17_439_744, 7_069_214_208, 543_592_448),
    "qwen2_audio": (636_968_960, 5_246_976, 7_115_771_904, 639_107_072),
}
NUMBERS = {  # what no shape shows: a wrong one would load and be quietly wrong
    "af3": {
        "heads": 28, "kv_heads": 4, "head_size": 128, "eps": 1e-6, "theta": 1e6, "context": 32768,
    },
    "qwen2_audio": {
        "heads": 32, "kv_heads": 32, "head_size": 128, "eps": 1e-5, "theta": 1e4, "context": 8192,
    },
}  # fmt: skip


def spelled_out(patterns: dict, layers: int) -> dict:
    """The table with every * replaced by 0 .. layers - 1."""
    return {
        pattern.replace("*", str(i)): shape
        for pattern, shape in patterns.items()
        for i in range(layers if "*" in pattern else 1)
    }


def tensors_of(kind) -> list[dict]:
    """{key in the Hub's files: shape} of tower, projector, decoder and head."""
    tower, decoder = spelled_out(TOWER, 32), spelled_out(DECODER[kind], LAYERS[kind])
    return [tower, PROJECTOR[kind], decoder, HEAD[kind]]


def size(shape) -> int:
    return torch.Size(shape).numel()


def on_meta(raw) -> PolyAudio:
    """The network of that config without any weights: it has shapes and takes no memory."""
    with torch.device("meta"):
        return PolyAudio(Config.from_dict(raw))


@pytest.mark.parametrize("kind", TOTALS)
def test_the_tables_above_add_up(kind):
    """They are copied by hand from the published files, so they are checked like anything else."""
    parts = tensors_of(kind)
    assert tuple(sum(map(size, part.values())) for part in parts) == PARTS[kind]
    assert (sum(map(len, parts)), sum(PARTS[kind])) == TOTALS[kind]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_tensors(name):
    kind = name.split(",")[0]
    net = on_meta(PUBLISHED[name])
    found = {hub_name(key, False): tuple(p.shape) for key, p in net.named_parameters()}
    expected = {key: shape for part in tensors_of(kind) for key, shape in part.items()}
    assert found == expected
    assert (len(found), sum(p.numel() for p in net.parameters())) == TOTALS[kind]
    assert not list(net.buffers()), "a buffer would be neither in the file nor in the table"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_numbers_that_no_shape_shows(name):
    kind = name.split(",")[0]
    config = Config.from_dict(PUBLISHED[name])
    assert {field: getattr(config.decoder, field) for field in NUMBERS[kind]} == NUMBERS[kind]
    assert config.encoder.heads == 20
    assert config.audio_token == {"af3": 151669, "qwen2_audio": 151646}[kind]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_what_a_config_leaves_out_has_the_value_that_transformers_gives_it(kind):
    theirs = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind]()
    ours = Config.from_dict({"model_type": kind}).decoder
    found = (ours.width, ours.layers, ours.heads, ours.kv_heads, ours.ffn, ours.vocab)
    assert found == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
        theirs.num_key_value_heads, theirs.intermediate_size, theirs.vocab_size,
    )  # fmt: skip
    assert ours.head_size == getattr(theirs, "head_dim", theirs.hidden_size // ours.heads)
    assert ours.eps == theirs.rms_norm_eps
    assert ours.theta == theirs.rope_parameters["rope_theta"]
    assert ours.context == theirs.max_position_embeddings


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_same_tensors(name):
    raw = copy.deepcopy(PUBLISHED[name])
    raw.pop("model_type")
    with torch.device("meta"):
        if name == "af3":
            theirs = AudioFlamingo3ForConditionalGeneration(AudioFlamingo3Config(**raw))
        else:
            theirs = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**raw))
    ours = on_meta(PUBLISHED[name])
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    found = {in_memory(hub_name(key, False)): tuple(p.shape) for key, p in ours.named_parameters()}
    assert found == expected


# ------------------------------------------------------------------------------------------------
# Three ways to write the same keys: the Hub's files, transformers' own names since 5.10, and what
# some releases wrote when they saved a checkpoint again.


def as_on_the_hub(key):
    return key


def in_memory(key):
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return "model." + key.replace("language_model.model.", "language_model.")


def saved_again(key):
    return key.replace("language_model.model.", "language_model.model.model.")


LAYOUTS = [as_on_the_hub, in_memory, saved_again]


def index_of(kind, layout) -> list[str]:
    return [layout(key) for part in tensors_of(kind) for key in part]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TOTALS)
def test_every_key_of_a_full_index_finds_its_tensor(kind, layout):
    keys = index_of(kind, layout)
    expected = dict(on_meta(PUBLISHED[kind]).named_parameters())
    table = match_names(keys, expected, False, "index")
    assert set(table) == set(expected)
    assert sorted(table.values()) == sorted(keys)
    assert all(layout(hub_name(name, False)) == key for name, key in table.items())
    assert all(canonical(key) == name for name, key in table.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TOTALS)
def test_a_full_index_with_one_key_wrong_is_refused_by_name(kind, layout):
    keys = index_of(kind, layout)
    expected = dict(on_meta(PUBLISHED[kind]).named_parameters())
    last = "language_model.model.layers.27.mlp.down_proj.weight"
    with pytest.raises(BadInput, match=r"index.*layers\.27\.mlp\.down_proj\.weight.*missing"):
        match_names([key for key in keys if key != layout(last)], expected, False, "index")
    for extra in ("audio_tower.layers.32.fc1.bias", "audio_tower.layers.0.self_attn.k_proj.bias"):
        with pytest.raises(BadInput, match=rf"index.*{extra}.*left over"):
            match_names([*keys, layout(extra)], expected, False, "index")
    for other in LAYOUTS:
        with pytest.raises(BadInput, match=r"index.*layers\.27\.mlp\.down_proj\.weight"):
            match_names([*keys, other(last)], expected, False, "index")  # doubled


@pytest.mark.parametrize("key", ["language_model.lm_head.weight", "lm_head.weight"])
def test_only_a_config_that_ties_may_leave_the_head_out(key):
    keys = [k for k in index_of("af3", as_on_the_hub) if "lm_head" not in k]
    expected = dict(on_meta(AF3).named_parameters())
    assert "lm_head.weight" not in match_names(keys, expected, True, "index")
    assert match_names([*keys, key], expected, True, "index")["lm_head.weight"] == key
    with pytest.raises(BadInput, match=r"lm_head\.weight.*missing"):
        match_names(keys, expected, False, "index")
    with pytest.raises(BadInput, match="missing"):  # to tie excuses the head and nothing else
        match_names(keys[1:], expected, True, "index")


# ------------------------------------------------------------------------------------------------
# Loading. The first load of a checkpoint is compared with transformers; every other form of it
# holds the same numbers, so it has to give the same logits to the last bit.

CLASSES = {
    "af3": AudioFlamingo3ForConditionalGeneration,
    "qwen2_audio": Qwen2AudioForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
AUDIO_KINDS = ["af3", "qwen2_audio"]


def build(kind, dir, **text) -> SimpleNamespace:
    """A small checkpoint in shards, a question to it, and its answer as our first load gives it."""
    theirs = make(kind, dir, **text)
    clips = waves((0.3, 1.01)) if kind in AUDIO_KINDS else []
    ids = interleave(clips) if clips else list(range(100, 140))
    base = SimpleNamespace(kind=kind, dir=dir, theirs=theirs, ids=ids, clips=clips)
    base.expected = ask_them(theirs, base)
    base.logits = ask(dir, base)
    return base


def ask(dir, base, **how) -> torch.Tensor:
    return PolyAudio.from_dir(dir, **how).logits(base.ids, base.clips)


def ask_them(theirs, base) -> torch.Tensor:
    limit = 600 if base.kind == "af3" else 30  # seconds of a clip
    return oracle_logits(base.kind, theirs, base.ids, base.clips, limit)


def distance(a, b) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=CLASSES)
def base(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=AUDIO_KINDS)
def audio_base(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def af3(tmp_path_factory):
    return build("af3", tmp_path_factory.mktemp("af3"))


@pytest.fixture(autouse=True)
def nothing_on_stdout(capsys):
    """Answers go there. Loading, saving and refusing say nothing, or say it on stderr."""
    yield
    assert capsys.readouterr().out == ""


def in_shards(source, target, shards=3):
    """The one file of `source` as several, with an index."""
    tensors = load_file(source / "model.safetensors")
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    weight_map = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        save_file(part, target / name, metadata={"format": "pt"})
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def test_the_first_load_agrees_with_transformers(base):
    assert (base.dir / INDEX).exists(), "it should come in shards"
    assert base.logits.dtype == torch.float32
    assert distance(base.logits, base.expected) < CLOSE


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_from_one_file_and_from_shards(audio_base, layout, sharded, tmp_path):
    dir = rewrite(audio_base.dir, tmp_path / "one", rename=layout)
    if sharded:
        dir = in_shards(dir, tmp_path / "several")
    assert torch.equal(ask(dir, audio_base), audio_base.logits)


@pytest.mark.parametrize("strip", ["", "model."], ids=["with model.", "without"])
def test_a_text_model_loads_with_and_without_its_prefix(strip, tmp_path):
    base = build("qwen2", tmp_path / "base")
    dir = rewrite(base.dir, tmp_path / "one", rename=lambda key: key.removeprefix(strip))
    assert torch.equal(ask(dir, base), base.logits)


def all_bf16(key):
    return torch.bfloat16


def all_f16(key):
    return torch.float16


def wide_tower(key):
    """A release of AF3 had its tower in float32 beside a bf16 decoder."""
    return torch.bfloat16 if key.startswith(("language_model", "model")) else torch.float32


@pytest.mark.parametrize("dtype", [all_bf16, all_f16, wide_tower])
def test_any_floating_type_is_cast_on_the_way(base, dtype, tmp_path):
    """The same rounded numbers, written in the narrow type and written again in float32."""
    narrow = rewrite(base.dir, tmp_path / "narrow", dtype=dtype)
    wide = rewrite(narrow, tmp_path / "wide", dtype=lambda key: torch.float32)
    logits = ask(narrow, base)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, ask(wide, base))
    assert not torch.equal(logits, base.logits), "nothing was rounded, so nothing was tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_network_has_the_type_that_was_asked_for(audio_base, dtype, tmp_path):
    mixed = rewrite(audio_base.dir, tmp_path, dtype=wide_tower)
    net = PolyAudio.from_dir(mixed, dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert net.dtype == dtype


def test_constants_in_old_files_are_passed_over(base, tmp_path):
    prefix = "language_model.model" if base.kind in AUDIO_KINDS else "model"

    def add(tensors):
        tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(4)
        tensors[f"{prefix}.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert torch.equal(ask(rewrite(base.dir, tmp_path, edit=add), base), base.logits)


def rename_fields(section, names):
    return {names.get(key, key): value for key, value in section.items()}


OLD_NAMES = {
    "hidden_size": "d_model", "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads", "intermediate_size": "encoder_ffn_dim",
}  # fmt: skip


def old_encoder_names(raw):
    raw["audio_config"] = rename_fields(raw["audio_config"], OLD_NAMES)


def new_encoder_names(raw):
    new = {old: name for name, old in OLD_NAMES.items()}
    raw["audio_config"] = rename_fields(raw["audio_config"], new)


def old_token_name(raw):
    raw["audio_token_index"] = raw.pop("audio_token_id", None) or raw["audio_token_index"]


def new_token_name(raw):
    raw["audio_token_id"] = raw.pop("audio_token_index", None) or raw["audio_token_id"]


def old_rope(raw):
    rope = raw["text_config"].pop("rope_parameters")
    raw["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}


def rope_scaling(raw):
    rope = raw["text_config"].pop("rope_parameters")
    raw["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "default"}}


def torch_dtype(raw):
    raw["torch_dtype"] = raw.pop("dtype", "float32")


def unknown_fields(raw):
    raw["a_field_of_tomorrow"] = {"anything": [1, None]}
    raw["text_config"]["another"] = None


@pytest.mark.parametrize("edit", [
    old_encoder_names, new_encoder_names, old_token_name, new_token_name, old_rope, rope_scaling,
    torch_dtype, unknown_fields,
])  # fmt: skip
def test_fields_may_have_their_old_names_or_their_new_ones(audio_base, edit, tmp_path):
    dir = rewrite(audio_base.dir, tmp_path)
    raw = json.loads((dir / "config.json").read_text())
    before = json.dumps(raw)
    edit(raw)
    (dir / "config.json").write_text(json.dumps(raw))
    if edit not in (old_encoder_names, new_encoder_names, old_token_name, new_token_name):
        assert json.dumps(raw) != before, "each of the two checkpoints has one form already"
    assert torch.equal(ask(dir, audio_base), audio_base.logits)


# --- tied embeddings: one matrix that is both the table of tokens and the vocabulary head


def drop_head(tensors):
    for key in [key for key in tensors if "lm_head" in key]:
        del tensors[key]


def tie_in_config(dir, tied=True):
    raw = json.loads((dir / "config.json").read_text())
    raw.get("text_config", raw)["tie_word_embeddings"] = tied
    (dir / "config.json").write_text(json.dumps(raw))


def test_a_tied_text_model_shares_one_matrix(tmp_path):
    base = build("qwen2", tmp_path, tie_word_embeddings=True)
    net = PolyAudio.from_dir(tmp_path)
    assert net.lm_head.weight is net.language_model.embed_tokens.weight
    assert distance(base.logits, base.expected) < CLOSE


def test_a_tied_text_model_whose_file_repeats_the_matrix_shares_it_too(tmp_path):
    """Some releases of small Qwen models hold it twice. transformers ties what is equal; it matters
    as soon as rows of the one are trained and the other should follow."""
    base = build("qwen2", tmp_path / "base", tie_word_embeddings=True)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    dir = rewrite(base.dir, tmp_path / "twice", edit=repeat)
    theirs = Qwen2ForCausalLM.from_pretrained(dir)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    net = PolyAudio.from_dir(dir)
    assert net.lm_head.weight is net.language_model.embed_tokens.weight
    assert torch.equal(ask(dir, base), base.logits)


def test_a_config_that_ties_does_not_overrule_a_head_in_the_file(base, tmp_path):
    """transformers, too, keeps both where both are there and differ."""
    dir = rewrite(base.dir, tmp_path)
    tie_in_config(dir)
    theirs = CLASSES[base.kind].from_pretrained(dir)
    assert torch.equal(ask(dir, base), base.logits)
    assert distance(base.logits, ask_them(theirs, base)) < CLOSE


def test_a_tied_config_without_a_head_uses_the_embeddings(base, tmp_path):
    """Twins: one without a head that ties, one whose head is a copy of its embeddings."""

    def copy_to_head(tensors):
        head = next(key for key in tensors if "lm_head" in key)
        tensors[head] = next(t for key, t in tensors.items() if "embed_tokens" in key).clone()

    tied = rewrite(base.dir, tmp_path / "tied", edit=drop_head)
    tie_in_config(tied)
    twin = rewrite(base.dir, tmp_path / "twin", edit=copy_to_head)
    assert torch.equal(ask(tied, base), ask(twin, base))


def test_an_untied_config_without_a_head_is_refused(base, tmp_path):
    dir = rewrite(base.dir, tmp_path, edit=drop_head)
    tie_in_config(dir, False)
    with pytest.raises(BadInput, match=r"lm_head\.weight.*missing"):
        PolyAudio.from_dir(dir)


# --- configs that ask for something else: they would load, and answer, and be wrong

ASKS = {
    "sliding window": ("text_config", {"use_sliding_window": True}, "use_sliding_window"),
    "another activation": ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
    "yarn": (
        "text_config",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        "rope_type.*yarn",
    ),
    "old linear scaling": (
        "text_config",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type.*linear",
    ),
    "relu in the tower": ("audio_config", {"activation_function": "relu"}, "activation_function"),
    "scaled embedding": ("audio_config", {"scale_embedding": True}, "scale_embedding"),
    "80 mel bins": ("audio_config", {"num_mel_bins": 80}, "num_mel_bins"),
    "other windows": ("audio_config", {"max_source_positions": 750}, "max_source_positions"),
    "relu between": ("", {"projector_hidden_act": "relu"}, "projector_hidden_act"),
    "no bias between": ("", {"projector_bias": False}, "projector_bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKS)
def test_a_config_that_asks_for_what_is_not_computed_is_refused(af3, case, tmp_path):
    section, change, field = ASKS[case]
    dir = rewrite(af3.dir, tmp_path)
    raw = json.loads((dir / "config.json").read_text())
    (raw[section] if section else raw).update(change)
    (dir / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=rf"config\.json.*{field}"):
        PolyAudio.from_dir(dir)


@pytest.mark.parametrize("case", ["sliding window", "another activation", "yarn"])
def test_so_is_the_config_of_a_text_model(case, tmp_path):
    _, change, field = ASKS[case]
    make("qwen2", tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(BadInput, match=rf"config\.json.*{field}"):
        PolyAudio.from_dir(tmp_path)


# ------------------------------------------------------------------------------------------------
# Saving: transformers loads what we write, and finds every key.


def by_transformers(kind, dir):
    """Its model of that folder, after making sure that it had all it wanted and no more."""
    theirs, found = CLASSES[kind].from_pretrained(dir, output_loading_info=True)
    assert not any(found.values()), found
    return theirs.eval()


def assert_same_parameters(theirs, others):
    expected = dict(others.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_transformers_loads_what_we_save(base, tmp_path):
    PolyAudio.from_dir(base.dir).save(tmp_path)
    theirs = by_transformers(base.kind, tmp_path)
    assert_same_parameters(theirs, base.theirs)
    assert torch.equal(ask_them(theirs, base), base.expected)
    assert torch.equal(ask(tmp_path, base), base.logits)
    assert not list(tmp_path.glob("*.part")), "a file of a save that did not end"


@pytest.mark.parametrize("kind", ["qwen2", *AUDIO_KINDS])
def test_a_tied_network_saves_one_that_transformers_understands(kind, tmp_path):
    """transformers ties the text models only. For the others it makes up a head that is missing."""
    base = build(kind, tmp_path / "base", tie_word_embeddings=kind == "qwen2")
    tied = rewrite(base.dir, tmp_path / "tied", edit=drop_head)
    tie_in_config(tied)
    net = PolyAudio.from_dir(tied)
    net.save(tmp_path / "saved")
    theirs = by_transformers(kind, tmp_path / "saved")
    assert distance(ask_them(theirs, base), net.logits(base.ids, base.clips)) < CLOSE
    assert torch.equal(ask(tmp_path / "saved", base), ask(tied, base))


def test_a_large_network_is_saved_in_shards_with_an_index(base, tmp_path):
    limit = 150_000
    PolyAudio.from_dir(base.dir).save(tmp_path, shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 2
    assert {key: name for name, held in shards.items() for key in held} == index["weight_map"]
    sizes = [sum(t.nbytes for t in held.values()) for held in shards.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(n <= limit or len(held) == 1 for n, held in zip(sizes, shards.values()))
    published = {key for file in base.dir.glob("*.safetensors") for key in load_file(file)}
    assert set(index["weight_map"]) == published, "the keys are those of the Hub's files"
    assert_same_parameters(by_transformers(base.kind, tmp_path), base.theirs)
    assert torch.equal(ask(tmp_path, base), base.logits)


def test_bf16_stays_bf16(base, tmp_path):
    net = PolyAudio.from_dir(base.dir, dtype=torch.bfloat16)
    net.save(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    theirs = by_transformers(base.kind, tmp_path)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}, "read from config.json"
    again = PolyAudio.from_dir(tmp_path, dtype=torch.bfloat16)
    expected = dict(net.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())


def test_a_file_in_another_layout_is_saved_as_on_the_hub(audio_base, tmp_path):
    again = rewrite(audio_base.dir, tmp_path / "again", rename=saved_again)
    PolyAudio.from_dir(again).save(tmp_path / "saved")
    assert_same_parameters(by_transformers(audio_base.kind, tmp_path / "saved"), audio_base.theirs)


def test_what_lies_beside_the_weights_goes_along(af3, tmp_path):
    source = rewrite(af3.dir, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not ours to copy")
    net = PolyAudio.from_dir(source)
    net.layout = "polyaudio"
    net.save(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    expected = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert files == expected
    assert PolyAudio.from_dir(tmp_path / "saved").layout == "polyaudio"


FORMS = {"one file": 10**9, "few shards": 400_000, "many shards": 100_000}


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_a_network_may_be_saved_over_the_folder_it_came_from(af3, before, after, tmp_path):
    """The parameters are maps of the very files that are replaced. Whatever the number of shards
    was, both readers must see the new weights afterwards and no leftovers of the old ones."""
    PolyAudio.from_dir(af3.dir).save(tmp_path, shard_bytes=FORMS[before])
    net = PolyAudio.from_dir(tmp_path)
    with torch.no_grad():
        net.language_model.norm.weight.mul_(-1)
    expected = net.logits(af3.ids, af3.clips)
    net.save(tmp_path, shard_bytes=FORMS[after])
    assert torch.equal(net.logits(af3.ids, af3.clips), expected), "the network itself lives on"
    assert torch.equal(ask(tmp_path, af3), expected)
    theirs = by_transformers("af3", tmp_path)
    assert distance(ask_them(theirs, af3), expected) < CLOSE


# ------------------------------------------------------------------------------------------------
# Refusals: one line that names the file, and the tensor or the field.


@pytest.fixture
def one(af3, tmp_path):
    """A good checkpoint in one file, for spoiling."""
    return rewrite(af3.dir, tmp_path / "one")


@pytest.fixture
def several(af3, tmp_path):
    """A good checkpoint in shards, for spoiling."""
    return shutil.copytree(af3.dir, tmp_path / "several")


def refused(dir) -> str:
    with pytest.raises(BadInput) as caught:
        PolyAudio.from_dir(dir)
    message = str(caught.value)
    assert "\n" not in message
    assert str(dir) in message, "the message should say which folder"
    return message


NORM = "language_model.model.norm.weight"
TENSORS = {
    "missing": (lambda t: t.pop(NORM), "norm.weight"),
    "left over": (lambda t: t.update({"language_model.model.extra": torch.ones(3)}), "model.extra"),
    "a bias too many": (
        lambda t: t.update({"audio_tower.layers.1.self_attn.k_proj.bias": torch.ones(48)}),
        "audio_tower.layers.1.self_attn.k_proj.bias",
    ),
    "too long": (
        lambda t: t.update({NORM: torch.ones(65)}),
        f"{NORM}: expected (64,), found (65,)",
    ),
    "transposed": (
        lambda t: t.update({"audio_tower.layers.0.fc1.weight": torch.ones(48, 96)}),
        "audio_tower.layers.0.fc1.weight: expected (96, 48), found (48, 96)",
    ),
    "integers": (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), f"{NORM}: "),
    "booleans": (lambda t: t.update({NORM: torch.ones(64, dtype=torch.bool)}), f"{NORM}: "),
    "twice": (lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}), NORM),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(af3, case, tmp_path):
    edit, words = TENSORS[case]
    assert words in refused(rewrite(af3.dir, tmp_path, edit=edit))


class Bomb:
    """Unpickling this makes a folder, so that a test can tell whether anyone did."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
def test_a_pickle_is_never_opened(one, name, zipped, tmp_path):
    (one / "model.safetensors").unlink()
    with open(one / name, "wb") as file:
        if zipped:
            torch.save({"weight": Bomb(tmp_path / "harm")}, file)
        else:
            pickle.dump({"weight": Bomb(tmp_path / "harm")}, file)
    message = refused(one)
    assert name in message
    assert "pickle" in message
    assert not (tmp_path / "harm").exists()


def header_size(data: bytes) -> int:
    return struct.unpack("<Q", data[:8])[0]


DAMAGE = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[: 8 + header_size(data) // 2],
    "cut after the header": lambda data: data[: 8 + header_size(data)],
    "cut in the last tensor": lambda data: data[:-1],
    "bytes behind the last tensor": lambda data: data + b"\0",
    "header that is no JSON": lambda data: data[:8] + b"?" * header_size(data),
    "header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused(one, case):
    path = one / "model.safetensors"
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    assert "model.safetensors" in refused(one)


def test_a_damaged_shard_is_refused_by_name(several):
    path = sorted(several.glob("*.safetensors"))[3]
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(several)


def test_a_folder_in_the_place_of_the_weights_is_refused(one):
    (one / "model.safetensors").unlink()
    (one / "model.safetensors").mkdir()
    assert "model.safetensors" in refused(one)


def test_a_folder_without_weights_is_refused(one):
    (one / "model.safetensors").unlink()
    assert "model.safetensors" in refused(one)


def test_shards_without_their_index_are_refused(several):
    (several / INDEX).unlink()
    assert "index" in refused(several)


def edit_index(dir, edit):
    index = json.loads((dir / INDEX).read_text())
    edit(index["weight_map"])
    (dir / INDEX).write_text(json.dumps(index))


OUTSIDE = ["../x.safetensors", "/x.safetensors", "deep/x.safetensors", "..", ".", "", None, 7, [1]]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_an_index_cannot_lead_out_of_its_folder(several, name):
    """The file that it points at is there and would load."""
    good = sorted(several.glob("*.safetensors"))[0].read_bytes()
    (several / "deep").mkdir()
    for place in (several.parent, several / "deep"):
        (place / "x.safetensors").write_bytes(good)
    edit_index(several, lambda weight_map: weight_map.update({NORM: name}))
    message = refused(several)
    assert INDEX in message
    assert NORM in message


def test_a_shard_that_the_index_names_must_be_there(several):
    path = sorted(several.glob("*.safetensors"))[3]
    path.unlink()
    assert path.name in refused(several)


INDEX_CASES = {
    "a key less": (lambda weight_map: weight_map.pop(NORM), NORM),
    "a key more": (lambda w: w.update({"language_model.model.extra": w[NORM]}), "model.extra"),
    "another shard": (
        lambda w: w.update({NORM: next(name for name in w.values() if name != w[NORM])}),
        NORM,
    ),
}


@pytest.mark.parametrize("case", INDEX_CASES)
def test_index_and_shards_must_agree(several, case):
    edit, words = INDEX_CASES[case]
    edit_index(several, edit)
    assert words in refused(several)


NO_INDEX = ["{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}']


@pytest.mark.parametrize("text", NO_INDEX)
def test_an_index_that_is_none_is_refused(several, text):
    (several / INDEX).write_text(text)
    assert INDEX in refused(several)


NO_CONFIG = {
    "empty": b"",
    "half of it": b'{"model_type": "audioflam',
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "a string": b'"audioflamingo3"',
    "nothing in it": b"{}",
    "another model": b'{"model_type": "llama"}',
    "a type that is no string": b'{"model_type": ["audioflamingo3"]}',
    "a decoder that is no section": b'{"model_type": "audioflamingo3", "text_config": "qwen2"}',
    "a perceiver of unknown size": b'{"model_type": "polyaudio"}',
    "a resampler that is no section": b'{"model_type": "polyaudio", "resampler": "perceiver"}',
    "a width that is no number": b'{"model_type": "qwen2", "hidden_size": "64"}',
    "a number of layers that is no number": b'{"model_type": "qwen2", "num_hidden_layers": "3"}',
    "no heads": b'{"model_type": "qwen2", "num_attention_heads": 0}',
    "heads that do not divide the width": (
        b'{"model_type": "audioflamingo3", "audio_config": {"num_attention_heads": 7}}'
    ),
    "key heads that do not divide the heads": (
        b'{"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 4}'
    ),
    "layers of a perceiver that are no number": (
        b'{"model_type": "polyaudio", "resampler": {"slots": 4, "layers": "2"}}'
    ),
    "heads of a perceiver that do not divide the width": (
        b'{"model_type": "polyaudio", "resampler": {"slots": 4, "heads": 7}}'
    ),
    "a resampler of unknown kind": b'{"model_type": "audioflamingo3", "resampler": {"kind": "x"}}',
}


@pytest.mark.parametrize("case", NO_CONFIG)
def test_a_config_that_is_none_is_refused(one, case):
    (one / "config.json").write_bytes(NO_CONFIG[case])
    assert "config.json" in refused(one)


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_generation_config_that_is_none_is_refused(one, text):
    """It is read when the first answer is asked for."""
    (one / "generation_config.json").write_text(text)
    net = PolyAudio.from_dir(one)
    with pytest.raises(BadInput, match=r"generation_config\.json"):
        net.stops  # noqa: B018


@pytest.mark.parametrize("section", ["text_config", "audio_config"])
def test_a_section_that_is_null_means_the_defaults(section):
    """Files written by transformers may say so; the absent section means the same."""
    raw = {"model_type": "qwen2_audio", "text_config": {}, "audio_config": {}}
    rest = {key: value for key, value in raw.items() if key != section}
    null, absent = Config.from_dict({**raw, section: None}), Config.from_dict(rest)
    assert (null.encoder, null.decoder) == (absent.encoder, absent.decoder)


def test_a_decoder_of_another_family_is_refused(one):
    raw = json.loads((one / "config.json").read_text())
    raw["text_config"]["model_type"] = "llama"
    (one / "config.json").write_text(json.dumps(raw))
    message = refused(one)
    assert "config.json" in message
    assert "llama" in message


def test_a_folder_that_is_none_is_refused(one, tmp_path):
    assert "absent" in refused(tmp_path / "absent")
    assert "config.json" in refused(one / "config.json")
    (one / "config.json").unlink()
    assert "config.json" in refused(one)


# ------------------------------------------------------------------------------------------------
# Memory. Measured in a process of its own: RssAnon is what the process had to find room for,
# VmHWM the most that it held, pages of the files included.

MEASURE = """
import json, sys
import torch
from model import PolyAudio

def status(field):
    line = next(x for x in open("/proc/self/status") if x.startswith(field))
    return int(line.split()[1]) * 1024

dir, tiny = sys.argv[1:]
PolyAudio.from_dir(tiny, dtype=torch.bfloat16)  # whatever the first load of all costs
before, own = status("VmRSS"), status("RssAnon")
net = PolyAudio.from_dir(dir, dtype=torch.bfloat16)
for parameter in net.parameters():
    parameter.view(torch.int16).max()  # read every byte, as the first question would
spans = []
for line in open("/proc/self/maps"):
    if dir in line:
        spans.append([int(x, 16) for x in line.split()[0].split("-")])
views = [any(a <= p.data_ptr() < b for a, b in spans) for p in net.parameters()]
out = [status("RssAnon") - own, status("VmHWM") - before, all(views), len(views)]
print(json.dumps(out))
"""
MIDDLE = {
    "model_type": "audioflamingo3",
    "audio_config": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                     "intermediate_size": 2048},
    "text_config": {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "intermediate_size": 4096, "vocab_size": 16384},
}  # fmt: skip


def write_random(raw, dir, shards) -> int:
    """A bf16 checkpoint of that config in so many shards. -> bytes of all its files"""
    dir.mkdir()
    (dir / "config.json").write_text(json.dumps(raw))
    shapes = [(hub_name(name, False), p.shape) for name, p in on_meta(raw).named_parameters()]
    noise = torch.randn(2**20).bfloat16()  # repeated: nobody will ask this network anything
    weight_map = {}
    for i in range(shards):
        held = {
            name: noise.repeat(-(-size(shape) // 2**20))[: size(shape)].view(shape).clone()
            for name, shape in shapes[i::shards]
        }
        save_file(held, dir / f"model-{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, f"model-{i}.safetensors")
    (dir / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in dir.glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_loading_takes_no_memory_of_its_own(tmp_path):
    dir, tiny = tmp_path / "middle", tmp_path / "tiny"
    file_size = write_random(MIDDLE, dir, 5)
    assert file_size > 190e6
    make("af3", tiny)
    command = [sys.executable, "-c", MEASURE, str(dir), str(tiny)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=ROOT, env=quiet, check=True, capture_output=True, text=True)
    own, peak, all_views, tensors = json.loads(out.stdout)
    assert tensors == len(list(on_meta(MIDDLE).parameters()))
    assert all_views, "a parameter that is no view of a file's map is a copy"
    assert own < 0.05 * file_size
    assert peak < 1.05 * file_size


# ------------------------------------------------------------------------------------------------
# The flags that every script shares, and what is chosen where they choose nothing.

GB = 10**9
CHOICES = [  # device, type in the file, parameters, bytes free -> type
    ("cuda", torch.float32, 8 * GB, 0, torch.bfloat16),
    ("cuda:1", torch.bfloat16, 8 * GB, 0, torch.bfloat16),
    ("cpu", torch.float32, 8 * GB, 0, torch.float32),  # anything else would be a copy
    ("cpu", torch.bfloat16, GB, 5 * GB, torch.float32),
    ("cpu", torch.bfloat16, GB, 4 * GB, torch.bfloat16),  # a tenth is kept free
    ("cpu", torch.float16, GB, 4 * GB, torch.float16),
    ("mps", torch.bfloat16, GB, 5 * GB, torch.float32),
]


@pytest.mark.parametrize("device, held, parameters, free, expected", CHOICES)
def test_auto_takes_the_widest_type_that_fits(
    monkeypatch, device, held, parameters, free, expected
):
    monkeypatch.setattr(model, "free_memory", lambda: free)
    assert model.auto_dtype(device, parameters, held) == expected


@pytest.mark.parametrize("free, expected", [(0, torch.bfloat16), (GB, torch.float32)])
def test_auto_asks_the_file_and_the_machine(af3, monkeypatch, free, expected, tmp_path):
    dir = rewrite(af3.dir, tmp_path, dtype=wide_tower)  # the decoder decides: it is the larger part
    monkeypatch.setattr(model, "free_memory", lambda: free)
    net = PolyAudio.from_dir(dir, dtype="auto")
    assert {p.dtype for p in net.parameters()} == {expected}


MEMINFO = "MemTotal: 16000000 kB\nMemFree: 10 kB\nMemAvailable: 8000000 kB\nBuffers: 5 kB\n"
LIMIT, USED = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"
MACHINES = {
    "no container": ({}, 8_192_000_000),
    "a container without a limit": ({LIMIT: "max\n", USED: "1\n"}, 8_192_000_000),
    "a tight container": ({LIMIT: "4000000000\n", USED: "1000000000\n"}, 3_000_000_000),
    "a wide container": ({LIMIT: "40000000000\n", USED: "1000000000\n"}, 8_192_000_000),
}


@pytest.mark.parametrize("case", MACHINES)
def test_free_memory_is_what_machine_and_container_leave(monkeypatch, case):
    files, expected = MACHINES[case]
    texts = {"/proc/meminfo": MEMINFO, **files}

    def read_text(path, *args, **kwargs):
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        found = model.free_memory()
    assert found == expected


def test_free_memory_is_a_guess_where_nothing_tells(monkeypatch):
    def read_text(path, *args, **kwargs):
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        found = model.free_memory()
    assert 0 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def flags(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    model.add_weight_flags(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize("name, dtype", [
    ("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16), ("auto", None),
])  # fmt: skip
def test_the_flags_choose_device_and_type(af3, name, dtype, monkeypatch):
    monkeypatch.setattr(model, "free_memory", lambda: 0)
    given = flags("--weights", str(af3.dir), "--device", "cpu", "--dtype", name)
    net = model.load_net(given)
    assert net.device == torch.device("cpu")
    assert net.dtype == (dtype or torch.float32)


def test_without_flags_the_device_is_the_best_that_is_there(af3):
    best = "cuda" if torch.cuda.is_available() else "mps"
    best = best if torch.cuda.is_available() or torch.backends.mps.is_available() else "cpu"
    net = model.load_net(flags("--weights", str(af3.dir)))
    assert net.device.type == best


@pytest.mark.parametrize("device", ["toaster", "cpu:x", "cuda:99", "meta:1:2"])
def test_a_device_that_is_not_there_is_refused(af3, device):
    with pytest.raises(BadInput) as caught:
        model.load_net(flags("--weights", str(af3.dir), "--device", device))
    assert device in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_files_on_disk_are_plain_safetensors(af3, tmp_path):
    PolyAudio.from_dir(af3.dir).save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers asks for it"


def test_saving_leaves_files_of_other_names_alone(one, tmp_path):
    (tmp_path / "model_of_mine.safetensors").write_bytes(b"mine")
    net = PolyAudio.from_dir(one)
    net.save(tmp_path, shard_bytes=100_000)
    net.save(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
    assert names == ["model.safetensors", "model_of_mine.safetensors"]
