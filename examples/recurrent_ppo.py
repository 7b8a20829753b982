"""Recurrent PPO: an agent that sees positions but no velocities, so that it has to remember.

    pip install "gymnasium>=1.1" matplotlib tqdm
    python examples/recurrent_ppo.py            # CartPole-v1, until it is solved: a minute or less on a CPU
    python examples/recurrent_ppo.py --compare  # times an update by resets=, and by two ways of torch.nn.LSTM

The agent plays step by step, by ``lstm.step``, and keeps the state itself, zero where an episode begins. It learns from
whole rollouts, in which episodes end anywhere, by ``lstm(x, hx, resets=)``; with ``--loop``, by a loop over the steps of
torch.nn.LSTM, to the same losses and gradients. Saves the learning curve, runs/recurrent_ppo-ENV-SEED.png, on Ctrl-C too.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # Ctrl-C, also in the imports that follow: a line and a status, no traceback
    signal.signal(signal.SIGINT, lambda *_: sys.exit(print("\ninterrupted", file=sys.stderr) or 130))

import argparse
import copy
import itertools
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import tqdm

import fused_lstm

VISIBLE = {"CartPole-v1": [0, 2], "Acrobot-v1": [0, 1, 2, 3]}  # what is observed: positions and angles, no velocities
GOAL = {"CartPole-v1": 475, "Acrobot-v1": -100}  # the mean return that gymnasium's registry counts as solved
ENVS, STEPS, HIDDEN = 16, 128, 64  # a rollout is STEPS x ENVS: T and B below
EPOCHS, MINIBATCHES, LR = 4, 4, 1e-3
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
EPISODES, EVERY = 20, 10  # of an evaluation; updates between two evaluations
WAYS = ("resets=", "a loop over steps", "a call between resets")  # the latter two by torch.nn.LSTM


class Agent(nn.Module):
    """From the LSTM's output: the logits of the actions, and the value, the discounted mean of the rewards to come."""

    def __init__(self, observations: int, actions: int, way: str = "resets=") -> None:
        super().__init__()
        self.way = way  # to learn from sequences, of WAYS
        self.lstm = fused_lstm.LSTM(observations, HIDDEN)
        self.policy, self.value = nn.Linear(HIDDEN, actions), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, state: tuple, resets: Tensor | None = None) -> tuple[Categorical, Tensor, tuple]:
        """Policy, values and new state (h, c): for one step, (B, I), or a sequence, (T, B, I), with ``resets``, (T, B)."""
        if resets is None:
            output, state = self.lstm.step(x, state)
        elif self.way == "resets=":
            output, state = self.lstm(x, state, resets=resets)
        else:
            lstm, outputs = self.lstm.to_torch(), []  # with the same parameters
            cuts = range(1, len(x)) if self.way == WAYS[1] else (1 + resets[1:].any(1).nonzero().flatten()).tolist()
            for start, end in itertools.pairwise([0, *cuts, len(x)]):  # of all rows, where any begins anew
                keep = (~resets[start]).to(x)[:, None]
                output, state = lstm(x[start:end], (state[0] * keep, state[1] * keep))
                outputs.append(output)
            output = torch.cat(outputs)
        return Categorical(logits=self.policy(output)), self.value(output).squeeze(-1), state


def make_envs(name: str, count: int) -> gymnasium.vector.VectorEnv:
    """Environments side by side that show positions only, scaled to -1 ... 1."""
    high = gymnasium.make(name).observation_space.high[VISIBLE[name]]
    space = gymnasium.spaces.Box(-1, 1, high.shape, np.float32)
    hide = partial(gymnasium.wrappers.TransformObservation, func=lambda x: x[VISIBLE[name]] / high, observation_space=space)
    # Where an episode ends, step() returns the first observation of the next. The default has a step in between, to mask.
    return gymnasium.make_vec(name, count, "sync", {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}, [hide])


