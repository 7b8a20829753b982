"""Recurrent PPO: an agent that sees positions but no velocities, so that it has to remember.

    pip install "gymnasium>=1.1" matplotlib tqdm
    python examples/recurrent_ppo.py                    # CartPole-v1, until it is solved: a minute or less on a CPU
    python examples/recurrent_ppo.py --env Acrobot-v1
    python examples/recurrent_ppo.py --compare          # an update by resets= and one by a loop over steps

The agent plays step by step, by ``lstm.step``, and keeps the state itself, zero where an episode begins. It learns from
whole rollouts, in which episodes end anywhere, by ``lstm(x, hx, resets=)``; with ``--loop``, by a loop over the steps of
torch.nn.LSTM, to the same losses and gradients. Saves the learning curve, runs/recurrent_ppo-ENV-SEED.png, on Ctrl-C too.
"""

from __future__ import annotations

import argparse
import contextlib
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
State = tuple[Tensor, Tensor]  # h and c, both (1, B, HIDDEN)


class Agent(nn.Module):
    """From the LSTM's output: the logits of the actions, and the value, the discounted mean of the rewards to come."""

    def __init__(self, observations: int, actions: int, loop: bool = False) -> None:
        super().__init__()
        self.loop = loop  # learn as torch.nn.LSTM has it
        self.lstm = fused_lstm.LSTM(observations, HIDDEN)
        self.policy, self.value = nn.Linear(HIDDEN, actions), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, state: State, resets: Tensor | None = None) -> tuple[Categorical, Tensor, State]:
        """Policy, values and new state: for one step, (B, I), or a sequence, (T, B, I), with ``resets``, (T, B)."""
        if resets is None:
            output, state = self.lstm.step(x, state)
        elif not self.loop:
            output, state = self.lstm(x, state, resets=resets)
        else:
            lstm, outputs = self.lstm.to_torch(), []  # with the same parameters
            for x_t, keep in zip(x.split(1), (~resets).to(x)[:, None, :, None], strict=True):
                output, state = lstm(x_t, (state[0] * keep, state[1] * keep))
                outputs.append(output)
            output = torch.cat(outputs)
        return Categorical(logits=self.policy(output)), self.value(output).squeeze(-1), state


def make_envs(name: str, count: int) -> gymnasium.vector.VectorEnv:
    """Environments side by side that show positions only, scaled to -1 ... 1."""

    def hide(env: gymnasium.Env) -> gymnasium.Env:
        high = env.observation_space.high[VISIBLE[name]]
        space = gymnasium.spaces.Box(-1, 1, high.shape, np.float32)
        return gymnasium.wrappers.TransformObservation(env, lambda seen: seen[VISIBLE[name]] / high, space)

    # Where an episode ends, step() returns the first observation of the next. The default has a step in between, to mask.
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(name, count, vectorization_mode="sync", vector_kwargs=mode, wrappers=[hide])


class Rollout(NamedTuple):
    """T steps of B environments, (T, B) unless said otherwise. Dimension 1 of each tensor is that of the environments."""

    x: Tensor  # observations, (T, B, I)
    resets: Tensor  # True at t: a new episode begins at t
    actions: Tensor
    log_probs: Tensor  # of the actions, by the policy that took them
    advantages: Tensor
    returns: Tensor  # what the values should have been
    h: Tensor  # the state before the first step, (1, B, HIDDEN)
    c: Tensor


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, ends: Tensor) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2016, arXiv:1506.02438), all (T, B); episodes end where ``ends``."""
    advantages, running = torch.empty_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * next_values[t] - values[t]
        advantages[t] = running = delta + GAMMA * LAMBDA * running * ~ends[t]
    return advantages


class Player:
    """Plays environments side by side, and keeps what goes on from one rollout to the next: the LSTM's state above all."""

    def __init__(self, agent: Agent, envs: gymnasium.vector.VectorEnv, seed: int) -> None:
        self.agent, self.envs, self.device = agent, envs, agent.lstm.weight_ih_l0.device
        self.tensor = partial(torch.as_tensor, dtype=torch.float32, device=self.device)  # from NumPy
        self.x = self.tensor(envs.reset(seed=seed)[0])
        self.begins = torch.ones(envs.num_envs, dtype=torch.bool, device=self.device)
        self.state: State = tuple(torch.zeros(2, 1, envs.num_envs, HIDDEN, device=self.device))
        self.running, self.finished = np.zeros(envs.num_envs), []  # returns of episodes: so far, and of those that ended

    def look(self) -> tuple[Categorical, Tensor, State]:
        """The agent's step; the state is zero where an episode begins, as by ``resets`` within a sequence."""
        h, c = (torch.where(self.begins[:, None], 0, s) for s in self.state)
        return self.agent(self.x, (h, c))

    @torch.no_grad()
    def rollout(self, steps: int) -> Rollout:
        start, records = self.state, []
        for _ in range(steps):
            x, begins = self.x, self.begins
            policy, value, self.state = self.look()
            action = policy.sample()
            seen, reward, terminated, truncated, info = self.envs.step(action.cpu().numpy())
            ended, cut, cut_value = terminated | truncated, truncated & ~terminated, torch.zeros_like(value)
            if cut.any():  # by the time limit: there was more to come, worth the value of the final observation
                rows, final = torch.as_tensor(cut, device=self.device), self.tensor(np.stack(info["final_obs"][cut]))
                cut_value[rows] = self.agent(final, (self.state[0][:, rows], self.state[1][:, rows]))[1]
            self.finished += (self.running + reward)[ended].tolist()
            self.running = (self.running + reward) * ~ended
            self.x, self.begins = self.tensor(seen), torch.as_tensor(ended, device=self.device)
            records.append((x, begins, action, policy.log_prob(action), value, self.tensor(reward), self.begins, cut_value))
        x, resets, actions, log_probs, values, rewards, ends, cut_values = map(torch.stack, zip(*records, strict=True))
        after = torch.cat((values[1:], self.look()[1][None]))  # the last of them without moving on
        advantages = gae((1 - GAMMA) * rewards, values, torch.where(ends, cut_values, after), ends)  # values are means
        return Rollout(x, resets, actions, log_probs, advantages, advantages + values, *start)


