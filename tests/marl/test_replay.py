"""What a replay gives back is what was lived: the right steps, each as likely as any other, cut where a life ended."""

from collections import Counter

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.replay import Batch, Replay, check_shared
from fulmen.marl.spec import TeamSpec
from fulmen.marl.transfer.base import Experience

WORLDS, AGENTS, EPISODE = 3, 2, 5


def make_spec(sizes=(4, 4), max_steps=EPISODE):
    bounds = torch.ones(AGENTS, 1)
    return TeamSpec(
        agents=("ann", "bob"),
        observation_sizes=sizes,
        action_sizes=(1, 1),
        low=-bounds,
        high=bounds,
        max_steps=max_steps,
    )


class Life:
    """Steps whose every number says when, where and to whom it happened.

    World w's episodes last `lengths[w]` steps. Observation: time, world, agent, 0; what a last step led to has 1 in
    place of the 0.
    """

    def __init__(self, lengths=(EPISODE,) * WORLDS):
        self.lengths, self.time = torch.tensor(lengths), 0

    def see(self, time, last):
        world = torch.arange(WORLDS)[:, None].expand(WORLDS, AGENTS)
        agent = torch.arange(AGENTS).expand(WORLDS, AGENTS)
        numbers = (torch.full_like(world, time), world, agent, last[:, None].expand_as(world).long())
        return torch.stack(numbers, dim=-1).float()

    def ended(self, time):
        return (time + 1) % self.lengths == 0

    def step(self):
        time, ended = self.time, self.ended(self.time)
        now = self.see(time, torch.zeros(WORLDS, dtype=torch.bool))
        self.time += 1
        return Experience(
            observation=now,
            action=now[..., :1] + 0.5,
            reward=now[..., 0] * 100 + now[..., 1] * 10 + now[..., 2],
            terminated=ended[:, None] & (now[..., 2] == 1),
            ended=ended,
            next_observation=self.see(time + 1, ended),
            student=(now[..., 0] + now[..., 2]) % 2 == 1,
        )

    def state(self):
        """Memory before the next step: zero at an episode's beginning, else the step's observation, as a matrix."""
        age = self.time % self.lengths
        return {"h": (self.see(self.time, age < 0) * (age > 0)[:, None, None]).unflatten(-1, (2, 2))}


def make_replay(steps, *, life=None, spec=None, state=False, **settings):
    life = life or Life()
    replay = Replay(spec or make_spec(), num_worlds=WORLDS, **({"capacity": 20} | settings))
    for _ in range(steps):
        before = life.state() if state else None
        replay.add(life.step(), before)
    return replay, life


def check_lived(batch: Batch, life: Life, *, oldest=0):
    """Every valid number of the batch agrees with the life; gives its (time, world, agent) [B, T, N, 3]."""
    who = batch.observation[:, :-1, :, :3].long()
    time, world, agent = who.unbind(-1)
    valid = batch.valid
    assert valid[:, 0].all()
    assert ((time >= oldest) & (time < life.time))[valid].all()
    assert torch.equal(batch.reward[valid], (time * 100 + world * 10 + agent).float()[valid])
    assert torch.equal(batch.action[..., 0][valid], time[valid] + 0.5)
    assert torch.equal(batch.student[valid], ((time + agent) % 2 == 1)[valid])
    ended = (time + 1) % life.lengths[world] == 0
    assert torch.equal(batch.terminated[valid], (ended & (agent == 1))[valid])
    # What a step led to: the next moment of the same life, marked where the episode was over.
    following = batch.observation[:, 1:].long()
    assert torch.equal(following[valid], torch.stack((time + 1, world, agent, ended.long()), dim=-1)[valid])
    # A sequence ends with its episode, and what is valid lies end to end.
    assert not (valid[:, 1:] & (ended | ~valid)[:, :-1]).any()
    return who


