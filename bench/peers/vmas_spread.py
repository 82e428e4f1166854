"""VMAS' simple_spread under random actions: prints world steps a second, as JSON. Run by bench/marl.py."""

import json
import sys
import time

import torch
import vmas


def main() -> None:
    worlds, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    environment = vmas.make_env("simple_spread", num_envs=worlds, continuous_actions=True, seed=0)
    environment.reset()
    actions = [(torch.rand(worlds, 2) * 2 - 1) * 0.99 for _ in environment.agents]
    steps, rates = max(20, 20_000 // worlds // 10), []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(steps):
            environment.step(actions)
        rates.append(steps * worlds / (time.perf_counter() - started))
    print(json.dumps({"rates": rates[1:]}))


if __name__ == "__main__":
    main()
