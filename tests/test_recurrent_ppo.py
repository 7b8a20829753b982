"""examples/recurrent_ppo.py: its parts against slow or obvious versions of them, and the script as a user runs it."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

SCRIPT = Path(__file__).parents[1] / "examples" / "recurrent_ppo.py"
spec = importlib.util.spec_from_file_location("recurrent_ppo", SCRIPT)
assert spec is not None
assert spec.loader is not None
ppo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ppo)


class Clock(gymnasium.Env):
    """Shows how long an episode has lasted and ends it after so many steps; rewards are 1, 2, 3, ..."""

    observation_space = gymnasium.spaces.Box(-10, 10, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, name: float, end: float = float("inf")) -> None:
        self.name, self.end = name, end

    def reset(self, **kwargs: Any) -> tuple:
        self.time = 0
        return self.seen(), {}

    def seen(self) -> Any:
        return torch.tensor([self.time / 5, self.name]).numpy()

    def step(self, action: int) -> tuple:
        self.time += 1
        return self.seen(), float(self.time), self.time == self.end, False, {}


def clocks(**kwargs: Any) -> gymnasium.vector.VectorEnv:
    """Four environments: two end, after 3 and 5 steps, two never; a limit of 5 steps cuts off what still runs."""
    makers = [partial(Clock, 0.5, 3), partial(Clock, -1.0), partial(Clock, 1.0, 5), partial(Clock, 2.0)]
    limited = [lambda make=make: gymnasium.wrappers.TimeLimit(make(), 5) for make in makers]
    return gymnasium.vector.SyncVectorEnv(limited, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)


@pytest.fixture
def agent() -> Any:
    torch.manual_seed(0)
    return ppo.Agent(2, 2)


def cartpole(agent: Any) -> Any:
    return ppo.Player(agent, ppo.make_envs("CartPole-v1", 8), seed=3)


def slow_advantages(rewards: Tensor, values: Tensor, next_values: Tensor, ends: Tensor) -> Tensor:
    """The mean of all n-step returns to an episode's end, weighted by LAMBDA ** (n - 1), less the value."""
    advantages = torch.zeros_like(rewards)
    T, B = rewards.shape
    for b in range(B):
        for t in range(T):
            stop = next((k for k in range(t, T) if ends[k, b]), T - 1)
            n_steps = []
            for last in range(t, stop + 1):
                discounted = sum(ppo.GAMMA ** (k - t) * rewards[k, b] for k in range(t, last + 1))
                n_steps.append(discounted + ppo.GAMMA ** (last + 1 - t) * next_values[last, b])
            weights = [(1 - ppo.LAMBDA) * ppo.LAMBDA**n for n in range(len(n_steps))]
            weights[-1] = ppo.LAMBDA ** (len(n_steps) - 1)
            assert sum(weights) == pytest.approx(1)
            advantages[t, b] = sum(w * g for w, g in zip(weights, n_steps, strict=True)) - values[t, b]
    return advantages


def test_advantages_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    rewards, values, cut_values = torch.randn(3, 12, 5, dtype=torch.float64)
    ends, terminated = torch.rand(12, 5) < 0.25, torch.rand(12, 5) < 0.5
    ends[:, 0], ends[-1, 1], ends[0, 2] = False, True, True
    assert (ends & terminated).any()
    assert (ends & ~terminated).any()
    final = torch.where(terminated, 0, cut_values)
    next_values = torch.where(ends, final, torch.cat((values[1:], cut_values[-1:])))
    expected = slow_advantages(rewards, values, next_values, ends)
    torch.testing.assert_close(ppo.gae(rewards, values, next_values, ends), expected)


