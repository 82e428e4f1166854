"""The uniform and the best teacher, and how a method is made by its name."""

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.spec import TeamSpec
from fulmen.marl.transfer import TRANSFERS, Experience, Transfer, make_transfer
from fulmen.marl.transfer.pat import PAT
from fulmen.marl.transfer.selector import step_batch

WORLDS, SIZE = 6, 4


def make_learner(agents=3, sizes=None, **settings):
    spec = TeamSpec(
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=sizes or (SIZE,) * agents,
        action_sizes=(2,) * agents,
        low=-torch.ones(agents, 2),
        high=torch.ones(agents, 2),
    )
    return TeamLearner(spec, LearnerSettings(hidden=(8,), **settings))


def look(learner):
    observation = torch.randn(WORLDS, learner.num_agents, SIZE)
    own, _, _ = learner.act(observation, learner.new_state(WORLDS))
    said, _, _ = learner.teach(observation, learner.new_state(WORLDS, teachers=True))
    return observation, own, said


def test_the_uniform_teacher_is_the_mean_of_the_others():
    learner = make_learner()
    observation, own, said = look(learner)
    actions, student, attention = make_transfer("uniform", learner).decide(observation, own, explore=False)
    assert student.all()
    torch.testing.assert_close(attention, ((1 - torch.eye(3)) / 2).expand(WORLDS, 3, 3))
    torch.testing.assert_close(actions[:, 1], (said[:, 1, 0] + said[:, 1, 2]) / 2)


def test_the_best_teacher_is_the_one_that_the_own_critic_values_most():
    torch.manual_seed(0)
    learner = make_learner(agents=4)
    observation, own, said = look(learner)
    actions, student, attention = make_transfer("best_teacher", learner).decide(observation, own, explore=False)
    followed = 0
    for w in range(WORLDS):
        for i in range(4):
            values = []
            for j in range(4):
                action = torch.zeros(1, 4, 2)
                action[0, i] = said[w, i, j]
                batch = step_batch(observation[w][None], action, {})
                values.append(learner.value(batch, batch.action)[0, 0, i].item())
            best = max(range(4), key=values.__getitem__)
            followed += best != i
            assert student[w, i].item() is (best != i)
            torch.testing.assert_close(actions[w, i], said[w, i, best])
            assert attention[w, i].tolist() == [float(j == best != i) for j in range(4)]
    assert 0 < followed < 4 * WORLDS


def test_who_is_as_good_as_the_best_teacher_acts_by_itself():
    learner = make_learner(equal_start=True)
    observation, own, _ = look(learner)
    actions, student, attention = make_transfer("best_teacher", learner).decide(observation, own, explore=True)
    assert not student.any()
    assert not attention.any()
    assert torch.equal(actions, own)


@pytest.mark.parametrize("name", ["uniform", "best_teacher"])
def test_epsilon_self_is_a_share_of_whole_episodes(name):
    torch.manual_seed(0)
    learner = make_learner(agents=4)
    transfer, certain = make_transfer(name, learner, epsilon_self=0.25), make_transfer(name, learner, epsilon_self=0.0)
    observation = torch.randn(400, 4, SIZE)
    own, _, _ = learner.act(observation, {})
    always = certain.decide(observation, own, explore=True).student
    nobody = torch.zeros_like(always)
    seen = []
    for ended in (False, True, False):
        seen.append(transfer.decide(observation, own, explore=True).student)
        over = torch.full((400,), ended)
        transfer.observe(Experience(observation, own, own[..., 0], nobody, over, observation, seen[-1]))
    assert seen[0][always].float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert not seen[0][~always].any()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_their_state_comes_back_in_the_middle_of_an_episode():
    learner = make_learner(memory=MemorySettings(kind="lstm", size=8))
    first, second = make_transfer("uniform", learner), make_transfer("uniform", learner)
    observation, own, _ = look(learner)
    nobody = torch.zeros(WORLDS, 3, dtype=torch.bool)
    decision = first.decide(observation, own, explore=True)
    first.observe(Experience(observation, own, own[..., 0], nobody, nobody[:, 0], observation, decision.student))
    second.load_state_dict(first.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            first.decide(observation, own, explore=True), second.decide(observation, own, explore=True), strict=True
        )
    )
    second.begin(explore=True)
    torch.manual_seed(1)
    fresh = second.decide(observation, own, explore=True)
    assert not torch.equal(fresh.student, decision.student)


def test_who_has_no_teacher_acts_by_itself():
    learner = make_learner(sizes=(SIZE, SIZE, SIZE - 1))
    observation, own, _ = look(learner)
    for name in ("uniform", "best_teacher"):
        decision = make_transfer(name, learner).decide(observation, own, explore=False)
        assert torch.equal(decision.actions[:, 2], own[:, 2])
        assert not decision.student[:, 2].any()
        assert not decision.attention[:, 2].any()
    alone = make_learner(agents=1)
    decision = make_transfer("uniform", alone).decide(*look(alone)[:2], explore=True)
    assert not decision.student.any()


def test_best_teacher_needs_own_critics_and_no_memory():
    with pytest.raises(UserError, match=r"best_teacher.*memory lstm"):
        make_transfer("best_teacher", make_learner(memory=MemorySettings(kind="lstm", size=8)))
    with pytest.raises(UserError, match=r"best_teacher.*central_critic"):
        make_transfer("best_teacher", make_learner(central_critic=True))


@pytest.mark.parametrize("name", TRANSFERS)
def test_every_method_is_made_by_its_name(name):
    learner = make_learner()
    transfer = make_transfer(name, learner)
    assert isinstance(transfer, Transfer)
    assert transfer.learner is learner
    assert (type(transfer) is Transfer) is (name == "none")


def test_settings_reach_the_method_as_a_recipe_has_them():
    pat = make_transfer("pat", make_learner(), novelty=2, gate="random")
    assert isinstance(pat, PAT)
    assert (pat.settings.novelty, pat.settings.gate) == (2, "random")
    assert make_transfer("adhoc_visit", make_learner(), ask_budget=3).settings.ask_budget == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("path", {}, "unknown transfer 'path', did you mean pat.*there are none, pat, uniform"),
        ("pat", {"head": 2}, "transfer pat has no setting head, did you mean heads"),
        ("pat", {"heads": "2"}, "transfer pat: heads must be an integer, got '2'"),
        ("pat", {"shared_gate": 1}, "transfer pat: shared_gate must be true or false, got 1"),
        ("pat", {"epsilon_self": True}, "epsilon_self must be a number, got True"),
        ("pat", {"gate": 1}, "gate must be a string, got 1"),
        ("pat", {"gate": "no"}, "gate must be one of"),
        ("adhoc_td", {"ask_budget": 1.5}, "ask_budget must be an integer or absent, got 1.5"),
        ("none", {"heads": 1}, "transfer none has no settings, got heads"),
        ("uniform", {"epsilon_self": 2.0}, "epsilon_self is a share from 0 to 1, got 2.0"),
    ],
)
def test_unknown_names_and_settings_are_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        make_transfer(name, make_learner(), **settings)
