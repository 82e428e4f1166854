"""Experts spread over ranks against all of them on one: outputs, every gradient, and what travels when."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from tests.parallel.test_collectives import Step, logged
from torch.utils.checkpoint import checkpoint

from fulmen.ops.experts import experts_mlp, route
from fulmen.parallel import Mesh, MeshSizes, experts
from fulmen.parallel.experts import spread_experts_mlp

E, WIDTH, EXPERT = 8, 16, 32
NAMES = ("x", "logits", "w13", "w2")


class Case(NamedTuple):
    """What is computed; the same on all ranks and in the test."""

    groups: int = 1
    tokens: tuple[int, ...] = (37, 5, 64, 19, 23, 1, 90, 12)  # of each rank
    skew: tuple[float, ...] = (0,) * E
    k: int = 2
    capacity: int | None = None  # of each rank's tokens
    alpha: float = 0.0
    beta: float = 1.0

    def inputs(self):
        """Tokens and logits of each rank, w13, w2 of all experts, and the gradient of each rank's output."""
        torch.manual_seed(1)
        tokens = self.tokens
        w13, w2 = torch.randn(E, 2 * EXPERT, WIDTH) / WIDTH**0.5, torch.randn(E, WIDTH, EXPERT) / EXPERT**0.5
        x, d_out = (torch.randn(sum(tokens), WIDTH).split(tokens) for _ in range(2))
        logits = (torch.randn(sum(tokens), E) + torch.tensor(self.skew)).split(tokens)
        return x, logits, w13, w2, d_out

    def results(self, mlp, x, logits, w13, w2, d_out, routing_of=route, **how):
        """Output and gradients."""
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, logits, w13, w2)]
        routing = routing_of(leaves[1], self.k, self.capacity)
        out = mlp(leaves[0], *leaves[2:], routing, alpha=self.alpha, beta=self.beta, **how)
        grads = torch.autograd.grad((out * d_out).sum(), leaves)
        return dict(zip(("out", *NAMES), (out.detach(), *grads), strict=True))


GROUPS = [Case(groups=groups) for groups in (1, 2, 4, 8)]
EVERYTHING = [
    *GROUPS,
    Case(groups=4, tokens=(0, 37, 0, 3, 64, 0, 19, 0)),  # ranks without tokens, groups without tokens
    Case(groups=2, tokens=(0,) * 8),
    Case(groups=2, skew=(-99, -99, -99, 0, 0, 0, -99, 99)),  # ranks whose experts nobody wants
    Case(groups=2, skew=(0, 0, 0, 0, 0, 99, 0, 0), k=1),  # everything to one expert
    Case(groups=3, k=3, capacity=4, skew=(0, 1, 0, 2, 0, 0, 0, 0), alpha=1.7, beta=0.6),
    Case(groups=2, capacity=0),
]


def shards_of(w13, w2, ep, etp):
    """Each rank's along etp, ep of matrices of all experts, by their definition."""
    experts, width = E // ep, EXPERT // etp
    for j in range(etp):
        part = slice(j * width, (j + 1) * width)
        for i in range(ep):
            here = slice(i * experts, (i + 1) * experts)
            gate, up = w13[here].chunk(2, dim=1)
            yield torch.cat((gate[:, part], up[:, part]), dim=1), w2[here][:, :, part]


def here(mesh, w13, w2):
    """This rank's."""
    ep, etp = mesh.sizes.ep, mesh.sizes.etp
    return list(shards_of(w13, w2, ep, etp))[mesh.rank("etp") * ep + mesh.rank("ep")]


def on_a_rank(cases, sizes):
    mesh, rank = Mesh(MeshSizes(**sizes), "cpu"), dist.get_rank()
    how, found = dict(ep=mesh.group("ep"), etp=mesh.group("etp")), []
    for case in cases:
        x, logits, w13, w2, d_out = case.inputs()
        shards = here(mesh, w13, w2)
        given = (x[rank], logits[rank], *shards, d_out[rank])
        found.append(case.results(spread_experts_mlp, *given, groups=case.groups, **how))
        with torch.no_grad():
            routing = route(logits[rank], case.k, case.capacity)
            settings = dict(groups=case.groups, alpha=case.alpha, beta=case.beta)
            found[-1]["without gradient"] = spread_experts_mlp(x[rank], *shards, routing, **how, **settings)
    return found


