"""Which parameters decay, what AdamW does with them, and its state by name."""

import torch

from fulmen.model import LanguageModel, ModelConfig
from fulmen.train.optimizer import begin_state, make_optimizer, optimizer_tensors
from fulmen.train.recipe import OptimizerSection


def model():
    sizes = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "rotary_dim": 4, "expert_size": 8}
    return LanguageModel(ModelConfig.preset("tiny", vocab_size=16, num_layers=2, layer_plan="LS", **sizes))


def test_matrices_decay_and_vectors_do_not():
    net = model()
    matrices, vectors = make_optimizer(net, OptimizerSection(weight_decay=0.3)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    of_vectors = {names[id(parameter)] for parameter in vectors["params"]}
    assert of_vectors == {name for name in names.values() if "norm" in name}
    assert len(matrices["params"]) + len(vectors["params"]) == len(names)
    of_matrices = {names[id(parameter)] for parameter in matrices["params"]}
    assert {"embed_tokens.weight", "lm_head.weight"} <= of_matrices


def test_first_step_by_hand():
    """Bias correction makes the first step lr * g / (|g| + eps), after the decay by lr * weight_decay."""
    net = model()
    settings = OptimizerSection(learning_rate=0.1, weight_decay=0.5, beta1=0.7, beta2=0.8, eps=1e-3)
    optimizer = make_optimizer(net, settings)
    assert all(group["betas"] == (0.7, 0.8) for group in optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, -0.02)
    optimizer.step()
    for name, parameter in net.named_parameters():
        decay = 0.1 * 0.5 if parameter.dim() > 1 else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - decay) + 0.1 * 0.02 / (0.02 + 1e-3))


def test_state_that_is_begun_is_that_of_the_first_step():
    nets = [model(), model()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [make_optimizer(net, OptimizerSection()) for net in nets]
    begin_state(optimizers[1])
    for net, optimizer in zip(nets, optimizers, strict=True):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    one, other = (optimizer_tensors(*pair) for pair in zip(nets, optimizers, strict=True))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_state_goes_by_name_and_comes_back():
    nets = [model(), model()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [make_optimizer(net, OptimizerSection()) for net in nets]

    def step(which, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in nets[which].parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers[which].step()

    step(0, 1)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(nets[0], optimizers[0]).items()}
    assert {name.rsplit(":", 1)[1] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(saved) == 3 * len(list(nets[0].parameters()))
    nets[1].load_state_dict(nets[0].state_dict())
    begin_state(optimizers[1])
    for name, tensor in optimizer_tensors(nets[1], optimizers[1]).items():
        tensor.copy_(saved[name])
    step(0, 2)
    step(1, 2)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(tensor.grad_fn is None for tensor in saved.values())