@pytest.mark.parametrize("steps", [1, 7, 20, 33, 60])
def test_single_steps_are_as_they_were_lived(steps):
    replay, life = make_replay(steps)
    assert len(replay) == min(steps, 20) * WORLDS
    batch = replay.sample(64)
    assert batch.observation.shape == (64, 2, AGENTS, 4)
    assert batch.action.shape == (64, 1, AGENTS, 1)
    assert batch.state is None
    assert batch.valid.all()
    who = check_lived(batch, life, oldest=steps - 20)
    assert torch.equal(who[..., 2], torch.arange(AGENTS).expand(64, 1, AGENTS))


def test_everybody_draws_for_itself_unless_jointly():
    replay, life = make_replay(20)
    alone, joint = (check_lived(replay.sample(64, joint=joint), life)[..., :2] for joint in (False, True))
    assert (alone[:, :, 0] != alone[:, :, 1]).any()
    assert (joint[:, :, 0] == joint[:, :, 1]).all()
    assert len(joint[:, :, 0].unique(dim=0)) > 1


def test_shared_draws_are_from_everybodys_lives():
    replay, life = make_replay(20)
    who = check_lived(replay.sample(256, shared=True), life)
    for agent in range(AGENTS):
        assert 64 < (who[:, 0, agent, 2] == 0).sum() < 192


def chi_square(counts: Counter, kinds: int):
    """Pearson's statistic of equally likely kinds; about `kinds` where they are."""
    expected = counts.total() / kinds
    assert len(counts) == kinds
    return sum((count - expected) ** 2 / expected for count in counts.values())


def draws(batch):
    time_world = batch.observation[:, :-1, :, :3].long()[batch.valid]
    return Counter(map(tuple, time_world.tolist()))


def test_all_steps_are_equally_likely():
    replay, _ = make_replay(33)
    # 120 kinds: the statistic has mean 119 and deviation 15.
    assert chi_square(draws(replay.sample(20_000)), 20 * WORLDS * AGENTS) < 200


def test_all_steps_of_sequences_are_equally_likely():
    """Episodes of other lengths than the sequences, so that the last one of each is cut."""
    replay, life = make_replay(20, life=Life((5, 7, 3)), sequence=4, spec=make_spec(max_steps=7))
    batch = replay.sample(8000)
    check_lived(batch, life)
    assert chi_square(draws(batch), 20 * WORLDS * AGENTS) < 300


@pytest.mark.parametrize("sequence", [0, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 1), (4, 3, 5)])
def test_a_sequence_never_straddles_the_write_pointer(sequence, lengths):
    replay, life = make_replay(0, life=Life(lengths), sequence=sequence, capacity=8)
    for steps in range(1, 30):
        replay.add(life.step())
        batch = replay.sample(32)
        check_lived(batch, life, oldest=steps - 8)
        assert batch.valid.any(dim=(0, 2)).all(), "no step is there for nothing"
        behind = ~batch.valid
        assert (batch.observation[:, 1:][behind] == 0).all()
        assert (batch.reward[behind] == 0).all()
        assert not (batch.terminated | batch.student)[behind].any()


def test_whole_episodes():
    replay, life = make_replay(20, sequence=0)
    batch = replay.sample(64)
    who = check_lived(batch, life)
    assert batch.valid.shape == (64, EPISODE, AGENTS)
    assert batch.valid.all()
    assert (who[:, 0, :, 0] % EPISODE == 0).all()
    assert batch.observation[:, -1, :, 3].all()


def test_every_step_of_an_episode_is_in_a_sequence():
    replay, life = make_replay(20, sequence=3)
    who = check_lived(replay.sample(256), life)
    assert set((who[:, 0, :, 0] % EPISODE).unique().tolist()) == {0, 3}


@pytest.mark.parametrize("draw", [dict(), dict(joint=True), dict(shared=True)], ids=["own", "joint", "shared"])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 4), (9, 1, 7)])
def test_memory_is_the_one_before_the_first_step(lengths, draw):
    """Also when the ring has gone round: a sequence keeps its own state, never a later one."""
    replay, life = make_replay(0, life=Life(lengths), sequence=2, capacity=8, spec=make_spec(max_steps=9), state=True)
    seen = set()
    for steps in range(1, 40):
        before = life.state()
        replay.add(life.step(), before)
        batch = replay.sample(32, **draw)
        who = check_lived(batch, life, oldest=steps - 8)[:, 0].float()
        begins = who[..., 0] % life.lengths[who[..., 1].long()] == 0
        expected = torch.cat((who, torch.zeros_like(who[..., :1])), dim=-1) * ~begins[..., None]
        assert batch.state["h"].shape == (32, AGENTS, 2, 2)
        assert torch.equal(batch.state["h"].flatten(-2), expected)
        seen |= set(begins.flatten().tolist())
    assert seen == {True, False}


