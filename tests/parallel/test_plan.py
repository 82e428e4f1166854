"""The planner's figures against published and measured ones, and its parts against what can be reckoned by hand."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from fulmen.bench.model import CONFIG as MEASURED
from fulmen.bench.train import flops
from fulmen.config import UserError
from fulmen.model import ModelConfig, VisionLanguageConfig
from fulmen.model.config import LIGHTNING
from fulmen.parallel import MeshSizes
from fulmen.parallel.plan import MACHINES, Job, Machine, Placement, Plan, Serving, find_plan, read_machine
from fulmen.parallel.plan import find as search
from fulmen.parallel.plan.job import Piece, _even_borders, cut_stages, groups, needed_operations, stage_weights
from fulmen.parallel.plan.machines import HOP_LATENCY, HOST_LATENCY, NETWORK_LATENCY, Group, sent
from fulmen.parallel.plan.memory import step_memory
from fulmen.parallel.plan.timing import BUBBLE, COMPUTED_AGAIN, LIGHT, estimate_step, layer_work
from fulmen.parallel.plan.traffic import step_traffic

LARGE = ModelConfig.preset("minimax-text-01")
SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=4,
    layer_plan="LS",
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    num_experts=4,
    expert_size=64,
    max_positions=2**20,
)
H800 = MACHINES["H800"]
TRAIN = Path(__file__).parents[2] / "bench" / "results" / "train.json"


def place(world, config=SMALL, context=4096, batch=2**16, sizes=None, **options):
    return Placement(
        job=Job(config=config, context=context, batch=batch), sizes=MeshSizes(**sizes or {}).fitted(world), **options
    )


class TestFigures:
    @pytest.mark.parametrize(
        ("world", "sizes"), [(1, {}), (64, {"pp": 4, "tp": 2, "etp": 2, "ep": 4}), (8, {"pp": 1, "tp": 8, "ep": 8})]
    )
    def test_what_all_ranks_hold_is_the_model(self, world, sizes):
        placement = place(world, LARGE, 8192, 2**20, sizes)
        mesh, total = placement.sizes, 0
        for stage in placement.stages:
            weights = stage_weights(LARGE, mesh, stage)
            total += (weights.dense - weights.copied) * mesh.tp + weights.copied + weights.experts * mesh.etp * mesh.ep
        assert total == LARGE.count_parameters().total
        assert f"{total / 1e9:.1f}" == "456.1"

    @pytest.mark.parametrize("context", [8192, 2**20])
    def test_operations_are_those_of_the_benchmark(self, context):
        assert needed_operations(LARGE, context) == pytest.approx(flops(LARGE, context), rel=1e-3)
        assert f"{LARGE.count_parameters().active / 1e9:.1f}" == "45.9"

    def test_states_and_keys_are_the_published_ones(self):
        alone = Serving(model=LARGE, machine=H800, devices=1, dtype="int8")
        assert f"{alone.state / 1e6:.1f}" == "293.6"
        assert alone.key_values == 40_960
        assert alone.weights == LARGE.weight_bytes("int8")

    def test_a_measured_run(self):
        """Memory and speed of training a model of 950 M on one H100, by its samples' length."""
        lines = [line for line in json.loads(TRAIN.read_text())["lengths"] if line["layers"] == "hybrid"]
        assert len(lines) == 9
        for line in lines:
            context, again = line["length"], line["activations"] != "kept"
            options = dict(samples=max(2**16, context) // context, checkpoint=again, keep=not again, load=1.0)
            plan = Plan(place(1, MEASURED, context, max(2**17, context), **options), MACHINES["H100"])
            assert plan.needs / 1e9 == pytest.approx(line["peak GB"], rel=0.1)
            assert plan.tokens_per_second == pytest.approx(line["tokens a second"], rel=0.1)


class TestMachines:
    def test_by_name_with_changes_and_by_numbers(self):
        assert read_machine("h800") == H800
        assert read_machine("H800, link=450,gpus=4") == dataclasses.replace(H800, link=450e9, gpus=4)
        machine = read_machine("memory=80,bf16=100,int8=200,bandwidth=1000,link=50,network=10,products=0.5")
        assert (machine.memory, machine.bf16, machine.network, machine.products) == (80e9, 100e12, 10e9, 0.5)

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("h900", "no machine named 'h900'; there are H100, H800"),
            ("h800,lnk=3", "a machine has no 'lnk'; it has memory, bf16"),
            ("h800,link", "link of a machine must be a number, got ''"),
            ("h800,link=-1", "link must be above 0, got -1000000000.0"),
            ("h800,products=1.5", "products must be above 0 and at most 1, got 1.5"),
            ("memory=80,bf16=1", "a machine without a name lacks int8, bandwidth, link, network"),
        ],
    )
    def test_what_is_none(self, text, part):
        with pytest.raises(UserError, match=part):
            read_machine(text)

    def test_bytes_that_a_rank_sends(self):
        kinds = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "send")
        assert [sent(kind, 80, 4) for kind in kinds] == [240, 60, 60, 120, 80]
        assert [sent(kind, 80, 1) for kind in kinds] == [0] * 5

    @pytest.mark.parametrize(
        ("kind", "group", "seconds"),
        [
            ("all_gather", Group("tp", 8, 1), 7 / 160),  # the host's link alone
            ("all_gather", Group("dp", 32, 1), 31 / 160),  # eight cards are faster than the link
            ("all_gather", Group("dp", 32, 4), 31 / 80),  # two cards
            ("all_gather", Group("dp", 4, 64), 3 / 40),  # one
            ("all_to_all", Group("ep", 32, 1), 24 / 32 / 40),  # what leaves the host decides
            ("send", Group("cp", 4, 2), 1 / 160),
            ("send", Group("cp", 8, 2), 1 / 40),
        ],
    )
    def test_seconds_of_a_collective(self, kind, group, seconds):
        hosts = math.ceil(group.ranks / min(group.ranks, max(1, 8 // group.stride)))
        latency = HOST_LATENCY + (hosts > 1) * (NETWORK_LATENCY + HOP_LATENCY * (hosts - 1))
        assert H800.seconds(kind, 1e9, group) == pytest.approx(seconds + latency)

    def test_ranks_lie_as_in_the_mesh(self):
        sizes = MeshSizes(pp=2, cp=4, tp=2, etp=2, ep=4).fitted(64)
        found = {name: (group.ranks, group.stride) for name, group in groups(sizes).items()}
        assert found == {
            "tp": (2, 1),
            "cp": (4, 2),
            "dp x cp": (16, 2),
            "pp": (2, 32),
            "ep": (4, 1),
            "etp": (2, 4),
            "edp": (4, 8),
        }


class TestPieces:
    @pytest.mark.parametrize("cp", [2, 4, 16])
    def test_the_ring_of_one_sample(self, cp):
        ring = Piece(config=SMALL, context=4096, cp=cp, balanced=False).ring
        assert (ring.is_crossed, ring.steps, ring.sends, ring.tokens) == (True, cp - 1, (cp - 1) / 2, 4096 // cp)
        assert ring.imbalance == pytest.approx((2 * cp - 1) / cp, rel=1e-3)
        balanced = Piece(config=SMALL, context=4096, cp=cp).ring
        assert (balanced.sends, balanced.steps) == (cp - 1, cp - 1)
        assert balanced.imbalance == pytest.approx(1)

    def test_samples_that_end_with_ranks_send_nothing(self):
        piece = Piece(config=SMALL, context=1024, samples=4, cp=4, balanced=False)
        assert (piece.ring.is_crossed, piece.ring.sends, piece.ring.imbalance) == (False, 0, 1)
        placement = place(4, context=1024, sizes={"cp": 4}, samples=4, balanced=False)
        traffic = step_traffic(placement, placement.stages[0])
        assert {record.group.axis for record in traffic} == {"dp x cp", "edp"}

    def test_stages_are_as_even_as_runs_of_layers_can_be(self):
        costs = [3, 1, 4, 1, 5, 9, 2, 6]
        for parts in range(1, len(costs) + 1):
            borders = _even_borders(costs, parts)
            best = min(
                max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *inner, len(costs))))
                for inner in itertools.combinations(range(1, len(costs)), parts - 1)
            )
            assert (borders[0], borders[-1], len(set(borders))) == (0, len(costs), parts + 1)
            assert max(sum(costs[a:b]) for a, b in itertools.pairwise(borders)) == best

    def test_the_stage_with_the_head_has_fewer_layers(self):
        stages = cut_stages(LARGE, 8192, 8)
        assert "".join(stage.layers for stage in stages) == LARGE.layers
        assert [len(stage.layers) for stage in stages] == [10, 10, 10, 11, 10, 10, 11, 8]
        assert [stage.is_first for stage in stages] == [True] + 7 * [False]
        assert [stage.is_last for stage in stages] == 7 * [False] + [True]

    @pytest.mark.parametrize(
        ("world", "sizes", "options", "part"),
        [
            (16, {"tp": 16}, {}, "8 heads cannot be split over tp 16"),
            (8, {"ep": 8}, {}, "4 experts cannot be split over ep 8"),
            (3, {"etp": 3}, {}, "width 64 cannot be split into multiples of 8 over etp 3"),
            (8, {"pp": 8}, {}, "4 layers cannot be split over pp 8"),
            (3, {"cp": 3}, {}, "a row of 4096 tokens cannot be split evenly over cp 3 x tp 1"),
            (32, {}, {}, "65536 tokens are no whole rows of 4096 for each of dp 32"),
            (16, {}, {"samples": 2}, "65536 tokens are no whole rows of 8192 for each of dp 16"),
            (4, {"tp": 3}, {}, "the mesh pp 1 x dp 1 x cp 1 x tp 3 is 3 ranks, and there are 4"),
        ],
    )
    def test_what_does_not_divide(self, world, sizes, options, part):
        with pytest.raises(UserError, match=part):
            place(world, sizes=sizes, **options)

    @pytest.mark.parametrize(
        ("context", "batch", "part"),
        [
            (2**21, 2**21, "context must be 1 to the model's 1048576 positions, got 2097152"),
            (1000, 4096, "a batch is whole samples: 4096 tokens are no multiple of 1000"),
        ],
    )
    def test_what_is_no_job(self, context, batch, part):
        with pytest.raises(UserError, match=part):
            Job(config=SMALL, context=context, batch=batch)


class TestMemory:
    def needs(self, name, world, sizes=None, **options):
        return Plan(place(world, sizes=sizes, **options), H800).memory[name]

    def test_the_optimizer_is_sharded_over_all_ranks(self):
        alone = self.needs("AdamW's moments", 1)
        assert alone == 8 * SMALL.count_parameters().total
        assert self.needs("AdamW's moments", 4) == alone / 4
        assert self.needs("AdamW's moments", 8, {"cp": 4, "ep": 4}) == pytest.approx(alone / 8)

    def test_activations_are_split_over_cp_and_tp(self):
        alone = self.needs("activations kept", 1)
        assert alone == 4096 * 4 * 64 * 2  # the input of each of four layers, bf16
        assert self.needs("activations kept", 4, {"cp": 4}) == alone / 4
        assert self.needs("activations kept", 4, {"tp": 4}) == alone / 4
        assert self.needs("activations kept", 1, checkpoint=False) > 4 * alone

    def test_a_stage_keeps_as_many_micro_batches_as_are_under_way(self):
        for rows, under_way in ((16, (4, 3, 2, 1)), (2, (2, 2, 2, 1))):
            placement = place(4, batch=rows * 4096, sizes={"pp": 4})
            for stage, number in zip(placement.stages, under_way, strict=True):
                kept = step_memory(placement, stage)["activations kept"]
                assert kept == number * 4096 * len(stage.layers) * 64 * 2

    def test_the_rings_keys_are_those_of_the_steps_under_way(self, monkeypatch):
        keys = 2 * 1024 * SMALL.num_kv_heads * SMALL.head_dim  # numbers of a rank's tokens, a quarter of 4096
        # In bf16 a step under way has keys and gradients there and back; one more is at hand; sums are in fp32.
        step, kept = 3 * 2 * keys, (2 + 4) * keys
        for memory, steps in ((0, 1), (2 * step, 2), (1e9, 3)):
            monkeypatch.setattr("fulmen.parallel.ring.AHEAD", memory)
            assert self.needs("keys in the ring", 4, {"cp": 4}) == kept + (1 + steps) * step

    @pytest.mark.parametrize(("context", "sums"), [(4096, 1), (2**17, 4), (2**20, 16)])
    def test_states_of_lasp_and_the_sums_they_are_made_of(self, context, sums):
        model = dataclasses.replace(SMALL, max_positions=2**20)
        placement = place(4, model, context, 4 * context, {"cp": 4})
        state = SMALL.num_heads * SMALL.head_dim**2 * 4
        # Two segments a rank: those of all four, what enters, what leaves, and sums over 4096 tokens or more.
        found = step_memory(placement, placement.stages[0])["states of LASP+"]
        assert found == 2 * (4 + 2 + sums) * state

    def test_weights_that_stay_gathered_cost_memory_and_save_bytes(self):
        found = {keep: Plan(place(4, keep=keep), H800) for keep in (False, True)}
        total = SMALL.count_parameters().total
        of_experts = SMALL.num_layers * SMALL.num_experts * 3 * SMALL.hidden_size * SMALL.expert_size
        whole = 2 * of_experts + 4 * (total - of_experts)
        assert found[True].memory["weights gathered"] == whole
        assert found[True].memory["gradients not yet reduced"] == 4 * total
        assert found[False].memory["weights gathered"] < whole
        counts = {
            keep: sum(record.count for record in plan.traffic if record.what == "gradients")
            for keep, plan in found.items()
        }
        assert counts[False] == found[False].placement.micro_batches * counts[True] > counts[True]
        texts = ("gathered for each pass of a micro batch", "gathered once a step, with mesh.keep_weights")
        for keep, text in enumerate(texts):
            assert text in found[bool(keep)].table()


class TestTime:
    def test_the_bubble_of_equal_stages(self):
        equal = dataclasses.replace(SMALL, layer_plan="S", num_layers=8, vocab_size=1, hidden_size=512, expert_size=512)
        machine = dataclasses.replace(H800, link=1e18, network=1e18)
        for stages, rows in ((2, 4), (4, 4), (4, 16)):
            placement = place(stages, equal, 2**16, rows * 2**16, {"pp": stages})
            estimate = estimate_step(placement, machine)
            assert estimate.parts[BUBBLE] / estimate.seconds == pytest.approx(
                (stages - 1) / (rows + stages - 1), rel=0.02
            )

    def test_layers_computed_again_cost_a_forward_pass(self):
        kept, again = (estimate_step(place(1, LARGE, checkpoint=again), H800) for again in (False, True))
        assert again.seconds == pytest.approx(kept.seconds + again.parts[COMPUTED_AGAIN])
        assert 0.2 < again.parts[COMPUTED_AGAIN] / kept.seconds < 0.34

    def test_more_groups_of_tokens_hide_more_and_a_fast_link_hides_all(self):
        def waiting(machine, number):
            placement = place(8, LARGE, 8192, 2**17, {"dp": 8, "ep": 8}, groups=number, samples=2)
            return estimate_step(placement, machine).parts.get("waiting: experts", 0.0)

        times = [waiting(H800, number) for number in (1, 2, 4)]
        assert times[0] > 1.7 * times[1] > 2.5 * times[2] > 0
        assert waiting(dataclasses.replace(H800, link=1e18, network=1e18), 4) < 0.05 * times[0]

    def test_slow_networks_are_waited_for(self):
        placement = place(64, LARGE, 2**17, 2**20, {"dp": 8, "cp": 8, "ep": 32})
        slow = dataclasses.replace(H800, network=H800.network / 20)
        fast, slow = (estimate_step(placement, machine) for machine in (H800, slow))
        assert slow.hidden < fast.hidden <= 1
        assert slow.waiting > 2 * fast.waiting
        assert fast.waiting == pytest.approx(sum(v for name, v in fast.parts.items() if name.startswith("waiting")))

    def test_a_balanced_cut_saves_half_of_the_softmax_attention(self):
        even, plain = (
            estimate_step(place(8, LARGE, 2**20, 2**20, {"cp": 8}, balanced=balanced), H800).parts["softmax attention"]
            for balanced in (True, False)
        )
        assert plain / even == pytest.approx(15 / 8, rel=1e-3)


class TestFind:
    def test_it_is_the_fastest_of_all_that_fit(self):
        job = Job(config=SMALL, context=4096, batch=2**16)
        machine = dataclasses.replace(H800, memory=12e6, gpus=4)
        found = find_plan(job, machine, 8, share=1.0)
        plans = [
            Plan(placement, machine, 1.0)
            for sizes in search._meshes(job, machine, 8)
            for placement in search._placements(job, sizes)
        ]
        fitting = [plan for plan in plans if plan.fits]
        assert 0 < len(fitting) < len(plans)
        assert (found.tried, found.refused) == (len(plans), len(plans) - len(fitting))
        assert found.plan.fits
        assert found.plan.estimate.seconds <= min(plan.estimate.seconds for plan in fitting)
        pipelines = {plan.placement.keep for plan in plans if plan.placement.sizes.pp > 1}
        assert pipelines == {False, True}
        sizes = {plan.placement.sizes for plan in plans}
        assert {mesh.tp for mesh in sizes} == {1, 2, 4}
        assert {mesh.ep for mesh in sizes} == {1, 2, 4}
        assert all(mesh.etp * mesh.ep <= 4 for mesh in sizes if mesh.etp > 1)

    def test_it_says_why(self):
        found = find_plan(Job(config=LARGE, context=2**17, batch=2**24), H800, 256)
        text = found.table()
        assert found.plan.placement.sizes.cp > 1
        for beginning in ("  without cp: ", "  without ep: "):
            assert beginning in text
        assert f"{found.tried} placements divide, {found.refused} of them need more than 72.0 GB" in text
        assert f"lost most: {found.plan.lost}" in text

    def test_the_number_of_groups_of_tokens_is_the_best(self):
        best = find_plan(Job(config=LARGE, context=8192, batch=2**20), H800, 128, sizes=MeshSizes(tp=4, ep=32)).plan
        others = [
            Plan(dataclasses.replace(best.placement, groups=number), H800).estimate.seconds for number in (1, 2, 4, 8)
        ]
        assert best.fits
        assert best.estimate.seconds == min(others) < max(others)

    def test_a_mesh_that_was_given_is_kept(self):
        job, sizes = Job(config=SMALL, context=4096, batch=2**16), MeshSizes(pp=2, cp=2, tp=2, ep=2)
        found = find_plan(job, H800, 8, sizes=sizes)
        assert found.plan.placement.sizes == sizes.fitted(8)
        with pytest.raises(UserError, match="4 experts cannot be split over ep 8"):
            find_plan(job, H800, 8, sizes=MeshSizes(ep=8))
        with pytest.raises(UserError, match="no whole rows of 4096 for each of dp 32"):
            find_plan(job, H800, 32, sizes=MeshSizes())

    def test_nothing_fits_or_divides(self):
        found = find_plan(Job(config=LARGE, context=8192, batch=2**20), H800, 8)
        assert not found.plan.fits
        assert "on 8 GPUs fits into 72.0 GB: the least takes 9" in found.refusal
        assert "does not fit: 9" in found.table()
        with pytest.raises(UserError, match="no mesh of 7 ranks divides a batch of 4096 tokens"):
            find_plan(Job(config=SMALL, context=4096, batch=4096), H800, 7)


class TestServing:
    def test_eight_gpus_hold_the_model_and_a_million_tokens(self):
        served = Serving(model=LARGE, machine=H800, devices=8, dtype="int8")
        each = served.weights + served.state + 10**6 * served.key_values
        assert 62e9 < each < 63e9
        assert 8 * served.key_values == 40_960
        assert 8 * served.weights > LARGE.weight_bytes("int8")  # norms and routers are held by all
        assert "62.5 GB and the activations" in served.table(context=10**6, sequences=64, chunk=8192)

    def test_more_gpus_than_heads_of_keys_hold_copies(self):
        assert Serving(model=LARGE, machine=H800, devices=16, dtype="int8").key_values == 40_960 / 8

    def test_a_prompt_takes_of_the_order_of_what_is_reported(self):
        """About 140 s for a million tokens on 8 H800s (minimax-01.md, section 9); the planner leaves things out."""
        served = Serving(model=LARGE, machine=H800, devices=8, dtype="int8")
        assert 70 < served.prefill_seconds(10**6, 8192) < 140
        assert served.decode_seconds(1, 10**6) < served.decode_seconds(64, 10**4)

    def test_a_model_that_sees(self):
        sees = VisionLanguageConfig.preset("minimax-vl-01")
        found, text = (Serving(model=model, machine=H800, devices=8, dtype="int8").weights for model in (sees, LARGE))
        assert found - text == 2 * sees.count_vision_parameters()

    @pytest.mark.parametrize(
        ("changes", "devices", "part"),
        [
            ({}, 3, "64 heads cannot be split over 3 devices"),
            ({"num_experts": 4, "expert_size": 9208}, 64, "width 9208 cannot be split over 16 devices each"),
        ],
    )
    def test_what_cannot_be_split(self, changes, devices, part):
        with pytest.raises(UserError, match=part):
            Serving(model=dataclasses.replace(LARGE, **changes), machine=H800, devices=devices, dtype="int8")


def test_a_machine_is_checked():
    with pytest.raises(UserError, match="gpus must be above 0, got 0"):
        Machine(name="x", memory=1, bf16=1, int8=1, bandwidth=1, link=1, network=1, gpus=0)


def test_lasp_costs_what_its_states_reach():
    def seconds(context, cp, tp=1):
        piece = Piece(config=LARGE, context=context, cp=cp, tp=tp)
        return layer_work(piece, LIGHTNING, MACHINES["H800"], 1)[LIGHT]

    # Alone four tensors move; over ranks up to five more, the fewer the longer a rank's segments are.
    extra = [4 * (cp * seconds(context, cp) / seconds(context, 1) - 1) for context, cp in ((2**13, 8), (2**20, 8))]
    assert 4.5 < extra[0] < 5
    assert 0.5 < extra[1] < 2
    # Ranks that share the heads have the same tokens.
    assert seconds(2**17, 8, tp=4) == pytest.approx(seconds(2**17, 8) / 4)
