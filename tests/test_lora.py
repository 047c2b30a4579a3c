"""What model.py promises about adapters (LoRA).

An adapter that PEFT wrote gives the same logits here, merged or not, whatever it aims at and
however its keys are spelled; one that we wrote gives the same logits in PEFT. A fresh adapter
changes nothing, merging and unmerging gives every bit back, and folding it into a checkpoint keeps
its answers. Gradients reach what is trained and nothing else, and are PEFT's. A kind of adapter
that is not computed here is refused, because it would load and be quietly wrong.

Oracle: peft, on small random checkpoints. It starts B at zero, so B is randomised: an adapter that
does nothing cannot be told from one that was forgotten.
"""

import json
import os
import pickle
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import model
from model import Config, PolyAudio, canonical
from prepare import BadInput
from tests.checkpoints import inputs, interleave, make, oracle_logits, rewrite, waves
from tests.test_weights import AF3, CLASSES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True."),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'layout'."),
]
CLOSE = 2e-5  # of the logits' spread: 3e-5 where their standard deviation is 1.6, as it mostly is
ROWS = [1001, 1000]  # tokens whose embeddings are trained, not in the order of the table
BASES = {  # name: (kind, changes to its text_config)
    "af3": ("af3", {}),
    "qwen2_audio": ("qwen2_audio", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
}


def build(name, dir) -> SimpleNamespace:
    """A small checkpoint, a question to it, and its answer before any adapter."""
    kind, text = BASES[name]
    make(kind, dir, **text)
    audio = kind in ("af3", "qwen2_audio")
    clips = waves((0.3, 1.01)) if audio else []
    ids = interleave(clips) if clips else list(range(100, 140))
    ids = [1000, *ids, 1001, 7, 1000, 8]  # the trained rows are read, and foretold
    base = SimpleNamespace(name=name, kind=kind, text=text, dir=dir, ids=ids, clips=clips)
    base.audio = audio
    base.logits = PolyAudio.from_dir(dir).logits(ids, clips)
    return base


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def af3(tmp_path_factory):
    return build("af3", tmp_path_factory.mktemp("af3"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return build("qwen2 tied", tmp_path_factory.mktemp("tied"))


@pytest.fixture(autouse=True)
def nothing_on_stdout(capsys):
    yield
    assert capsys.readouterr().out == ""


def ask(net, base) -> torch.Tensor:
    with torch.no_grad():
        return net.logits(base.ids, base.clips)


def ask_them(theirs, base) -> torch.Tensor:
    limit = 600 if base.kind == "af3" else 30
    return oracle_logits(base.kind, theirs, base.ids, base.clips, limit)


def distance(a, b) -> float:
    return (a - b).abs().max().item()


def apart(found, expected) -> float:
    """The largest difference, in units of the spread: a tied head's logits are larger than others',
    and so is their rounding."""
    return distance(found, expected) / expected.std().item()


def shake(parameters, amount=0.05, seed=1):
    """Move B, whole modules and rows, so that the adapter does something. A is random already."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(amount * torch.randn(parameter.shape, generator=dice))


def theirs(base, dir, **config):
    """An adapter by PEFT on that base, random, and saved in that folder."""
    torch.manual_seed(3)
    adapted = get_peft_model(make(base.kind, **base.text), LoraConfig(r=4, **config))
    shake(adapted.named_parameters())
    adapted.save_pretrained(dir)
    return adapted.eval()


def ours(base, **config) -> PolyAudio:
    """An adapter by ourselves on that base, random."""
    torch.manual_seed(3)
    net = PolyAudio.from_dir(base.dir)
    net.add_lora(rank=4, alpha=8, **config)
    shake(net.named_parameters())
    return net


def edit_tensors(dir, edit):
    path = dir / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors = edit(tensors) or tensors
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(dir, **changes):
    path = dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ------------------------------------------------------------------------------------------------
# From PEFT to us.

DECODER = r".*\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
CASES = {
    "a list of names": {"target_modules": ["q_proj", "v_proj"]},  # the tower's are meant, too
    "a name in full": {"target_modules": ["layers.1.self_attn.q_proj", "o_proj"]},
    "a regex": {"target_modules": DECODER},
    "every linear": {"target_modules": "all-linear"},
    "all but some": {
        "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "alpha": {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 3, "lora_dropout": 0.5},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 3, "use_rslora": True},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"q_proj": 3, "down_proj": 16},
    },
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "two layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "a module saved whole": {"target_modules": ["q_proj"], "modules_to_save": "the projector"},
    "a module saved whole beside every linear": {
        "target_modules": "all-linear", "modules_to_save": "the projector",
    },
    "norms saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "the vocabulary head": {"target_modules": ["q_proj", "lm_head"]},
    "another random start": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "two rows": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS},
    "two rows of a table": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": ROWS},
    },
}  # fmt: skip


def fitting(case, base) -> dict:
    """The case for that base: a text model has no projector, so its head takes that place."""
    config = dict(CASES[case])
    if config.get("modules_to_save") == "the projector":
        config["modules_to_save"] = ["multi_modal_projector" if base.audio else "lm_head"]
    return config


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_gives_the_same_logits(base, case, tmp_path, capsys):
    expected = ask_them(theirs(base, tmp_path, **fitting(case, base)), base)
    capsys.readouterr()  # what PEFT had to say
    net = PolyAudio.from_dir(base.dir, adapter=tmp_path)
    assert capsys.readouterr().err == "", "there is nothing to warn of"
    assert apart(ask(net, base), expected) < CLOSE
    assert distance(base.logits, expected) > 0.1, "an adapter that does nothing shows nothing"
    net.merge()
    assert apart(ask(net, base), expected) < CLOSE


def as_before_5_10(key):
    """Keys on transformers whose multimodal models had the whole text model inside."""
    key = key.removeprefix("base_model.model.")
    if key.startswith("lm_head"):
        return "base_model.model.language_model." + key
    key = key.removeprefix("model.").replace("language_model.", "language_model.model.")
    return "base_model.model." + key


def with_the_adapters_name(key):
    """Some tools write the keys of PEFT's memory: with the adapter's name inside."""
    return key.replace(".weight", ".default.weight") if ".lora_" in key else key


OLD_CASES = [
    "every linear", "the vocabulary head", "ranks and alphas by pattern", "a module saved whole",
    "two rows",
]  # fmt: skip


@pytest.mark.parametrize("rename", [as_before_5_10, with_the_adapters_name])
@pytest.mark.parametrize("case", OLD_CASES)
def test_other_spellings_of_the_keys_mean_the_same(af3, case, rename, tmp_path):
    theirs(af3, tmp_path, **fitting(case, af3))
    expected = ask(PolyAudio.from_dir(af3.dir, adapter=tmp_path), af3)
    before = set(load_file(tmp_path / "adapter_model.safetensors"))
    edit_tensors(tmp_path, lambda t: {rename(key): tensor for key, tensor in t.items()})
    assert set(load_file(tmp_path / "adapter_model.safetensors")) != before
    assert torch.equal(ask(PolyAudio.from_dir(af3.dir, adapter=tmp_path), af3), expected)


def test_a_list_attaches_only_where_the_file_has_weights(af3, tmp_path, monkeypatch):
    """Names such as q_proj fit the tower, too. Adapters exist whose list is meant for the decoder
    alone, and whose file says so: there are no weights for the tower in it."""
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = theirs(af3, tmp_path, target_modules=seven, exclude_modules=r".*audio_tower.*")
    expected = ask_them(adapted, af3)
    edit_config(tmp_path, exclude_modules=None)
    notes = []
    monkeypatch.setattr("model.note", notes.append)
    net = PolyAudio.from_dir(af3.dir, adapter=tmp_path)
    assert notes == [f"{tmp_path}: an adapter on 21 of 36 layers"], "seven of each decoder layer"
    assert apart(ask(net, af3), expected) < CLOSE
    assert not any("audio_tower" in name for name, _ in net.named_parameters() if ".lora_" in name)


def test_an_adapter_may_be_put_on_later(af3, tmp_path):
    theirs(af3, tmp_path, target_modules=["q_proj"])
    net = PolyAudio.from_dir(af3.dir)
    net.load_adapter(tmp_path)
    assert torch.equal(ask(net, af3), ask(PolyAudio.from_dir(af3.dir, adapter=tmp_path), af3))
    assert not any(p.requires_grad for p in net.parameters()), "loading is not training"


@pytest.mark.parametrize("merged", [False, True], ids=["as it is", "merged"])
def test_a_second_adapter_never_mixes_with_the_first(af3, merged, tmp_path):
    """It is refused, or it takes the first one's place; half of each would be a third one."""
    theirs(af3, tmp_path / "first", target_modules=["v_proj"])
    theirs(af3, tmp_path / "second", target_modules=["q_proj"])
    expected = ask(PolyAudio.from_dir(af3.dir, adapter=tmp_path / "second"), af3)
    net = PolyAudio.from_dir(af3.dir, adapter=tmp_path / "first")
    if merged:
        net.merge()
    before = ask(net, af3)
    try:
        net.load_adapter(tmp_path / "second")
    except BadInput:
        expected = before
    assert torch.equal(ask(net, af3), expected)


def test_a_tied_head_is_adapted_or_follows_its_rows_but_not_both(tied):
    net = PolyAudio.from_dir(tied.dir)
    with pytest.raises(BadInput, match="tied head"):
        net.add_lora(targets=["lm_head"], rows=ROWS)


def test_a_loaded_adapter_can_go_on_learning(af3, tmp_path):
    ours(af3, targets=["v_proj"]).save_adapter(tmp_path)
    net = PolyAudio.from_dir(af3.dir)
    net.load_adapter(tmp_path, trainable=True)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)


def test_a_second_new_adapter_is_refused(af3):
    """The file would name one of them and hold both."""
    net = ours(af3, targets=["v_proj"])
    with pytest.raises(BadInput, match="without an adapter"):
        net.add_lora(targets=["q_proj"])


# ------------------------------------------------------------------------------------------------
# From us to PEFT.

OWN = {
    "the decoder": {},
    "a list of names": {"targets": ["q_proj", "v_proj"]},
    "every linear": {"targets": "all-linear"},
    "rslora": {"rslora": True},
    "two rows": {"rows": ROWS},
}


@pytest.mark.parametrize("case", OWN)
def test_what_we_wrote_gives_the_same_logits_in_peft(base, case, tmp_path):
    net = ours(base, **OWN[case])
    net.save_adapter(tmp_path)
    expected = ask(net, base)
    plain = make(base.kind, **base.text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(plain, tmp_path).eval()
        found = adapted.load_adapter(tmp_path, "again")  # from_pretrained keeps this to itself
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "missing" in text or "keys" in text.lower()]
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if ".again." in key]
    assert apart(ask_them(adapted, base), expected) < CLOSE
    assert distance(base.logits, expected) > 0.1


def test_peft_has_nothing_to_ignore_in_our_config(af3, tmp_path):
    """An adapter in the base's own layout needs no field of ours."""
    ours(af3).save_adapter(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LoraConfig.from_pretrained(tmp_path)
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("case", OWN)
def test_only_what_was_trained_is_in_the_file(base, case, tmp_path):
    net = ours(base, **OWN[case])
    net.save_adapter(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(held) == len(trained) > 0
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in trained.values())
    assert all(key.startswith("base_model.model.") for key in held)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_our_own_file_gives_back_every_bit(base, case, tmp_path):
    net = ours(base, **OWN[case])
    net.save_adapter(tmp_path)
    again = PolyAudio.from_dir(base.dir, adapter=tmp_path)
    assert torch.equal(ask(again, base), ask(net, base))
    again.save_adapter(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_peft_wrote_can_be_written_again(base, tmp_path):
    """Modules saved whole and trained rows included."""
    config = {"target_modules": ["q_proj"], "trainable_token_indices": ROWS}
    config["modules_to_save"] = ["input_layernorm"]
    theirs(base, tmp_path / "theirs", **config)
    PolyAudio.from_dir(base.dir, adapter=tmp_path / "theirs").save_adapter(tmp_path / "ours")
    name = "adapter_model.safetensors"
    first, second = (load_file(tmp_path / who / name) for who in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# ------------------------------------------------------------------------------------------------
# Attaching, merging, folding in.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OWN)
def test_a_fresh_adapter_changes_nothing(base, case, dtype):
    net = PolyAudio.from_dir(base.dir, dtype=dtype)
    before = ask(net, base)
    net.add_lora(rank=4, **OWN[case])
    after = ask(net, base)
    if base.text and case == "two rows":  # their logits come from a smaller product, summed anew
        assert distance(after, before) <= 1e-5 * (1 if dtype == torch.float32 else 2**16)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OWN)
def test_merging_and_unmerging_gives_back_every_bit(base, case, dtype):
    net = PolyAudio.from_dir(base.dir, dtype=dtype)
    net.add_lora(rank=4, **OWN[case])
    shake(net.named_parameters())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    answer = ask(net, base)
    net.merge()
    merged = dict(net.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    aimed_at = {n.replace("lora_A", "weight") for n in before if n.endswith("lora_A")}
    assert changed == aimed_at
    net.unmerge()
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(ask(net, base), answer)


@pytest.mark.parametrize("case", OWN)
def test_merged_gives_the_same_logits(base, case):
    net = ours(base, **OWN[case])
    expected = ask(net, base)
    net.merge()
    once = ask(net, base)
    assert apart(once, expected) < CLOSE
    net.merge()  # a second time is one time too many, and does nothing
    assert torch.equal(ask(net, base), once)
    net.unmerge()
    net.unmerge()
    assert torch.equal(ask(net, base), expected)


def test_merging_without_an_adapter_does_nothing(af3):
    net = PolyAudio.from_dir(af3.dir)
    net.merge()
    assert torch.equal(ask(net, af3), af3.logits)
    net.unmerge()
    assert torch.equal(ask(net, af3), af3.logits)


@pytest.mark.parametrize("merged", [False, True], ids=["as it is", "merged"])
@pytest.mark.parametrize("case", ["every linear", "two rows"])
def test_saving_folds_the_adapter_in(base, case, merged, tmp_path):
    net = ours(base, **OWN[case])
    expected = ask(net, base)
    if merged:
        net.merge()
    net.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    again = PolyAudio.from_dir(tmp_path)
    assert not any(".lora_" in name for name, _ in again.named_parameters())
    assert apart(ask(again, base), expected) < CLOSE
    plain, found = CLASSES[base.kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert apart(ask_them(plain.eval(), base), expected) < CLOSE


@pytest.mark.parametrize("merged", [False, True], ids=["as it is", "merged"])
def test_an_adapted_head_is_saved_though_the_base_ties_it(tied, merged, tmp_path):
    """The head was the table of embeddings and no longer is; the file has to hold both."""
    net = ours(tied, targets=["lm_head"])
    expected = ask(net, tied)
    assert distance(expected, tied.logits) > 0.1
    if merged:
        net.merge()
    net.save(tmp_path)
    assert apart(ask(PolyAudio.from_dir(tmp_path), tied), expected) < CLOSE
    plain = CLASSES[tied.kind].from_pretrained(tmp_path).eval()
    assert apart(ask_them(plain, tied), expected) < CLOSE


# ------------------------------------------------------------------------------------------------
# Finding the base of a run, and the prompt's layout.


def make_run(base, run, name, **config):
    ours(base).save_adapter(run)
    edit_config(run, base_model_name_or_path=name, **config)
    return run


def test_a_run_finds_its_base_from_where_it_lies(af3, tmp_path, monkeypatch):
    shutil.copytree(af3.dir, tmp_path / "weights" / "small")
    run = make_run(af3, tmp_path / "runs" / "one", "../../weights/small")
    monkeypatch.chdir("/")
    net = PolyAudio.from_dir(run)
    assert torch.equal(ask(net, af3), ask(PolyAudio.from_dir(af3.dir, adapter=run), af3))
    assert distance(ask(net, af3), af3.logits) > 0.1
    shutil.move(tmp_path / "runs" / "one", tmp_path / "runs" / "moved")
    assert torch.equal(ask(PolyAudio.from_dir(tmp_path / "runs" / "moved"), af3), ask(net, af3))


@pytest.mark.parametrize("id", ["small", "somebody/small"])
def test_a_run_finds_its_base_under_weights(af3, id, tmp_path, monkeypatch):
    """An id of the Hub is looked for in the folder that prepare.py fills, never fetched."""
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    shutil.copytree(af3.dir, tmp_path / "weights" / "small")
    run = make_run(af3, tmp_path / "elsewhere", id)
    net = PolyAudio.from_dir(run)
    assert net.dir.resolve() == (tmp_path / "weights" / "small").resolve()
    assert distance(ask(net, af3), af3.logits) > 0.1


def test_a_run_that_we_wrote_finds_its_base_from_anywhere(af3, tmp_path, monkeypatch):
    """The base was named relative to where the program ran; the run is read from elsewhere."""
    shutil.copytree(af3.dir, tmp_path / "weights" / "small")
    monkeypatch.chdir(tmp_path)
    net = PolyAudio.from_dir("weights/small")
    net.add_lora(rank=4)
    shake(net.named_parameters())
    net.save_adapter("runs/one")
    monkeypatch.chdir("/")
    net.save_adapter(tmp_path / "runs" / "two")  # its base lies where it lay
    for run in ("one", "two"):
        assert torch.equal(ask(PolyAudio.from_dir(tmp_path / "runs" / run), af3), ask(net, af3))


@pytest.mark.parametrize("name", ["../absent", "somebody/absent", "", None])
def test_a_run_without_its_base_is_refused(af3, name, tmp_path):
    run = make_run(af3, tmp_path / "run", name)
    with pytest.raises(BadInput) as caught:
        PolyAudio.from_dir(run)
    message = str(caught.value)
    assert "\n" not in message
    assert "base_model_name_or_path" in message
    assert str(run) in message
    assert not name or name in message


@pytest.mark.parametrize("where", ["nowhere", "adapter_config.json", "config.json"])
def test_weights_and_adapters_say_their_layout(af3, where, tmp_path):
    dir = rewrite(af3.dir, tmp_path / "base")
    run = make_run(af3, tmp_path / "run", "../base")
    raw = json.loads((run / "adapter_config.json").read_text())
    raw.pop("layout", None)  # as PEFT would write it
    (run / "adapter_config.json").write_text(json.dumps(raw))
    if where == "adapter_config.json":
        edit_config(run, layout="polyaudio")
    if where == "config.json":
        raw = json.loads((dir / "config.json").read_text())
        (dir / "config.json").write_text(json.dumps({**raw, "layout": "polyaudio"}))
    expected = "native" if where == "nowhere" else "polyaudio"
    assert PolyAudio.from_dir(run).layout == expected


def test_the_layout_goes_along_with_an_adapter(af3, tmp_path):
    net = ours(af3)
    net.layout = "polyaudio"
    net.save_adapter(tmp_path)
    assert PolyAudio.from_dir(af3.dir, adapter=tmp_path).layout == "polyaudio"
    adapted = PeftModel.from_pretrained(make("af3"), tmp_path).eval()  # it knows no such field
    assert apart(ask_them(adapted, af3), ask(net, af3)) < CLOSE


# ------------------------------------------------------------------------------------------------
# Refusals.

A = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
NEW = "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_{}.weight"  # of 0..2
NORM = "base_model.model.model.language_model.layers.0.input_layernorm.lora_{}.weight"
DELTA = "base_model.model.{}.token_adapter.trainable_tokens_delta"
FIELDS = {  # changes to the config -> the words that the message must hold
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "biases of LoRA's layers": ({"bias": "lora_only"}, "bias"),
    "another method": ({"peft_type": "LOHA"}, "peft_type"),
    "a soft prompt": ({"peft_type": "PROMPT_TUNING"}, "peft_type"),
    "weights the other way round": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "only after a given text": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "layers that are used twice": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "a start that changes the base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "another such start": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "no rank": ({"r": None}, "r: "),
    "an alpha in words": ({"lora_alpha": "8"}, "lora_alpha"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "rank_pattern"),
    "rank zero": ({"r": 0}, "r: "),
    "another rank": ({"r": 8}, "_proj: "),
    "another rank somewhere": ({"rank_pattern": {"q_proj": 2}}, "q_proj"),
}  # fmt: skip
EDITS = {  # changes to the tensors -> the words
    "A without B": (lambda t: t.pop(B) is None, "q_proj"),
    "B without A": (lambda t: t.pop(A) is None, "q_proj"),
    "an unknown layer": (
        lambda t: t.update({NEW.format("A"): t[A].clone(), NEW.format("B"): t[B].clone()}),
        "layers.3.self_attn.q_proj",
    ),
    "a module that is no linear": (
        lambda t: t.update({NORM.format("A"): t[A].clone(), NORM.format("B"): t[B].clone()}),
        "input_layernorm",
    ),
    "a wrong shape of A": (lambda t: t.update({A: torch.ones(4, 63)}), "q_proj"),
    "a wrong shape of B": (lambda t: t.update({B: torch.ones(65, 4)}), "q_proj"),
    "A and B the other way round": (lambda t: t.update({A: t[B], B: t[A]}), "q_proj"),
    "a tensor of no module": (
        lambda t: t.update({"base_model.model.model.extra.weight": torch.ones(3)}),
        "extra",
    ),
    "magnitudes of DoRA": (
        lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}),
        "lora_magnitude_vector",
    ),
    "a bias of B": (
        lambda t: t.update({B.replace("weight", "bias"): torch.ones(64)}),
        "lora_B.bias",
    ),
    "a whole module of another shape": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2049, 64)}),
        "lm_head",
    ),
    "rows of no token": (
        lambda t: t.update({DELTA.format("model.language_model.embed_tokens"): torch.ones(2, 64)}),
        "trainable_tokens_delta",
    ),
    "nothing": (lambda t: dict.clear(t), "adapter_model.safetensors"),
}  # fmt: skip


