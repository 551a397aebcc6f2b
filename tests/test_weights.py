"""Native weights: sharing rules, reading any tensor-parallel size, and telling whole checkpoints from others."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from titans_mcore.config import TitansConfig
from titans_mcore.io import sha256_of
from titans_mcore.weights import (
    MARKER,
    ShardHeader,
    TPSplit,
    check_same_model,
    damage,
    find_checkpoint,
    load_config,
    load_full,
    load_into,
    model_tensors,
    save_shard,
)

CONFIG = TitansConfig(num_layers=1, dim=8, num_heads=2, ffn_dim=8, vocab_size=16)
RULES = {"column": TPSplit(0), "row": TPSplit(1), "gated": TPSplit(0, 2), "norm": None}
SHAPES = {"column": (8, 3), "row": (3, 8), "gated": (8, 2), "norm": (5,)}


def whole_state(seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


class Shard(nn.Module):
    """A model of which this is one tensor-parallel rank's part."""

    def __init__(self, state, rank, size):
        super().__init__()
        for name, tensor in state.items():
            rule = RULES[name]
            parameter = nn.Parameter((rule.take(tensor, rank, size) if rule else tensor).clone())
            if rule:
                parameter.tensor_model_parallel = True
                parameter.partition_dim, parameter.partition_stride = rule.dim, rule.stride
            self.register_parameter(name, parameter)

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass


def write(folder, state, size, *, change_norm_of_rank=None):
    for rank in range(size):
        model = Shard(state, rank, size)
        if rank == change_norm_of_rank:
            model.norm.data[0] = torch.nextafter(model.norm.data[0], torch.tensor(10.0))
        values = model_tensors(model).items()
        save_shard(folder / "weights", ShardHeader.of(model), values, CONFIG, rank=rank, size=size, step=3, tokens=300)
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in folder.rglob("*")
        if file.is_file()
    }
    (folder / MARKER).write_text(json.dumps({"step": 3, "files": files}))
    return folder


def test_a_gated_matrix_is_cut_in_both_halves():
    whole = torch.arange(8).view(8, 1)
    assert TPSplit(0, 2).take(whole, 0, 2).flatten().tolist() == [0, 1, 4, 5]
    assert TPSplit(0, 2).take(whole, 1, 2).flatten().tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("loaded", [1, 2, 4])
def test_weights_of_one_tensor_parallel_size_load_at_another(tmp_path, saved, loaded):
    state = whole_state()
    config, full = load_full(write(tmp_path, state, saved))
    assert config == CONFIG == load_config(tmp_path)
    assert all(torch.equal(full[name], state[name]) for name in state)
    for rank in range(loaded):
        model = Shard(whole_state(seed=1), rank, loaded)
        load_into(model, full, rank=rank, size=loaded)
        expected = Shard(state, rank, loaded)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name)), name


def test_ranks_that_disagree_about_a_shared_tensor_are_found(tmp_path):
    with pytest.raises(ValueError, match="different values of norm"):
        load_full(write(tmp_path, whole_state(), 2, change_norm_of_rank=1))


