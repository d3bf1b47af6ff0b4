"""Drafters as directories: what is written, what is read again, and what is refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from dlm_jax.checkpoints import drafter_layouts, load_pretrained, open_drafter, save_drafter
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.cli.main import main
from dlm_jax.errors import CheckpointError
from dlm_jax.models import Drafter, DrafterConfig, ModelConfig
from tests.checkpoints import drafter_files, families


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    for name in drafter_files.TARGETS:
        drafter_files.write_target(name, folder / name)
    return folder


@pytest.fixture
def files(targets, tmp_path):
    """Returns a function that writes a case's directory, with changed settings, and returns it."""
    def write(case="dflash-llama", nested=None, **settings):
        target = targets / drafter_files.CASES[case][0]
        drafter_files.write_drafter(case, tmp_path / case, target)
        path = tmp_path / case / "config.json"
        config = json.loads(path.read_text()) | settings
        config["dflash_config"] = config.get("dflash_config", {}) | (nested or {})
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
        return tmp_path / case

    return write


@pytest.fixture
def target(targets):
    return load_pretrained(targets / "llama").model


def read(folder, **options):
    return open_drafter(folder, **options).drafter


def assert_same(a, b):
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


@pytest.mark.parametrize("case", drafter_files.CASES)
def test_what_is_written_is_what_was_published(files, targets, tmp_path, case):
    pretrained = load_pretrained(targets / drafter_files.CASES[case][0])
    source = files(case)
    drafter = read(source, target=pretrained.model)
    save_drafter(tmp_path / "out", drafter, pretrained)
    published, written = read_tensors(source), read_tensors(tmp_path / "out")
    assert published.keys() == written.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(written[name], tensor)
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    changed = {name for name, value in original.items() if config.get(name) != value}
    assert changed <= {"dflash_config", "rope_parameters", "use_cache", "sliding_window", "markov_head_type"}
    assert (config["block_size"], config["mask_token_id"], config["target_layer_ids"]) == (
        drafter_files.BLOCK, drafter_files.MASK, drafter_files.IDS)
    assert config["dflash_config"].items() >= original.get("dflash_config", {}).items()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert_same(read(tmp_path / "out", target=pretrained.model), drafter)


def test_names_and_shapes_are_those_of_a_released_dflash2():
    """Sizes of the fixture in z-lab's tests, from which `published_shapes` gives the shapes of its header."""
    config = drafter_files.CASES["dflash2"][1] | dict(
        hidden_size=6656, intermediate_size=19968, head_dim=128, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=5, vocab_size=202048)
    config["dflash_config"] = config["dflash_config"] | dict(conv_group_size=16, selector_rank=256)
    shapes = drafter_files.published_shapes(config)
    assert shapes["layers.4.mlp_conv.kernel_projection.weight"] == (1664, 6656)
    layers = ModelConfig("qwen3", vocab_size=202048, hidden_size=6656, num_layers=5, num_heads=32, num_kv_heads=8,
                         head_dim=128, mlp_size=19968, max_length=131072, qk_norm=True)
    drafter = nnx.eval_shape(lambda: Drafter(DrafterConfig(
        layers, target_layer_ids=(1, 13, 25), block_size=16, mask_token_id=201818, sample_from_anchor=False,
        selector_rank=256, conv_kernel_size=2), rngs=nnx.Rngs(0)))
    assert {name: shape for name, (shape, _) in drafter_layouts.named_tensors(drafter).items()} == shapes


def test_shards_types_and_replacement(files, targets, tmp_path):
    pretrained = load_pretrained(targets / "qwen3")
    drafter = read(files("dspark"), target=pretrained.model)
    save_drafter(tmp_path / "out", drafter, pretrained, dtype="bfloat16", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}
    again = read(tmp_path / "out", target=pretrained.model, param_dtype="bfloat16")
    assert again.config == drafter.config
    save_drafter(tmp_path / "out", drafter, pretrained, "dspark")
    assert_same(read(tmp_path / "out", target=pretrained.model), drafter)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"method": "dspark"' in card and '"num_speculative_tokens": 4' in card
    assert "--speculative-num-draft-tokens 5" in card
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="mine"):
        save_drafter(tmp_path / "mine", drafter, pretrained)


