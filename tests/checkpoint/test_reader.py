import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulmen.checkpoint import load_model
from fulmen.config import UserError
from fulmen.ops.lightning import decay_rates

LAST = "model.layers.4.block_sparse_moe.experts.2.w2.weight"


def rewrite(folder, change):
    """Apply `change` to the tensors of a checkpoint in a single file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_sharded_and_single_give_the_same_bits(model, sharded, single):
    assert len(shards(sharded)) > 3
    for folder in (sharded, single):
        loaded = load_model(folder)
        assert loaded.config == model.config
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        for (name, ours), (other_name, theirs) in zip(
            model.state_dict().items(), loaded.state_dict().items(), strict=True
        ):
            assert name == other_name
            assert torch.equal(ours, theirs)


def test_logits_survive(model, sharded):
    tokens = torch.randint(61, (2, 300))
    assert torch.equal(model(tokens), load_model(sharded)(tokens))


def test_dtype_and_decay_rates(model, sharded):
    loaded = load_model(sharded, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.layers[3].self_attn.rates, decay_rates(4, 3, 5))
    w13 = model.layers[1].block_sparse_moe.experts.w13
    assert torch.equal(loaded.layers[1].block_sparse_moe.experts.w13, w13.bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_on_the_gpu(sharded):
    loaded = load_model(sharded, device="cuda", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_is_on_the_device_asked_for(sharded, device):
    """The meta device stands for a GPU."""
    loaded = load_model(sharded, device=device)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {device}


def test_decay_buffers_of_transformers_are_passed_over(single):
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.self_attn.slope_rate": torch.ones(4, 1, 1)}))
    load_model(single)


def test_stacked_names_of_transformers(model, single):
    def stack(tensors):
        for layer in range(5):
            prefix, theirs = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
            experts = [[tensors.pop(f"{prefix}.experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")] for e in range(3)]
            tensors[f"{theirs}.gate.weight"] = tensors.pop(f"{prefix}.gate.weight")
            tensors[f"{theirs}.experts.gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in experts])
            tensors[f"{theirs}.experts.down_proj"] = torch.stack([e[2] for e in experts])

    rewrite(single, stack)
    tokens = torch.randint(61, (1, 9))
    assert torch.equal(load_model(single)(tokens), model(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAST), f"1 of 83 tensors are missing: {LAST}$"),
        (
            lambda t: t.clear() or t.update(x=torch.ones(1)),
            r"83 of 83 tensors are missing: lm_head.weight, .*, \.\.\.$",
        ),
        (lambda t: t.update(bias=torch.ones(1)), r"model.safetensors: 1 tensors are not of this model: bias$"),
        # Softmax layers have no decay.
        (
            lambda t: t.update({"model.layers.2.self_attn.slope_rate": torch.ones(4)}),
            r"model.layers.2.self_attn.slope_rate",
        ),
        (lambda t: t.update({LAST: torch.ones(40, 24)}), rf"{LAST} should have the shape \[24, 40\], found \[40, 24\]"),
        (lambda t: t.update({LAST: torch.ones(24, 40).to(torch.int8)}), rf"{LAST} is stored as I8"),
        (lambda t: t.update({LAST: torch.ones(24, 40).to(torch.float8_e4m3fn)}), rf"{LAST} is stored as F8_E4M3"),
    ],
)
def test_wrong_tensors_are_named(single, change, message):
    rewrite(single, change)
    with pytest.raises(UserError, match=message) as error:
        load_model(single)
    assert str(single) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_cut_short_is_named(sharded, size):
    shard = shards(sharded)[1]
    os.truncate(shard, size if size >= 0 else shard.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"{shard.name} is cut short or not safetensors"):
        load_model(sharded)


def test_a_pickle_under_the_name_of_safetensors(single, model):
    torch.save(model.state_dict(), single / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is cut short or not safetensors"):
        load_model(single)


def test_pickles_are_never_opened(single, model):
    (single / "model.safetensors").unlink()
    torch.save(model.state_dict(), single / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model.bin\), which can run code"):
        load_model(single)


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_model(single)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no config.json in .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_shard_that_the_index_names_is_missing(sharded):
    shard = shards(sharded)[2]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing, although model.safetensors.index.json names it"):
        load_model(sharded)


def test_a_shard_that_cannot_be_read(sharded):
    shard = shards(sharded)[0]
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match=rf"cannot read .*{shard.name}"):
        load_model(sharded)


def test_a_tensor_that_the_index_promises_is_missing(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.bias"] = shards(sharded)[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{shards(sharded)[0].name} lacks lm_head.bias, which .*index.json says"):
        load_model(sharded)


def test_a_tensor_twice(sharded):
    first, second = shards(sharded)[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.ones(1)}, second)
    with pytest.raises(UserError, match=rf"{name} is both in .*{first.name} and in .*{second.name}"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json is not JSON"),
        ("{}", "index.json has no weight_map"),
        ('{"weight_map": []}', "index.json has no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "a is in '../a.safetensors', which is not the name of a file"),
        ('{"weight_map": {"a": 1}}', "a is in 1, which is not the name of a file"),
    ],
)
def test_a_broken_index(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_model(sharded)


def test_memory_of_reading_and_writing(tmp_path):
    """Reading takes the model and the map of one shard, writing next to nothing beside the model."""
    script = """
        import resource, sys
        import torch
        from fulmen.checkpoint import load_model, save_model
        from fulmen.model import LanguageModel, ModelConfig

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        def config(size):
            return ModelConfig(vocab_size=64, hidden_size=size, num_layers=2, layer_plan="LS", num_heads=2,
                num_kv_heads=1, head_dim=16, num_experts=8, expert_size=4 * size)

        folder, role = sys.argv[1:]
        if role == "write":
            save_model(LanguageModel(config(8)).eval(), folder + "/small", max_shard_bytes=10_000)
            with torch.device("meta"):
                model = LanguageModel(config(448))
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 0.5)
            before = peak()
            save_model(model, folder + "/big", max_shard_bytes=8 * 2**20)
        else:
            load_model(folder + "/small")
            before = peak()
            model = load_model(folder + "/big")
            assert all((parameter == 0.5).all() for parameter in model.parameters())
        print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
    """
    grown = {}
    for role in ("write", "read"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), role]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        grown[role], size = map(int, output.split())
    assert size > 120e6
    assert grown["write"] < 0.25 * size
    assert grown["read"] < 1.25 * size