def test_episodes_and_single_steps_begin_without_memory():
    for sequence in (0, 1):
        replay, _ = make_replay(9, sequence=sequence, state=True)
        assert replay.sample(4).state is None


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sequence", [0, 1, 4])
def test_nothing_unwritten_is_ever_drawn(sequence):
    replay, life = make_replay(0, sequence=sequence)
    for _ in range(6):
        replay.add(life.step())
        batch = replay.sample(64)
        check_lived(batch, life)
        assert not any(x.isnan().any() for x in batch[:3])


def test_the_ring_is_allocated_once():
    replay, life = make_replay(1)
    first = replay.state_dict()["rows"].data_ptr()
    for _ in range(50):
        replay.add(life.step())
    assert replay.state_dict()["rows"].data_ptr() == first


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("steps", [0, 1, 13, 30])
@pytest.mark.parametrize("sequence", [0, 1, 2])
def test_a_restored_replay_goes_on_bit_for_bit(steps, sequence):
    replay, life = make_replay(steps, sequence=sequence, state=sequence == 2)
    other, _ = make_replay(4, sequence=sequence, state=sequence == 2)
    other.load_state_dict(replay.state_dict())
    assert len(other) == len(replay)
    for _ in range(25):
        before = life.state()
        step = life.step()
        batches = []
        for r in (replay, other):
            r.add(step, before)
            torch.manual_seed(1)
            batches.append(r.sample(16)._asdict())
        assert equal(*batches)
    assert equal(replay.state_dict(), other.state_dict())


def test_a_restored_replay_shares_nothing_with_the_other():
    replay, life = make_replay(5, sequence=2, state=True)
    other, _ = make_replay(0, sequence=2)
    other.load_state_dict(replay.state_dict())
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(other.sample(64)._asdict())
        for _ in range(30):
            before = life.state()
            replay.add(life.step(), before)
    assert equal(*draws)


@pytest.mark.parametrize("settings", [dict(capacity=21), dict(spec=make_spec((4, 6)))], ids=["capacity", "team"])
def test_a_replay_of_another_shape_is_refused(settings):
    replay, _ = make_replay(30)
    other = Replay(**({"spec": make_spec(), "capacity": 20, "num_worlds": WORLDS} | settings))
    with pytest.raises(UserError, match="resume with the same world and the same capacity"):
        other.load_state_dict(replay.state_dict())


def test_a_replay_of_other_worlds_is_refused_even_if_empty():
    other = Replay(make_spec(), capacity=20, num_worlds=WORLDS + 1)
    with pytest.raises(UserError, match="does not fit 20 steps of 4 worlds"):
        other.load_state_dict(make_replay(0)[0].state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sequence=-1), "sequence must be at least 1, or 0 for whole episodes, got -1"),
        (dict(sequence=0, spec=make_spec(max_steps=None)), "need an environment with max_steps"),
        (dict(sequence=0, capacity=4), "must hold a sequence of 5 steps in each world, not 4"),
        (dict(capacity=0), "must hold a sequence of 1 steps in each world, not 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        make_replay(0, **settings)


def test_more_than_there_is_room_for():
    with pytest.raises(UserError, match=r"needs [\d,]+\.\d GB: lower its capacity"):
        make_replay(1, capacity=10**13)


def test_what_cannot_be_shared():
    replay, _ = make_replay(1)
    with pytest.raises(UserError, match="central critic needs all agents' steps of one moment"):
        replay.sample(1, shared=True, joint=True)
    with pytest.raises(UserError, match="bob has 6 observations and 1 actions, ann 4 observations and 1 actions"):
        check_shared(make_spec((4, 6)))
    check_shared(make_spec())