class Rollout(NamedTuple):
    """T steps of B environments, (T, B) unless said otherwise. Dimension 1 of each tensor is that of the environments."""

    x: Tensor  # observations, (T, B, I)
    resets: Tensor  # True at t: a new episode begins at t
    actions: Tensor
    log_probs: Tensor  # of the actions, by the policy that took them
    advantages: Tensor
    returns: Tensor  # what the values should have been
    state: Tensor  # h and c before the first step, (2, B, HIDDEN)


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, ends: Tensor) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2016, arXiv:1506.02438), all (T, B); episodes end where ``ends``."""
    advantages, running = torch.empty_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * next_values[t] - values[t]
        advantages[t] = running = delta + GAMMA * LAMBDA * running * ~ends[t]
    return advantages


class Player:
    """Plays environments side by side, and keeps what goes on from one rollout to the next: the LSTM's state above all."""

    def __init__(self, agent: Agent, envs: gymnasium.vector.VectorEnv, seed: int, greedy: bool = False) -> None:
        self.agent, self.envs, self.greedy, self.device = agent, envs, greedy, agent.lstm.weight_ih_l0.device
        self.tensor = partial(torch.as_tensor, dtype=torch.float32, device=self.device)  # from NumPy
        self.x = self.tensor(envs.reset(seed=seed)[0])
        self.begins = torch.ones(envs.num_envs, dtype=torch.bool, device=self.device)
        self.state = tuple(torch.zeros(2, 1, envs.num_envs, HIDDEN, device=self.device))
        self.running, self.finished = np.zeros(envs.num_envs), []  # returns: so far; (environment, return) where one ended

    def look(self) -> tuple[Categorical, Tensor, tuple]:
        """The agent's step; the state is zero where an episode begins, as by ``resets`` within a sequence."""
        return self.agent(self.x, tuple(torch.where(self.begins[:, None], 0, s) for s in self.state))

    @torch.no_grad()
    def rollout(self, steps: int) -> Rollout:
        start, records = self.state, []
        for _ in range(steps):
            x, begins = self.x, self.begins
            policy, value, self.state = self.look()
            action = policy.logits.argmax(-1) if self.greedy else policy.sample()
            seen, reward, terminated, truncated, info = self.envs.step(action.cpu().numpy())
            ended, cut, cut_value = terminated | truncated, truncated & ~terminated, torch.zeros_like(value)
            if cut.any():  # by the time limit: there was more to come, worth the value of the final observation
                rows, final = torch.as_tensor(cut, device=self.device), self.tensor(np.stack(info["final_obs"][cut]))
                cut_value[rows] = self.agent(final, (self.state[0][:, rows], self.state[1][:, rows]))[1]
            self.finished += zip(*ended.nonzero(), (self.running + reward)[ended], strict=True)
            self.running = (self.running + reward) * ~ended
            self.x, self.begins = self.tensor(seen), torch.as_tensor(ended, device=self.device)
            records.append((x, begins, action, policy.log_prob(action), value, self.tensor(reward), self.begins, cut_value))
        x, resets, actions, log_probs, values, rewards, ends, cut_values = map(torch.stack, zip(*records, strict=True))
        after = torch.cat((values[1:], self.look()[1][None]))  # the last of them without moving on
        advantages = gae((1 - GAMMA) * rewards, values, torch.where(ends, cut_values, after), ends)  # values are means
        return Rollout(x, resets, actions, log_probs, advantages, advantages + values, torch.cat(start))