def test_a_rollout_bootstraps_where_an_episode_was_cut_off_and_nowhere_else(agent: Any) -> None:
    T, player = 13, ppo.Player(agent, clocks(), seed=0)
    rollouts = [player.rollout(T), player.rollout(T)]
    lengths, terminates = [3, 5, 5, 5], [True, False, True, False]  # at 5 the third ends and is cut off at once: it ended
    with torch.no_grad():
        for b, (length, name) in enumerate(zip(lengths, (0.5, -1.0, 1.0, 2.0), strict=True)):
            episode = torch.tensor([[k / 5, name] for k in range(length + 1)])[:, None]  # with the final observation
            value = agent.value(agent.lstm(episode)[0]).flatten()
            following = value[1:].clone()
            if terminates[b]:
                following[-1] = 0
            steps = torch.arange(2 * T) % length
            rewards, ends = (1 - ppo.GAMMA) * (steps + 1.0), steps == length - 1
            for k, rollout in enumerate(rollouts):
                part = slice(k * T, k * T + T)
                columns = rewards[part], value[steps[part]], following[steps[part]], ends[part]
                expected = slow_advantages(*(column[:, None] for column in columns))[:, 0]
                torch.testing.assert_close(rollout.advantages[:, b], expected)
                torch.testing.assert_close(rollout.returns[:, b], expected + value[steps[part]])
                assert torch.equal(rollout.resets[:, b], steps[part] == 0)
    assert player.finished[:4] == [(0, 6.0), (1, 15.0), (2, 15.0), (3, 15.0)]


def test_the_training_call_gives_the_probabilities_of_the_rollout(agent: Any) -> None:
    player = cartpole(agent)
    player.rollout(40)
    rollout = player.rollout(40)  # begins amid episodes, so the stored state counts
    assert rollout.resets[1:].any()
    assert not rollout.resets[0].all()
    log_probs = {}
    for name, state in {
        "stored": tuple(rollout.state.split(1)),
        "zero": tuple(0 * rollout.state.split(1)[k] for k in (0, 1)),
    }.items():
        policy, values, _ = agent(rollout.x, state, rollout.resets)
        log_probs[name] = policy.log_prob(rollout.actions)
        if name == "stored":
            torch.testing.assert_close(values, rollout.returns - rollout.advantages)
    torch.testing.assert_close((log_probs["stored"] - rollout.log_probs).exp(), torch.ones(40, 8))
    assert (log_probs["zero"] - rollout.log_probs).abs().max() > 1e-4


@pytest.mark.parametrize("way", ppo.WAYS[1:])
def test_resets_and_the_ways_of_torch_give_the_same_update(agent: Any, way: str) -> None:
    player = cartpole(agent)
    player.rollout(30)
    rollout, ways = player.rollout(50), (agent, copy.deepcopy(agent))
    rollout = rollout._replace(log_probs=rollout.log_probs + 0.3 * torch.randn(50, 8))  # so that some are clipped
    ways[1].way = way
    losses = []
    for way in ways:
        losses.append(ppo.loss_of(way, rollout))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, ours), theirs in zip(agent.named_parameters(), ways[1].parameters(), strict=True):
        assert ours.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    before = copy.deepcopy(agent)
    for way in ways:
        torch.manual_seed(1)  # the same minibatches
        ppo.update(way, torch.optim.SGD(way.parameters(), 0.1), rollout)
    for old, ours, theirs in zip(before.parameters(), ways[0].parameters(), ways[1].parameters(), strict=True):
        assert not torch.equal(old, ours)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("way", "calls"), [("a loop over steps", 40), ("a call between resets", None)])