def test_what_a_layout_cannot_express_is_refused(files, targets, tmp_path):
    pretrained = load_pretrained(targets / "qwen3")
    window = read(files("dflash-window"), target=pretrained.model)
    llama = dataclasses.replace(window.config.layers, family="llama", qk_norm=False)
    for changes, name in ((dict(causal=True, sliding_causal=False), "causal"), (dict(markov_rank=4), "layout"),
                          (dict(layers=llama), "llama"), (dict(mask_token_id=drafter_files.EOS), "eos_token_id")):
        drafter = nnx.eval_shape(lambda c=changes: Drafter(dataclasses.replace(window.config, **c), rngs=nnx.Rngs(0)))
        with pytest.raises(CheckpointError, match=name):
            save_drafter(tmp_path / "out", drafter, pretrained)
    with pytest.raises(CheckpointError, match="dspark"):
        save_drafter(tmp_path / "out", window, pretrained, "dspark")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case, nested, settings, names", [
    ("dflash-llama", dict(block_size=8), {}, ["block_size", "8"]),
    ("dflash-llama", dict(mask_token_id=drafter_files.EOS), {}, ["mask_token_id", "eos_token_id"]),
    ("dflash-llama", dict(temperature=1), {}, ["temperature"]),
    ("dflash-llama", dict(final_logit_softcapping=20.0), {}, ["final_logit_softcapping"]),
    ("dflash-llama", dict(causal=True), dict(is_causal=False), ["is_causal", "causal"]),
    ("dflash-llama", dict(target_layer_ids=[2, 1]), {}, ["target_layer_ids"]),
    ("dflash-llama", {}, dict(rope_parameters=dict(rope_theta=5.0)), ["rope_theta", "5.0"]),
    ("dflash-llama", {}, dict(rope_theta="absent"), ["rope_theta"]),
    ("dflash-llama", {}, dict(sample_from_anchor=True), ["sample_from_anchor"]),
    ("dflash-llama", {}, dict(markov_rank=8), ["markov_rank"]),
    ("dflash-llama", dict(projector_type="domino"), {}, ["projector_type", "domino"]),
    ("dflash-llama", {}, dict(draft_vocab_size=30), ["draft_vocab_size", "30"]),
    ("dflash-llama", {}, dict(block_size="absent"), ["block_size"]),
    ("dflash-llama", {}, dict(architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM"]),
    ("dflash-llama", {}, dict(layer_types=["sliding_attention"] * 3), ["sliding_window"]),
    ("dflash2", dict(selector_top_k="many"), {}, ["selector_top_k"]),
    ("dspark", {}, dict(markov_rank="absent"), ["markov_rank"]),
    ("dspark", dict(block_size=5), {}, ["block_size"]),
])
def test_contradictions_and_unknown_settings_are_refused(files, case, nested, settings, names):
    folder = files(case, nested, **settings)
    with pytest.raises(CheckpointError) as error:
        read(folder)
    assert all(name in str(error.value) for name in [*names, str(folder)])