def loss_of(agent: Agent, part: Rollout) -> Tensor:
    """PPO's loss (Schulman et al. 2017, arXiv:1707.06347): clipped policy gradient, error of the values, entropy bonus."""
    policy, values, _ = agent(part.x, part.state.split(1), part.resets)
    ratio = (policy.log_prob(part.actions) - part.log_probs).exp()
    advantages = (part.advantages - part.advantages.mean()) / (part.advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    return VALUE * (values - part.returns).square().mean() - gain - ENTROPY * policy.entropy().mean()


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout) -> None:
    """Several passes over a rollout. A minibatch is some of the environments, in all their steps, in order."""
    for _ in range(EPOCHS):
        for envs in torch.randperm(rollout.x.shape[1], device=rollout.x.device).chunk(MINIBATCHES):
            loss = loss_of(agent, Rollout(*(tensor[:, envs] for tensor in rollout)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def evaluate(agent: Agent, name: str, seed: int) -> float:
    """The mean return of EPISODES episodes, the first in each of so many environments, by the likeliest actions."""
    player = Player(agent, make_envs(name, EPISODES), seed, greedy=True)
    while len(first := dict(reversed(player.finished))) < EPISODES:
        player.rollout(STEPS)
    return float(np.mean(list(first.values())))


def train(agent: Agent, args: argparse.Namespace, seeds: itertools.count, curve: list, evaluations: list) -> float:
    """Until three evaluations in a row reach the goal, or the time is up. Fills the lists, returns the last evaluation."""
    player, optimizer = Player(agent, make_envs(args.env, ENVS), next(seeds)), torch.optim.Adam(agent.parameters(), LR)
    bar = tqdm(total=60 * args.minutes, bar_format=f"|{{bar:20}}| {{elapsed}} of {args.minutes:g} minutes{{postfix}}")
    for steps in itertools.count(ENVS * STEPS, ENVS * STEPS):
        update(agent, optimizer, player.rollout(STEPS))
        curve.append((steps, np.mean([mean for _, mean in player.finished[-50:]] or [np.nan])))
        bar.n = min(bar.format_dict["elapsed"], bar.total)
        bar.set_postfix_str(f"{steps:,} steps, return {curve[-1][1]:.1f}")
        late = bar.n == bar.total
        if late or steps % (EVERY * ENVS * STEPS) == 0:
            evaluations.append((steps, evaluate(agent, args.env, next(seeds))))
            if late or [mean >= GOAL[args.env] for _, mean in evaluations[-3:]] == [True] * 3:
                return evaluations[-1][1]


def draw(path: Path, name: str, curve: list, evaluations: list) -> None:
    axes = Figure(figsize=(7, 5), layout="constrained").subplots()
    axes.plot(*np.transpose(curve), label="training, mean of the latest 50 episodes")
    axes.plot(*np.transpose(evaluations), "o", label=f"evaluation, mean of {EPISODES} episodes, likeliest actions")
    axes.axhline(GOAL[name], color="gray", linestyle="--", label="goal")
    axes.set(xlabel="environment steps", ylabel="return", title=f"Recurrent PPO, {name} without velocities")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.figure.savefig(path, dpi=120)
    print(f"learning curve: {path}")


def compare(agent: Agent, rollout: Rollout) -> None:
    """Updates from the same weights, by all ways in turn: the same losses and gradients, in what time?"""
    results, times = {}, {way: [] for way in WAYS}
    for way in WAYS * 5:
        own = copy.deepcopy(agent)
        own.way, optimizer = way, torch.optim.Adam(own.parameters(), LR)
        loss = loss_of(own, rollout)
        results[way] = [loss.detach(), *torch.autograd.grad(loss, list(own.parameters()))]
        started = time.perf_counter()
        update(own, optimizer, rollout)
        sum(p.sum() for p in own.parameters()).item()  # waits for a GPU
        times[way].append(time.perf_counter() - started)
    print(f"a rollout of {' x '.join(map(str, rollout.resets.shape))} steps, in which {rollout.resets.sum()} episodes begin")
    for way in WAYS[1:]:
        torch.testing.assert_close(results["resets="], results[way], rtol=1e-3, atol=1e-5)
        ratio = np.median(times[way]) / np.median(times["resets="])
        print(f"{way}: the same losses and gradients, an update in {ratio:.2f} times the time by resets=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, how = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--env", choices=VISIBLE, default="CartPole-v1", help="its velocities are hidden (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=5, help="train for no longer (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--loop", action="store_true", help="learn by a loop over steps of torch.nn.LSTM")
    how.add_argument("--compare", action="store_true", help="do not train: compare an update with two by torch.nn.LSTM")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="of the picture; -unsolved in its name where it is so")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**31 or not 0 < args.minutes < np.inf:
        parser.error(f"expected --seed from 0 to 2**31 and --minutes above 0, got {args.seed} and {args.minutes}")
    try:
        torch.zeros(1, device=args.device).item()
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(f"expected --device and --out that work, got {args.device}, {args.out}: {str(error).splitlines()[0]}")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the tensors are small: more threads would wait for one another more than they compute
    seeds = itertools.count(1_000_000 * args.seed, 1000)  # each set of environments has its own, and so its own episodes
    envs = make_envs(args.env, ENVS)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.n, WAYS[args.loop]).to(args.device)
    if args.compare:
        torch.backends.cudnn.allow_tf32 = False
        return compare(agent, Player(agent, envs, next(seeds)).rollout(STEPS))
    curve, evaluations, mean, goal = [], [], -np.inf, GOAL[args.env]
    try:
        mean = train(agent, args, seeds, curve, evaluations)
        print(f"{'not ' * (mean < goal)}solved: mean return {mean:.1f} over {EPISODES} fresh episodes (goal {goal})")
    finally:  # on Ctrl-C too
        if evaluations:  # there is something to draw
            mode = "-loop" * args.loop + "-unsolved" * (mean < goal)
            draw(args.out / f"recurrent_ppo-{args.env}-{args.seed}{mode}.png", args.env, curve, evaluations)


if __name__ == "__main__":
    main()