def refused(base, adapter) -> str:
    with pytest.raises(BadInput) as caught:
        PolyAudio.from_dir(base.dir, adapter=adapter)
    message = str(caught.value)
    assert "\n" not in message
    assert str(adapter) in message, "the message should say which adapter"
    return message


@pytest.fixture
def good(af3, tmp_path):
    """An adapter for spoiling."""
    theirs(af3, tmp_path / "adapter", target_modules=DECODER)
    return tmp_path / "adapter"


@pytest.mark.parametrize("case", FIELDS)
def test_a_config_that_asks_for_something_else_is_refused(af3, good, case):
    change, words = FIELDS[case]
    edit_config(good, **change)
    assert words in refused(af3, good)


@pytest.mark.parametrize("case", EDITS)
def test_tensors_that_do_not_fit_are_refused(af3, good, case):
    edit, words = EDITS[case]
    edit_tensors(good, lambda tensors: edit(tensors) and None)
    assert words in refused(af3, good)


@pytest.mark.parametrize("rows", [{"lm_head": ROWS}, {"embed_tokens": ROWS, "lm_head": ROWS}])
def test_trained_rows_of_the_head_alone_are_refused(af3, rows, tmp_path):
    """Put into the table of embeddings they would load, and be something else."""
    theirs(af3, tmp_path, target_modules=["q_proj"], trainable_token_indices=rows)
    assert "lm_head" in refused(af3, tmp_path)