def cut_by_rank(logits, tokens, k, capacity):
    """Routing of all tokens, where each rank's have a capacity of their own."""
    routing = route(logits, k)
    if capacity is None:
        return routing
    return routing._replace(kept=torch.cat([route(part, k, capacity).kept for part in logits.split(tokens)]))


def of_one_process(case, ranks):
    """What each rank of a replica should have found: by the tokens of all of them, with all experts."""
    x, logits, w13, w2, d_out = case.inputs()
    tokens = case.tokens[ranks.start : ranks.stop]
    x, logits, d_out = (torch.cat(parts[ranks.start : ranks.stop]) for parts in (x, logits, d_out))
    found = case.results(
        experts_mlp, x, logits, w13, w2, d_out, routing_of=lambda logits, *rest: cut_by_rank(logits, tokens, *rest)
    )
    return {name: value.split(tokens) if name in ("out", "x", "logits") else value for name, value in found.items()}


def close(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(
    ("sizes", "cases"),
    [
        (dict(ep=2), EVERYTHING),
        (dict(etp=2), EVERYTHING),
        (dict(ep=4), GROUPS),
        (dict(ep=2, etp=2), EVERYTHING),
        (dict(edp=2, ep=2), GROUPS),
        (dict(edp=2, ep=2, etp=2), GROUPS),
        (dict(ep=8), EVERYTHING),
    ],
    ids=lambda value: " x ".join(f"{name} {size}" for name, size in value.items()) if isinstance(value, dict) else "",
)
def test_outputs_and_gradients_are_those_of_one_process(sizes, cases):
    ep, etp, edp = (sizes.get(name, 1) for name in ("ep", "etp", "edp"))
    by_rank = run_ranks(ep * etp * edp, on_a_rank, cases, sizes)
    for case, *ranks in zip(cases, *by_rank, strict=True):
        for replica in range(edp):
            members = range(replica * ep * etp, (replica + 1) * ep * etp)
            expected = of_one_process(case, members)
            shards = list(shards_of(expected["w13"], expected["w2"], ep, etp))
            for place, rank in enumerate(members):
                found = ranks[rank]
                for name in ("out", "x", "logits"):
                    close(found[name], expected[name][place], f"{case} rank {rank} {name}")
                close(found["without gradient"], found["out"], f"{case} rank {rank} without gradient")
                close((found["w13"], found["w2"]), shards[place], f"{case} rank {rank} matrices")


def in_bf16():
    mesh, case, rank = Mesh(MeshSizes(ep=2), "cpu"), Case(groups=2, alpha=1.5), dist.get_rank()
    how = dict(ep=mesh.group("ep"), etp=mesh.group("etp"))
    x, logits, w13, w2, d_out = case.inputs()
    sent, exchange = [], experts.launch
    experts.launch = lambda rows, *rest: (sent.append(rows.dtype), exchange(rows, *rest))[1]
    shards = here(mesh, w13, w2)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.results(spread_experts_mlp, x[rank], logits[rank], *shards, d_out[rank], **how)
    return found, set(sent)


def test_autocast_sends_and_multiplies_in_bf16():
    expected = of_one_process(Case(alpha=1.5), range(2))
    for rank, (found, sent) in enumerate(run_ranks(2, in_bf16)):
        assert sent == {torch.bfloat16}
        assert {value.dtype for value in found.values()} == {torch.float32}
        error = (found["out"] - expected["out"][rank]).norm() / expected["out"][rank].norm()
        assert 1e-5 < error < 1e-2
        error = (found["x"] - expected["x"][rank]).norm() / expected["x"][rank].norm()
        assert error < 1e-2


def what_runs_when(sizes, groups):
    log, mlp = [], experts.experts_mlp
    logged(log)
    experts.experts_mlp = lambda *arguments: Step.apply(mlp(*arguments), log, "compute")
    mesh, rank, case = Mesh(MeshSizes(**sizes), "cpu"), dist.get_rank(), Case(groups=groups)
    how = dict(ep=mesh.group("ep"), etp=mesh.group("etp"), groups=groups)
    x, logits, w13, w2, d_out = case.inputs()
    case.results(spread_experts_mlp, x[rank], logits[rank], *here(mesh, w13, w2), d_out[rank], **how)
    return log


@pytest.mark.parametrize("sizes", [dict(ep=2), dict(etp=2), dict(ep=2, etp=2)], ids=str)
def test_while_a_group_is_computed_others_travel(sizes):
    world = sizes.get("ep", 1) * sizes.get("etp", 1)
    for groups in (1, 4):
        for log in run_ranks(world, what_runs_when, sizes, groups):
            forward, backward = log[: len(log) // 2], log[len(log) // 2 :]
            assert forward.count("compute") == groups
            for half in (forward, backward):
                travelling, seen = 0, []
                for event in half:
                    travelling += event.startswith("begin") - event.startswith("end")
                    seen += [travelling] if event == "compute" else []
                assert all(seen) if groups > 1 else not any(seen)
            # The way back is the way there, backward: where one ended the other begins.
            mirror = {"begin": "end", "end": "begin", "compute": "compute"}
            mirrored = [" ".join((mirror[kind], *number)) for kind, *number in map(str.split, reversed(forward))]
            assert backward == mirrored


def what_a_checkpoint_sends():
    log, mesh, rank = [], Mesh(MeshSizes(ep=2), "cpu"), dist.get_rank()
    logged(log)
    x, logits, w13, w2, _ = Case().inputs()
    x, shards = x[rank].requires_grad_(), here(mesh, w13, w2)

    def layer(x):
        routing = route(logits[rank], 2)
        return spread_experts_mlp(x, *shards, routing, ep=mesh.group("ep"), etp=mesh.group("etp"), alpha=1.0)

    checkpoint(layer, x, use_reentrant=False).sum().backward()
    return log


def test_what_is_computed_again_is_not_sent_home_again():
    for log in run_ranks(2, what_a_checkpoint_sends):
        # There and home; home's gradient and the rows once more; the rows' gradient.
        assert sum(event.startswith("begin") for event in log) == 2 + 2 + 1


def test_the_order_in_which_groups_go_through_stages():
    served = []

    def stage(number):
        return lambda group, state: served.append((group, number)) or (state or "") + group + str(number)

    assert experts._pipelined(["a", "b", "c"], [stage(0), stage(1)]) == ["a0a1", "b0b1", "c0c1"]
    assert served == [("a", 0), ("b", 0), ("a", 1), ("c", 0), ("b", 1), ("c", 1)]


def without_partners():
    group, case = dist.group.WORLD, Case(alpha=1.3)
    x, logits, w13, w2, d_out = case.inputs()
    experts.launch = experts.gather = None
    given = (x[0], logits[0], w13, w2, d_out[0])
    return case.results(spread_experts_mlp, *given, ep=group, etp=group, groups=4), case.results(experts_mlp, *given)


def test_one_rank_computes_as_if_there_were_none():
    ((found, expected),) = run_ranks(1, without_partners)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def too_few_experts():
    x, logits, w13, w2, _ = Case().inputs()
    with pytest.raises(ValueError, match="8 experts on each of 2 ranks, and a routing over 8"):
        spread_experts_mlp(x[0], w13, w2, route(logits[0], 2), ep=dist.group.WORLD, etp=dist.group.WORLD)
    return True


def test_matrices_of_all_experts_are_refused():
    assert run_ranks(2, too_few_experts) == [True, True]
