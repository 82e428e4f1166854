"""The whole model: pieces equal the whole, packed equals separate, nothing crosses a border, guards."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fulmen.config import UserError
from fulmen.model import LanguageModel
from fulmen.model.decoder import DecoderLayer
from fulmen.ops.rotary import rotary_tables

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape):
    return torch.randint(61, shape)


def borders_of(*values):
    return torch.tensor(values, dtype=torch.int32)


@torch.no_grad()
def by_pieces(model, tokens, sizes):
    cache = model.new_cache(len(tokens))
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)], dim=1)
    assert cache.length == tokens.shape[1]
    return logits


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("number", [0, 2])
def test_the_residual_is_the_normed_tensor(config, number):
    """n1 = norm(x); h = alpha n1 + beta attention(n1); n2 = norm(h); y = alpha n2 + beta experts(n2)."""
    pairs = {"lightning": (1.3, 0.9), "softmax": (1.7, 0.8), "mlp": (1.1, 1.2)}
    settings = {f"{name}_{which}": pair[i] for name, pair in pairs.items() for i, which in enumerate(("alpha", "beta"))}
    settings = replace(config, **settings)
    layer = LanguageModel(settings).layers[number]
    assert isinstance(layer, DecoderLayer)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, rotary = torch.randn(1, 12, 48), rotary_tables(torch.arange(12)[None], 8, 10_000.0)

    def normed(y, norm):
        return y / (y.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    alpha, beta = pairs["lightning" if number == 0 else "softmax"]
    n1 = normed(x, layer.input_layernorm)
    attention = layer.self_attn(n1) if number == 0 else layer.self_attn(n1, rotary)
    n2 = normed(alpha * n1 + beta * attention, layer.post_attention_layernorm)
    alpha, beta = pairs["mlp"]
    expected = alpha * n2 + beta * layer.block_sparse_moe(n2)[0]
    torch.testing.assert_close(layer(x, rotary)[0], expected, **CLOSE)


def test_deepnorm_weighs_every_residual(model):
    # (2 * 5)^0.25 for 5 layers.
    assert {(layer.mixer_alpha, layer.mlp_alpha) for layer in model.layers} == {(10**0.25, 10**0.25)}
    assert {(layer.mixer_beta, layer.mlp_beta) for layer in model.layers} == {(1.0, 1.0)}


def test_names_are_those_of_the_published_checkpoints(model):
    names = set(model.state_dict())
    assert {"embed_tokens.weight", "norm.weight", "lm_head.weight"} < names
    layer = {"input_layernorm.weight", "post_attention_layernorm.weight", "block_sparse_moe.gate.weight"}
    experts = {"block_sparse_moe.experts.w13", "block_sparse_moe.experts.w2"}
    lightning = {f"self_attn.{name}.weight" for name in ("qkv_proj", "output_gate", "norm", "out_proj")}
    softmax = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    for number, mixer in enumerate([lightning, lightning, softmax, lightning, lightning]):
        prefix = f"layers.{number}."
        found = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        assert found == layer | experts | mixer


@pytest.mark.parametrize("batch", [1, 2])
def test_token_by_token_equals_one_forward(model, batch):
    tokens = draw(batch, 70)
    torch.testing.assert_close(by_pieces(model, tokens, 1), model(tokens), **CLOSE)


@pytest.mark.parametrize("seed", range(4))
def test_any_split_of_a_prompt_equals_one_forward(model, seed):
    torch.manual_seed(seed)
    tokens = draw(2, 300)
    cuts = [0, *(torch.randperm(299)[:6] + 1).sort().values.tolist(), 300]
    sizes = [b - a for a, b in pairwise(cuts)]
    torch.testing.assert_close(by_pieces(model, tokens, sizes), model(tokens), **CLOSE)


@pytest.mark.parametrize("plan", ["L", "S", "SLL"])
def test_other_plans(config, plan):
    model, tokens = LanguageModel(replace(config, layer_plan=plan)), draw(2, 40)
    torch.testing.assert_close(by_pieces(model, tokens, [7, 1, 32]), model(tokens), **CLOSE)


def test_sequences_of_a_batch_are_on_their_own(model):
    tokens = draw(3, 50)
    torch.testing.assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]), **CLOSE)


def test_no_token_sees_a_later_one(model):
    tokens = draw(1, 60)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :40], before[:, :40], **CLOSE)
    assert (after[:, 40] - before[:, 40]).abs().max() > 0.01


BORDERS = [(0, 100), (0, 1, 2, 100), (0, 64, 128), (0, 30, 64, 65, 150)]


@pytest.mark.parametrize("borders", BORDERS)
def test_packed_samples_equal_samples_alone(model, borders):
    tokens = draw(1, borders[-1])
    alone = torch.cat([model(tokens[:, a:b]) for a, b in pairwise(borders)], dim=1)
    torch.testing.assert_close(model(tokens, cu_seqlens=borders_of(*borders)), alone, **CLOSE)


@torch.no_grad()
def test_positions_and_rotary_settings(config, model, monkeypatch):
    """Only distances reach the scores, so a wrong start would show in the rounding of long inputs alone."""
    seen = []

    def record(positions, *settings):
        seen.append((positions.tolist(), *settings))
        return rotary_tables(positions, *settings)

    monkeypatch.setattr("fulmen.model.decoder.rotary_tables", record)
    settings = (config.rotary_dim, config.rope_theta)
    model(draw(1, 6), cu_seqlens=borders_of(0, 3, 4, 6))
    assert seen.pop() == ([[0, 1, 2, 0, 0, 1]], *settings)
    model(draw(2, 3), cache=(cache := model.new_cache(2)))
    model(draw(2, 2), cache=cache)
    assert [positions for positions, *_ in seen] == [[[0, 1, 2]], [[3, 4]]]


@pytest.mark.parametrize("borders", BORDERS)
def test_gradients_of_packed_samples_add_up_from_samples_alone(model, borders):
    tokens, targets = draw(1, borders[-1]), draw(1, borders[-1])
    packed = gradients(model, model.loss(tokens, targets, cu_seqlens=borders_of(*borders)).nll)
    alone = sum(model.loss(tokens[:, a:b], targets[:, a:b]).nll for a, b in pairwise(borders))
    for name, grad in gradients(model, alone).items():
        torch.testing.assert_close(packed[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_no_gradient_crosses_a_border(model, capacity_factor, checkpoint_layers):
    """Of one sample's loss, by any other sample's embeddings: zero to the last bit, on either side."""
    borders, tokens, targets = (0, 50, 51, 115, 179), draw(1, 179), draw(1, 179)
    embedded = []
    model.embed_tokens.register_forward_hook(lambda module, args, out: embedded.append(out))
    options = {"capacity_factor": capacity_factor, "checkpoint_layers": checkpoint_layers}
    for a, b in pairwise(borders):
        own = torch.full_like(targets, -100)
        own[:, a:b] = targets[:, a:b]
        loss = model.loss(tokens, own, cu_seqlens=borders_of(*borders), **options).nll
        (grad,) = torch.autograd.grad(loss, embedded[-1])
        assert grad[:, a:b].abs().sum() > 0
        assert grad[:, :a].eq(0).all()
        assert grad[:, b:].eq(0).all()


def test_a_nan_in_one_sample_leaves_the_logits_of_the_others(model):
    borders, tokens = (0, 40, 80, 120), draw(1, 120) % 60
    clean = model(tokens, cu_seqlens=borders_of(*borders))
    # Token 60 is nowhere else.
    tokens[0, 70] = 60
    model.embed_tokens.weight.data[60] = float("nan")
    logits = model(tokens, cu_seqlens=borders_of(*borders))
    assert logits[0, 70:80].isnan().all()
    torch.testing.assert_close(logits[0, :40], clean[0, :40], **CLOSE)
    torch.testing.assert_close(logits[0, 80:], clean[0, 80:], **CLOSE)


def test_the_loss_is_the_cross_entropy_of_the_logits(model):
    tokens, targets = draw(2, 30), draw(2, 30)
    targets[0, 5:9] = -100
    result = model.loss(tokens, targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(result.nll, expected, rtol=1e-5, atol=1e-4)
    assert (result.targets, result.targets.dtype) == (56, torch.int64)
    actual, wanted = gradients(model, result.nll), gradients(model, expected)
    for name, grad in wanted.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)


def test_the_balance_loss_is_the_mean_over_layers(config, model):
    result = model.loss(draw(1, 50), draw(1, 50))
    assert len(result.routing) == config.num_layers
    values = [6 * sum((r.experts == e).sum() / 100 * r.probs[:, e].mean() for e in range(6)) for r in result.routing]
    torch.testing.assert_close(result.balance, torch.stack(values).mean())
    (grad,) = torch.autograd.grad(result.balance, model.layers[0].block_sparse_moe.gate.weight)
    assert grad.abs().sum() > 0


def test_a_capacity_drops_choices_and_none_drops_nothing(model):
    tokens, targets = draw(1, 90), draw(1, 90)
    assert all(r.kept is None for r in model.loss(tokens, targets).routing)
    dropping = model.loss(tokens, targets, capacity_factor=0.5)
    assert all((~r.kept).any() for r in dropping.routing)
    assert dropping.nll != model.loss(tokens, targets).nll


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_activation_checkpointing_changes_no_gradient(model, capacity_factor):
    tokens, targets, options = draw(1, 90), draw(1, 90), {"capacity_factor": capacity_factor}
    options["cu_seqlens"] = borders_of(0, 20, 90)
    expected = gradients(model, model.loss(tokens, targets, **options).nll)
    actual = gradients(model, model.loss(tokens, targets, **options, checkpoint_layers=True).nll)
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


def test_activation_checkpointing_keeps_less(model):
    tokens, kept = draw(1, 300), {}
    for checkpointed in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.nbytes), x)[1], lambda x: x):
            model.loss(tokens, tokens, checkpoint_layers=checkpointed)
        kept[checkpointed] = sum(sizes)
    assert kept[True] < kept[False] / 3


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_autocast(model, checkpoint_layers):
    tokens, targets = draw(1, 120), draw(1, 120)
    options = {"cu_seqlens": borders_of(0, 50, 120), "capacity_factor": 2.0}
    expected = model.loss(tokens, targets, **options)
    with torch.autocast("cpu", torch.bfloat16):
        result = model.loss(tokens, targets, **options, checkpoint_layers=checkpoint_layers)
        logits = model(tokens)
    assert result.nll.dtype == result.balance.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(result.nll, expected.nll, rtol=5e-3, atol=0)
    wanted = gradients(model, expected.nll)
    for name, grad in gradients(model, result.nll).items():
        assert grad.dtype == torch.float32, name
        assert F.cosine_similarity(grad.flatten(), wanted[name].flatten(), dim=0) > 0.9, name


@torch.no_grad()
def test_a_bf16_model_has_fp32_logits_from_a_fp32_head(model):
    tokens = draw(1, 20)
    model.to(torch.bfloat16)
    logits = model(tokens)
    assert logits.dtype == torch.float32
    hidden = model.hidden(tokens)[0]
    assert hidden.dtype == torch.bfloat16
    expected = hidden.double() @ model.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


def test_positions_are_guarded(config):
    model = LanguageModel(replace(config, max_positions=20))
    message = "21 positions exceed the model's max_positions 20"
    model(draw(1, 20))
    with pytest.raises(UserError, match=message):
        model(draw(1, 21))
    cache = model.new_cache(1)
    model(draw(1, 15), cache=cache)
    with pytest.raises(UserError, match=message):
        model(draw(1, 6), cache=cache)
    # What is refused leaves the cache as it was.
    assert cache.length == 15
    model(draw(1, 5), cache=cache)
    # Packed samples count each on its own.
    model(draw(1, 50), cu_seqlens=borders_of(0, 20, 40, 50))
    with pytest.raises(UserError, match=message):
        model(draw(1, 50), cu_seqlens=borders_of(0, 20, 41, 50))


def test_a_cache_is_for_its_batch(model):
    with pytest.raises(UserError, match=r"the cache is for 2 sequences, got tokens \(3, 5\)"):
        model(draw(3, 5), cache=model.new_cache(2))


def test_packed_samples_cannot_continue_a_cache(model):
    with pytest.raises(UserError, match=r"packed samples \(cu_seqlens\) cannot continue a cache"):
        model(draw(1, 5), cache=model.new_cache(1), cu_seqlens=borders_of(0, 2, 5))


@pytest.mark.parametrize("borders", [(0, 4), (1, 5), (0, 3, 3, 5)])
def test_borders_that_do_not_fit_are_refused(model, borders):
    with pytest.raises(ValueError, match=r"cu_seqlens"):
        model(draw(1, 5), cu_seqlens=borders_of(*borders))


def test_init_follows_the_seed(config):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(LanguageModel(config).state_dict())
    assert all(torch.equal(x, models[1][name]) for name, x in models[0].items())
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])


def test_init_of_the_whole_has_deepnorms_gain(config):
    """(8 L)^-0.25 on values, outputs and experts; norms are ones; embedding and head plain Xavier."""
    model = LanguageModel(replace(config, vocab_size=500, hidden_size=96, expert_size=64))
    gain = (8 * 5) ** -0.25
    layer, softmax = model.layers[1], model.layers[2].self_attn
    values = layer.self_attn.qkv_proj.weight.view(4, 3, 16, 96)[:, 2]
    expected = [
        (values, gain * (2 / (96 + 64)) ** 0.5),
        (layer.self_attn.out_proj.weight, gain * (2 / (96 + 64)) ** 0.5),
        (softmax.v_proj.weight, gain * (2 / (96 + 32)) ** 0.5),
        (softmax.o_proj.weight, gain * (2 / (96 + 64)) ** 0.5),
        (softmax.q_proj.weight, (2 / (96 + 64)) ** 0.5),
        (layer.block_sparse_moe.experts.w2, gain * (2 / (96 + 64)) ** 0.5),
        (model.embed_tokens.weight, (2 / (500 + 96)) ** 0.5),
        (model.lm_head.weight, (2 / (500 + 96)) ** 0.5),
    ]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=0.06)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if "norm" in name:
            assert parameter.eq(1).all()


def test_every_parameter_learns(model):
    for name, grad in gradients(model, model.loss(draw(2, 60), draw(2, 60)).nll).items():
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


def test_a_model_on_the_meta_device_takes_no_memory(config):
    with torch.device("meta"):
        model = LanguageModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())