def loss_of(agent: Agent, part: Rollout) -> Tensor:
    """PPO's loss (Schulman et al. 2017, arXiv:1707.06347): clipped policy gradient, error of the values, entropy bonus."""
    policy, values, _ = agent(part.x, (part.h, part.c), part.resets)
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


@torch.no_grad()
def evaluate(agent: Agent, name: str, seed: int) -> float:
    """The mean return of EPISODES episodes, each in an environment of its own, by the likeliest actions."""
    player = Player(agent, make_envs(name, EPISODES), seed)
    returns, alive = np.zeros(EPISODES), np.ones(EPISODES, bool)
    while alive.any():  # those that ended play on, and no longer count
        policy, _, player.state = agent(player.x, player.state)
        seen, reward, terminated, truncated, _ = player.envs.step(policy.logits.argmax(-1).cpu().numpy())
        returns += reward * alive
        alive &= ~(terminated | truncated)
        player.x = player.tensor(seen)
    return float(returns.mean())


def train(agent: Agent, args: argparse.Namespace, seeds: itertools.count, curve: list, evaluations: list) -> None:
    """Until two evaluations in a row reach the goal, or the time is up; adds (steps, mean return) to the two lists."""
    player, optimizer = Player(agent, make_envs(args.env, ENVS), next(seeds)), torch.optim.Adam(agent.parameters(), LR)
    started, limit = time.perf_counter(), 60 * args.minutes
    with tqdm(total=limit, bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while (spent := time.perf_counter() - started) < limit:
            bar.update(spent - bar.n)
            update(agent, optimizer, player.rollout(STEPS))
            steps, mean = (len(curve) + 1) * STEPS * ENVS, np.mean(player.finished[-50:] or [np.nan])
            curve.append((steps, mean))
            bar.set_postfix_str(f"{steps:,} steps, return {mean:.1f}", refresh=False)
            if len(curve) % EVERY == 0:
                evaluations.append((steps, evaluate(agent, args.env, next(seeds))))
                if evaluations[-1][1] >= GOAL[args.env] and evaluate(agent, args.env, next(seeds)) >= GOAL[args.env]:
                    break


def compare(agent: Agent, rollout: Rollout) -> None:
    """Updates from the same weights, by resets= and by the loop in turn: the same losses and gradients, in what time?"""
    results, times = {}, {False: [], True: []}
    for loop in [False, True] * 5:
        own = copy.deepcopy(agent)
        own.loop, optimizer = loop, torch.optim.Adam(own.parameters(), LR)
        loss = loss_of(own, rollout)
        results[loop] = [loss.detach(), *torch.autograd.grad(loss, list(own.parameters()))]
        started = time.perf_counter()
        update(own, optimizer, rollout)
        sum(p.sum() for p in own.parameters()).item()  # waits for a GPU
        times[loop].append(time.perf_counter() - started)
    torch.testing.assert_close(results[False], results[True], rtol=1e-3, atol=1e-5)
    print(
        f"losses and gradients agree; time by the loop / by resets=: {np.median(times[True]) / np.median(times[False]):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, how = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--env", choices=VISIBLE, default="CartPole-v1", help="its velocities are hidden (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=5, help="train for no longer (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--loop", action="store_true", help="learn by a loop over steps of torch.nn.LSTM")
    how.add_argument("--compare", action="store_true", help="do not train: compare one update both ways")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**31 or not 0 < args.minutes < np.inf:
        parser.error(f"expected --seed from 0 to 2**31 and --minutes above 0, got {args.seed} and {args.minutes}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: expected one that works here, got {args.device}: {str(error).splitlines()[0]}")

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the tensors are small: more threads would wait for one another more than they compute
    seeds = itertools.count(1_000_000 * args.seed, 1000)  # each set of environments has its own, and so its own episodes
    envs = make_envs(args.env, ENVS)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.n, args.loop).to(args.device)
    if args.compare:
        torch.backends.cudnn.allow_tf32 = False
        return compare(agent, Player(agent, envs, next(seeds)).rollout(STEPS))
    curve, evaluations = [], []
    with contextlib.suppress(KeyboardInterrupt):
        train(agent, args, seeds, curve, evaluations)
        print(f"mean return of {EPISODES} fresh episodes: {evaluate(agent, args.env, next(seeds)):.1f}")
    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    axes.plot(*np.reshape(curve, (-1, 2)).T, label="training, mean of the latest 50 episodes")
    axes.plot(*np.reshape(evaluations, (-1, 2)).T, "o", label=f"evaluation, mean of {EPISODES} episodes, likeliest actions")
    axes.axhline(GOAL[args.env], color="gray", linestyle="--", label="goal")
    axes.set(xlabel="environment steps", ylabel="return", title=f"Recurrent PPO, {args.env} without velocities")
    axes.legend(loc="lower right")
    Path("runs").mkdir(exist_ok=True)
    axes.figure.savefig(path := f"runs/recurrent_ppo-{args.env}-{args.seed}.png", dpi=120)
    print(f"learning curve: {path}")


if __name__ == "__main__":
    main()