def test_each_way_makes_its_calls(agent: Any, way: str, calls: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, lengths = cartpole(agent).rollout(40), []
    agent.way, forward = way, torch.nn.LSTM.forward
    monkeypatch.setattr(torch.nn.LSTM, "forward", lambda lstm, x, hx: lengths.append(len(x)) or forward(lstm, x, hx))
    ppo.loss_of(agent, rollout)
    assert sum(lengths) == 40
    assert len(lengths) == (calls or 1 + int(rollout.resets[1:].any(1).sum()))
    assert 1 < len(lengths) <= 40


def test_compare_says_how_long_updates_take(agent: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = cartpole(agent).rollout(40)
    ppo.compare(agent, rollout)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"a rollout of 40 x 8 steps, in which {rollout.resets.sum()} episodes begin"
    for line, way in zip(lines, ppo.WAYS[1:], strict=True):
        words, ratio = line.removesuffix(" times the time by resets=").rsplit(" ", 1)
        assert words == f"{way}: the same losses and gradients, an update in"
        assert float(ratio) > 0


@pytest.mark.parametrize("wrong_way", ["", *ppo.WAYS[1:]])
def test_compare_notices_a_difference(agent: Any, wrong_way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ppo.Agent):
        def forward(self, x: Tensor, state: Any, resets: Tensor) -> Any:
            return super().forward(x, state, resets & (self.way != wrong_way))

    wrong = Wrong(2, 2)
    wrong.load_state_dict(agent.state_dict())
    monkeypatch.setattr(ppo, "update", lambda *_: None)  # whose time alone counts
    with pytest.raises(AssertionError, match="not close") if wrong_way else nullcontext():
        ppo.compare(wrong, cartpole(agent).rollout(40))


@pytest.mark.parametrize(("name", "positions"), [("CartPole-v1", [0, 2]), ("Acrobot-v1", [0, 1, 2, 3])])
def test_observations_have_no_velocities(name: str, positions: list[int]) -> None:
    envs, whole = ppo.make_envs(name, 1), gymnasium.make(name)
    seen, (full, _) = envs.reset(seed=5)[0], whole.reset(seed=5)
    assert seen.shape == (1, len(positions))
    torch.testing.assert_close(seen[0], full[positions] / whole.observation_space.high[positions])


def test_an_episode_begins_in_the_step_that_ended_the_one_before() -> None:
    envs, ended = ppo.make_envs("CartPole-v1", 3), torch.zeros(3, dtype=torch.bool).numpy()
    envs.reset(seed=0)
    while not ended.any():
        seen, _, ended, _, info = envs.step(torch.ones(3, dtype=torch.long).numpy())
    assert (abs(seen[ended, 1]) <= 0.05 / 0.418).all()  # an angle to begin with
    assert all(abs(final[1]) > 0.2 / 0.419 for final in info["final_obs"][ended])  # one that has fallen


def test_it_learns_what_cannot_be_learned_without_memory(agent: Any) -> None:
    # Without memory, with the state reset before every step, training returns stay near 45, after two million steps as well.
    player, optimizer = (
        ppo.Player(agent, ppo.make_envs("CartPole-v1", 16), seed=0),
        torch.optim.Adam(agent.parameters(), ppo.LR),
    )
    for _ in range(30):
        ppo.update(agent, optimizer, player.rollout(128))
    assert sum(mean for _, mean in player.finished[-50:]) / 50 > 80


def test_an_evaluation_counts_the_first_episode_of_each_environment(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 3 and after 5 steps: 1 + 2 + 3 once and 1 + 2 + 3 + 4 + 5 thrice, though the short one ends again meanwhile."""
    monkeypatch.setattr(ppo, "make_envs", lambda name, count: clocks())
    monkeypatch.setattr(ppo, "EPISODES", 4)
    assert ppo.evaluate(agent, "Clock", 0) == (6 + 3 * 15) / 4


@pytest.mark.parametrize(
    ("means", "ends", "last"),
    [
        ([500, 500, 500], 3, 500),
        ([500, 500, 474, 500, 475, 500, 9], 6, 500),  # neither one that is lucky nor two
    ],
)
def test_it_ends_where_three_evaluations_in_a_row_reach_the_goal(
    agent: Any, means: list[float], ends: int, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = iter(means)
    monkeypatch.setattr(ppo, "EVERY", 1)
    monkeypatch.setattr(ppo, "STEPS", 4)
    monkeypatch.setattr(ppo, "evaluate", lambda *_: next(coming))
    evaluations: list = []
    args = SimpleNamespace(env="CartPole-v1", minutes=5)
    assert ppo.train(agent, args, itertools.count(), [], evaluations) == last
    assert [mean for _, mean in evaluations] == means[:ends]


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--device", "cpu", *args], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip


def test_a_short_run_draws_the_curve_beside_that_of_a_solved_one(tmp_path: Path) -> None:
    process = start(tmp_path, "--minutes", "0.01", "--seed", "4", "--out", "here/pictures")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "steps, return" in err
    verdict, picture = out.splitlines()
    mean = verdict.removeprefix("not solved: mean return ").removesuffix(" over 20 fresh episodes (goal 475)")
    assert 8 <= float(mean) < 475
    path = "here/pictures/recurrent_ppo-CartPole-v1-4-unsolved.png"
    assert picture == f"learning curve: {path}"
    assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("args", "way", "mode"), [([], ppo.WAYS[0], ""), (["--loop"], ppo.WAYS[1], "-loop")])
def test_a_solved_run_says_so(
    args: list[str], way: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(agent: Any, args: Any, seeds: Any, curve: list, evaluations: list) -> float:
        assert agent.way == way
        curve += [(2048, 20.0), (4096, 30.0)]
        evaluations += [(4096, 475.0)]
        return 475.0

    monkeypatch.setattr(ppo, "train", train)
    monkeypatch.setattr(sys, "argv", ["recurrent_ppo.py", "--device", "cpu", "--out", str(tmp_path), *args])
    threads = torch.get_num_threads()
    ppo.main()
    torch.set_num_threads(threads)
    path = tmp_path / f"recurrent_ppo-CartPole-v1-0{mode}.png"
    assert path.exists()
    expected = ["solved: mean return 475.0 over 20 fresh episodes (goal 475)", f"learning curve: {path}"]
    assert capsys.readouterr().out.splitlines() == expected


def interrupt(process: subprocess.Popen[str], at: str) -> tuple[str, str]:
    """Sends SIGINT where stderr has come to a text; returns the output. The exit status is that of a shell's Ctrl-C."""
    assert process.stderr is not None
    seen = ""
    while at not in seen:
        assert process.poll() is None
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.split().count("interrupted") == 1
    return out, err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process")
def test_an_interrupted_run_keeps_the_curve(tmp_path: Path) -> None:
    out, _ = interrupt(start(tmp_path, "--env", "Acrobot-v1"), at=f"{11 * 16 * 128:,} steps")
    assert out == "learning curve: runs/recurrent_ppo-Acrobot-v1-0-unsolved.png\n"
    assert (tmp_path / "runs" / "recurrent_ppo-Acrobot-v1-0-unsolved.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process")
def test_interrupted_at_once_draws_nothing(tmp_path: Path) -> None:
    out, _ = interrupt(start(tmp_path), at=" steps, return")
    assert out == ""
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process")
@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_interrupted_imports_and_comparisons_end_in_a_line(tmp_path: Path, seconds: float) -> None:
    process = start(tmp_path, "--compare")
    time.sleep(seconds)  # it imports, and later compares, for seconds
    out, err = interrupt(process, at="")
    assert out == ""
    assert err == "\ninterrupted\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--env", "Pendulum-v1"], "invalid choice: 'Pendulum-v1'"),
        (["--seed", "-1"], "expected --seed from 0"),
        (["--minutes", "0"], "--minutes above 0"),
        (["--minutes", "nan"], "--minutes above 0"),
        (["--device", "nonsense"], "expected --device and --out that work, got nonsense, runs: "),
        (["--device", "cpu", "--out", __file__], f"expected --device and --out that work, got cpu, {__file__}: "),
        (["--loop", "--compare"], "not allowed with argument --loop"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recurrent_ppo.py", *args])
    with pytest.raises(SystemExit) as exit:
        ppo.main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