@pytest.mark.parametrize("case, change, name", [
    ("dspark", lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight"),
    ("dspark", lambda tensors: tensors.pop("markov_head.markov_w2.weight"), "markov_head.markov_w2.weight"),
    ("dflash-llama", lambda tensors: tensors.pop("layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj.weight"),
    ("dflash-llama", lambda tensors: tensors.update({"mask_embedding": torch.zeros(3)}), "mask_embedding"),
    ("dflash2", lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"][:, :64].clone()}), "fc.weight"),
    ("dflash2", lambda tensors: tensors["norm.weight"].fill_(torch.nan), "norm.weight"),
])
def test_missing_unknown_and_damaged_tensors_are_named(files, case, change, name):
    folder = files(case)
    families.rewrite(folder, change)
    with pytest.raises(CheckpointError, match=name):
        read(folder)


def test_another_targets_drafter_is_refused(files, targets, target):
    embedding = target.embed.embedding
    embedding[...] = embedding[...].at[30].add(1.0)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
        read(files("dspark"), target=target)
    read(files("dspark"))  # nothing to compare with
    for settings, name in ((dict(num_layers=4), "layer 4"), (dict(num_layers=7), "7"), (dict(vocab_size=38), "38"),
                           (dict(hidden_size=48), "48")):
        other = nnx.eval_shape(lambda s=settings: type(target)(dataclasses.replace(target.config, **s),
                                                               rngs=nnx.Rngs(0)))
        with pytest.raises(CheckpointError, match=name):
            read(files(), target=other)


def test_copies_are_compared_as_far_as_their_types_tell(files, targets):
    folder, target = files("dspark"), load_pretrained(targets / "qwen3", param_dtype="bfloat16").model
    read(folder, target=target)
    families.rewrite(folder, lambda tensors: tensors["lm_head.weight"].mul_(1.1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        read(folder, target=target)


def test_ids_follow_the_drafters_layers_where_a_file_has_none(files):
    folder = files(dflash_config={"mask_token_id": drafter_files.MASK})
    assert read(folder).config.target_layer_ids == (1, 2, 3)


@pytest.mark.parametrize("case", ["dflash-window", "dspark"])
def test_files_of_speculators(files, targets, case):
    """Their ids count from the embedding, their settings are in other places, and copies may be missing."""
    folder = files(case)
    expected, config = read(folder), json.loads((folder / "config.json").read_text())
    names = ("block_size", "mask_token_id", "markov_rank", "markov_head_type", "enable_confidence_head",
             "confidence_head_with_markov")
    kind = "dspark" if case == "dspark" else "dflash"
    theirs = {name: config[name] for name in names if name in config} | dict(
        speculators_model_type=kind, architectures=[f"D{kind[1:].title()}Speculator"], mask_token_id=drafter_files.MASK,
        aux_hidden_state_layer_ids=[layer + 1 for layer in drafter_files.IDS], draft_vocab_size=drafter_files.VOCAB,
        sample_from_anchor=kind == "dspark", transformer_layer_config={
            name: value for name, value in config.items()
            if name not in (*names, "architectures", "dflash_config", "target_layer_ids", "num_target_layers")})
    path = folder / "config.json"
    path.write_text(json.dumps(theirs))
    families.rewrite(folder, lambda tensors: [tensors.pop(name, None) for name in ("embed_tokens.weight",
                                                                                   "lm_head.weight")])
    assert_same(read(folder, target=load_pretrained(targets / "qwen3").model), expected)
    path.write_text(json.dumps(theirs | dict(draft_vocab_size=20)))
    with pytest.raises(CheckpointError, match="draft_vocab_size"):
        read(folder)
    if case == "dspark":
        path.write_text(json.dumps({name: value for name, value in theirs.items() if name != "sample_from_anchor"}))
        with pytest.raises(CheckpointError, match="sample_from_anchor"):
            read(folder)


def test_export_on_the_command_line(files, targets, tmp_path, capsys):
    folder, out = files("dspark"), tmp_path / "out"

    def export(*arguments):
        status = main(["export", f"--output={out}", f"--drafter={folder}", *arguments])
        return status, capsys.readouterr().err

    assert export(f"--model={targets / 'qwen3'}") == (0, "")
    assert_same(read(out), read(folder))
    for arguments, name in (((), "--model"), ((f"--model={targets / 'qwen3'}", "--layout=dflash"), "dspark"),
                            ((f"--model={targets / 'qwen3'}", "--layout=hf"), "--layout=hf"),
                            ((f"--drafter={tmp_path / 'typo'}",), "typo")):
        status, message = export(*arguments)
        assert status == 1 and name in message and message.count("\n") == 1
    status = main(["export", f"--output={out}"])
    assert status == 1 and "--drafter" in capsys.readouterr().err
