"""The chunked cross-entropy against torch's own in float64: values, gradients, what it never allocates."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fulmen.ops.loss import IGNORE, linear_cross_entropy


def make(tokens=37, width=12, vocabulary=50, *, ignored=()):
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (tokens,))
    targets[list(ignored)] = IGNORE
    return hidden, weight, targets


def results(function, hidden, weight, targets, scale=1.0):
    """The loss and its gradients; `scale` is the gradient that arrives."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = function(*leaves, targets)
    d_hidden, d_weight = torch.autograd.grad(loss * scale, leaves)
    return {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def oracle(hidden, weight, targets):
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 512])
def test_values_and_gradients(chunk, compare):
    case = make()
    actual = results(lambda *a: linear_cross_entropy(*a, chunk=chunk), *case, scale=0.3)
    compare(actual, results(oracle, *case, scale=0.3), 1e-6)


@pytest.mark.parametrize("ignored", [(0,), (4, 5, 6, 7), range(1, 37), range(30, 37)])
def test_ignored_targets_add_nothing(ignored, compare):
    case = make(ignored=ignored)
    actual = results(lambda *a: linear_cross_entropy(*a, chunk=4), *case)
    compare(actual, results(oracle, *case), 1e-6)
    assert actual["d_hidden"][list(ignored)].eq(0).all()


def test_no_target_at_all():
    actual = results(linear_cross_entropy, *make(ignored=range(37)))
    assert all(x.eq(0).all() for x in actual.values())


def test_large_logits_do_not_overflow(compare):
    hidden, weight, targets = make()
    actual = results(linear_cross_entropy, 300 * hidden, weight, targets)
    compare(actual, results(oracle, 300 * hidden, weight, targets), 1e-6)


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_a_sure_answer_keeps_its_digits(offset, compare):
    """-log p of a p near 1 is small beside the logits, and must not be their rounding."""
    case = torch.eye(3), torch.eye(3) * 9 + offset, torch.arange(3)
    compare({"loss": linear_cross_entropy(*case)}, {"loss": oracle(*case)}, 1e-3)


@pytest.mark.parametrize("target", [-1, -99, 50])
def test_a_target_outside_the_vocabulary_is_no_target_of_another_token(target):
    hidden, weight, targets = make()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        linear_cross_entropy(hidden, weight, targets)


def test_chunks_add_up_to_the_same(compare):
    case = make(200)
    expected = results(linear_cross_entropy, *case)
    for chunk in (16, 64, 199):
        compare(results(lambda *a, chunk=chunk: linear_cross_entropy(*a, chunk=chunk), *case), expected, 1e-6)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(wanted, compare):
    hidden, weight, targets = make()
    expected = results(oracle, hidden, weight, targets)
    leaves = [leaf.clone().requires_grad_(want) for leaf, want in zip((hidden, weight), wanted, strict=True)]
    loss = linear_cross_entropy(*leaves, targets, chunk=8)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    actual = {"loss": loss.detach(), "d_hidden": leaves[0].grad, "d_weight": leaves[1].grad}
    present = {name: x for name, x in actual.items() if x is not None}
    assert len(present) == 1 + sum(wanted)
    compare(present, {name: expected[name] for name in present}, 1e-6)


@pytest.mark.parametrize("how", ["inputs", "autocast"])
def test_bf16_products_keep_a_fp32_softmax(how, compare):
    hidden, weight, targets = make(300, 64, 1000)
    rounded = hidden.bfloat16().float(), weight.bfloat16().float() / 8, targets
    expected = results(oracle, *rounded)
    if how == "inputs":
        actual = results(linear_cross_entropy, rounded[0].bfloat16(), rounded[1].bfloat16(), targets)
        assert actual["d_hidden"].dtype == actual["d_weight"].dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            actual = results(linear_cross_entropy, *rounded)
        assert actual["d_hidden"].dtype == actual["d_weight"].dtype == torch.float32
    assert actual["loss"].dtype == torch.float32
    compare({"loss": actual.pop("loss")}, {"loss": expected.pop("loss")}, 1e-4)
    compare(actual, expected, 5e-3)


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any tensor of any operation has, on its own memory."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_all_logits_never_exist_at_once(grad):
    tokens, width, vocabulary, chunk = 1024, 8, 500, 64
    hidden, weight, targets = make(tokens, width, vocabulary)
    with LargestOutput() as largest:
        loss = linear_cross_entropy(hidden.requires_grad_(grad), weight.requires_grad_(grad), targets, chunk=chunk)
        if grad:
            loss.backward()
    assert largest.numel == chunk * vocabulary
    with LargestOutput() as largest:
        oracle(hidden, weight, targets)
    assert largest.numel == tokens * vocabulary


def test_every_element_is_written(poisoned_memory):
    for x in results(lambda *a: linear_cross_entropy(*a, chunk=8), *make(ignored=(3, 36))).values():
        assert x.isfinite().all()