@pytest.mark.parametrize("ids", [[1001, 99_999], [1001, -1], [1001, 1001], ["a", "b"], [1.5, 2]])
def test_trained_rows_of_impossible_tokens_are_refused(af3, ids, tmp_path):
    theirs(af3, tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    edit_config(tmp_path, trainable_token_indices=ids)
    assert "trainable_token" in refused(af3, tmp_path)


def test_trained_rows_go_where_their_key_says(af3, tmp_path):
    """A file whose rows are the head's, beside a config that does not say of what they are."""
    theirs(af3, tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    table, head = DELTA.format("model.language_model.embed_tokens"), DELTA.format("lm_head")
    edit_tensors(tmp_path, lambda t: t.update({head: t.pop(table)}))
    assert "lm_head" in refused(af3, tmp_path)


class Bomb:
    """Unpickling this makes a folder, so that a test can tell whether anyone did."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_is_never_opened(af3, good, name, tmp_path):
    (good / "adapter_model.safetensors").unlink()
    (good / name).write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "harm")}))
    message = refused(af3, good)
    assert "pickle" in message
    assert "adapter_model.safetensors" in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3"])
def test_a_config_that_is_none_is_refused(af3, good, data):
    (good / "adapter_config.json").write_bytes(data)
    assert "adapter_config.json" in refused(af3, good)


@pytest.mark.parametrize("data", [b"[]", b"3", b'{"base_model_name_or_path": 3}'])
def test_a_run_whose_config_is_none_is_refused(af3, good, data):
    (good / "adapter_config.json").write_bytes(data)
    with pytest.raises(BadInput, match=str(good)):
        PolyAudio.from_dir(good)


def test_an_adapter_with_a_part_missing_is_refused(af3, good, tmp_path):
    path = good / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(af3, good)
    path.unlink()
    assert path.name in refused(af3, good)
    (good / "adapter_config.json").unlink()
    assert "adapter_config.json" in refused(af3, good)
    assert "adapter_config.json" in refused(af3, tmp_path / "absent")


def test_targets_that_mean_no_layer_are_refused(af3):
    with pytest.raises(BadInput, match="query_proj"):
        PolyAudio.from_dir(af3.dir).add_lora(targets=["query_proj"])


# ------------------------------------------------------------------------------------------------
# A base in bf16: the adapter stays in float32.


def rms(a) -> float:
    return a.float().square().mean().sqrt().item()


@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
def test_an_adapter_on_bf16_stays_in_float32(af3, written, tmp_path):
    theirs(af3, tmp_path, target_modules=DECODER, trainable_token_indices=ROWS)
    edit_tensors(tmp_path, lambda t: {key: tensor.to(written) for key, tensor in t.items()})
    loaded = PolyAudio.from_dir(af3.dir, dtype=torch.bfloat16, adapter=tmp_path)
    fresh = PolyAudio.from_dir(af3.dir, dtype=torch.bfloat16)
    fresh.add_lora(rank=4, rows=ROWS)
    for net in (loaded, fresh):
        types = {name.rpartition(".")[2]: p.dtype for name, p in net.named_parameters()}
        assert types["lora_A"] == types["lora_B"] == types["lora_rows"] == torch.float32
        assert types["weight"] == types["bias"] == torch.bfloat16
        assert ask(net, af3).dtype == torch.bfloat16


def test_an_adapter_on_bf16_is_as_exact_as_peft(af3, tmp_path):
    """Against the logits in float32: two roundings of the same thing differ among themselves."""
    expected = ask_them(theirs(af3, tmp_path, target_modules=DECODER, lora_alpha=16), af3)
    plain = make("af3").to(torch.bfloat16)
    adapted = PeftModel.from_pretrained(plain, tmp_path).eval()
    given = inputs("af3", [(af3.ids, af3.clips)])
    given["input_features"] = given["input_features"].to(torch.bfloat16)
    with torch.no_grad():
        their_error = rms(adapted(**given).logits[0].float() - expected)
    net = PolyAudio.from_dir(af3.dir, dtype=torch.bfloat16, adapter=tmp_path)
    assert rms(ask(net, af3).float() - expected) < 1.2 * their_error
    net.merge()
    assert rms(ask(net, af3).float() - expected) < 1.5 * their_error  # B A is rounded once more


# ------------------------------------------------------------------------------------------------
# Training.


def learn_the_end(base, n=12):
    """One example for `loss`: the last n tokens are to be foretold."""
    learned = [False] * (len(base.ids) - n) + [True] * n
    return [(base.ids, base.clips, learned)]


@pytest.mark.parametrize("case", OWN)
def test_only_the_adapter_is_trained(base, case):
    net = PolyAudio.from_dir(base.dir)
    net.add_lora(rank=4, **OWN[case])
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters() if ".lora_" in name}
    assert len(trained) > 0
    net.loss(learn_the_end(base))[0].backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == trained


def test_a_new_adapter_learns_b_first(af3):
    """B is zero at the start, so nothing flows back through it to A yet."""
    net = PolyAudio.from_dir(af3.dir)
    net.add_lora(rank=4)
    net.loss(learn_the_end(af3))[0].backward()
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            assert bool(parameter.grad.any()) == name.endswith("lora_B"), name


def test_gradients_are_pefts(base, tmp_path):
    """Of A, B and the trained rows, through the same loss."""
    config = {"target_modules": "all-linear", "trainable_token_indices": ROWS, "lora_alpha": 4}
    adapted = theirs(base, tmp_path, **config)
    n, limit = 12, 600 if base.kind == "af3" else 30
    logits = adapted(**inputs(base.kind, [(base.ids, base.clips)], limit)).logits[0]
    targets = torch.tensor(base.ids[-n:])
    expected = torch.nn.functional.cross_entropy(logits[-n - 1 : -1], targets, reduction="sum")
    expected.backward()
    net = PolyAudio.from_dir(base.dir, adapter=tmp_path)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    loss, count = net.loss(learn_the_end(base, n))
    loss.backward()
    assert count == n
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    ours = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    found = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            name = canonical(name.removeprefix("base_model.model.")).replace(".default", "")
            name = name.replace("token_adapter.trainable_tokens_delta", "lora_rows")
            found[name.removesuffix(".weight")] = parameter.grad
    assert ours.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, f"{name}: nothing reaches it"
        assert distance(ours[name], gradient) < 1e-4 * max(1.0, gradient.abs().max().item()), name


def test_a_few_steps_lower_the_loss(base):
    net = PolyAudio.from_dir(base.dir)
    net.add_lora(rank=4, rows=ROWS)
    weights = {n: p.detach().clone() for n, p in net.named_parameters() if ".lora_" not in n}
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, _ = net.loss(learn_the_end(base))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = dict(net.named_parameters())
    assert all(torch.equal(weights[name], now[name]) for name in weights), "the base is untouched"


def test_dropout_is_for_training_only(af3):
    net = ours(af3, dropout=0.5)
    without = ours(af3)
    assert torch.equal(ask(net, af3), ask(without, af3))
    net.train()
    first, second = ask(net, af3), ask(net, af3)
    assert distance(first, second) > 1e-3
    net.eval()
    assert torch.equal(ask(net, af3), ask(without, af3))


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_af3_at_full_size_trains_this_many_parameters(rank):
    """Seven projections in each of 28 layers: 2,523,136 numbers for each unit of rank."""
    for rows in ([], [151652, 151653]):
        with torch.device("meta"):
            net = PolyAudio(Config.from_dict(AF3))
        net.add_lora(rank=rank, rows=rows)
        trained = [p for p in net.parameters() if p.requires_grad]
        assert len(trained) == 28 * 7 * 2 + bool(rows)
        assert sum(p.numel() for p in trained) == 2_523_136 * rank + len(rows) * 3584