def test_megatrons_extra_state_is_not_saved(tmp_path):
    _, full = load_full(write(tmp_path, whole_state(), 1))
    assert set(full) == set(SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm"), "1 tensors of this model are missing there, norm first"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 tensors there are not in this model, extra first"),
        (lambda state: state.update(row=torch.zeros(3, 6)), r"row is \[3, 6\] there and \[3, 8\] here"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_of_another_model_are_refused_and_nothing_is_copied(change, message):
    model = Shard(whole_state(), 0, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = whole_state(seed=1)
    change(state)
    with pytest.raises(ValueError, match=message):
        load_into(model, state, rank=0, size=2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_another_model_is_named_by_the_settings_that_differ(tmp_path):
    wanted = dataclasses.replace(CONFIG, variant="mag", num_layers=2)
    with pytest.raises(ValueError, match=r"variant is 'mac' there and 'mag' here; num_layers is 1 there and 2 here"):
        check_same_model(CONFIG, wanted, tmp_path)


def test_the_same_heads_of_the_memory_in_other_words_are_the_same_model(tmp_path):
    check_same_model(CONFIG, dataclasses.replace(CONFIG, memory_heads=1, memory_head_dim=8), tmp_path)
    with pytest.raises(ValueError, match=r"memory_heads is 1 there and 2 here; memory_head_dim is 8 there and 4 here"):
        check_same_model(CONFIG, dataclasses.replace(CONFIG, memory_heads=2), tmp_path)


def test_a_model_from_before_the_memory_had_heads_of_its_own_has_those_of_the_attention(tmp_path):
    write(tmp_path, whole_state(), 1)
    (file,) = tmp_path.rglob("model.json")
    description = json.loads(file.read_text())
    del description["model"]["memory_heads"], description["model"]["memory_head_dim"]
    file.write_text(json.dumps(description))
    assert load_config(tmp_path).memory_shape == (2, 4)


@pytest.mark.parametrize(
    ("dim", "settings", "shape"),
    [
        (2048, {"num_heads": 8}, (32, 64)),
        (96, {}, (2, 48)),
        (32, {}, (1, 32)),
        (128, {"memory_heads": 1}, (1, 128)),
        (128, {"memory_head_dim": 32}, (4, 32)),
        (128, {"memory_heads": 3, "memory_head_dim": 32}, (3, 32)),
    ],
)
def test_heads_of_the_memory_are_of_64_where_nothing_else_is_said(dim, settings, shape):
    assert TitansConfig(dim=dim, **settings).memory_shape == shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_heads": 3}, "dim 128 is not divisible by memory_heads 3; change one of them, or set memory_head_dim"),
        ({"memory_head_dim": 48}, "dim 128 is not divisible by memory_head_dim 48; .* or set memory_heads too"),
        ({"variant": "mag", "memory_heads": 3, "memory_head_dim": 32}, "are 96 channels, and mag .* the dim 128"),
        ({"memory_heads": -1}, "memory_heads is -1; it must be 0 or more"),
        ({"num_heads": 3}, "dim 128 is not divisible by num_heads 3"),
    ],
)
def test_heads_that_do_not_fit_are_refused_with_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        TitansConfig(dim=128, **settings)


def test_the_memory_alone_asks_nothing_of_the_heads_of_an_attention():
    assert TitansConfig(variant="lmm", dim=130, num_heads=3).memory_shape == (5, 26)


def test_settings_that_change_speed_alone_do_not_make_another_model(tmp_path):
    check_same_model(CONFIG, dataclasses.replace(CONFIG, memory_backend="oracle", attention_backend="dense"), tmp_path)


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path / "checkpoints" / f"step-{step:08d}", whole_state(), 1)
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(newest) == newest
    (newest / MARKER).unlink()
    (tmp_path / "checkpoints" / ".step-00000011.partial").mkdir()
    assert find_checkpoint(tmp_path).name == "step-00000009"
    with pytest.raises(ValueError, match=r"not a whole checkpoint: checkpoint\.json is missing"):
        find_checkpoint(newest)


def test_paths_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        find_checkpoint(tmp_path)


def test_damage_is_named(tmp_path):
    folder = write(tmp_path, whole_state(), 2)
    assert damage(folder, read_files=True) is None
    shard = folder / "weights" / "tp-01-of-02.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damage(folder) is None
    assert "tp-01-of-02.safetensors has changed" in damage(folder, read_files=True)
    with pytest.raises(ValueError, match=r"tp-01-of-02.safetensors has changed since it was written"):
        load_full(folder)
    shard.write_bytes(content[:-1])
    assert "bytes instead of" in damage(folder)
    with pytest.raises(ValueError, match=r"cannot read the weights in .*tp-01-of-02"):
        load_full(folder)
    shard.unlink()
    assert "tp-01-of-02.safetensors is missing" in damage(folder)
    (folder / MARKER).write_text("{")
    assert "cannot be read" in damage(folder)
