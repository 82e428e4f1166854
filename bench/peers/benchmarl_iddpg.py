"""BenchMARL's IDDPG on VMAS' simple_spread: prints the frames a second of each iteration but the first, as JSON.

Run by bench/marl.py with the interpreter of an environment that has benchmarl and vmas (GPL-3.0, so not ours).
"""

import json
import sys
import tempfile
import time

import torch
from benchmarl.algorithms import IddpgConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig


class Clock(Callback):
    """When each iteration ended."""

    def __init__(self):
        super().__init__()
        self.times = []

    def on_train_end(self, training_td, group):
        self.times.append(time.perf_counter())


def main() -> None:
    worlds, frames, updates, batch, iterations, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    config = ExperimentConfig.get_from_yaml()
    config.share_policy_params = False
    config.max_n_frames = frames * iterations
    config.off_policy_collected_frames_per_batch = frames
    config.off_policy_n_envs_per_worker = worlds
    config.off_policy_n_optimizer_steps = updates
    config.off_policy_train_batch_size = batch
    config.off_policy_memory_size = 100_000
    config.evaluation, config.render, config.loggers, config.create_json = False, False, [], False
    config.save_folder = tempfile.mkdtemp()
    network = MlpConfig(num_cells=[64, 64], activation_class=torch.nn.ReLU, layer_class=torch.nn.Linear)
    clock = Clock()
    experiment = Experiment(
        task=VmasTask.SIMPLE_SPREAD.get_from_yaml(),
        algorithm_config=IddpgConfig.get_from_yaml(),
        model_config=network,
        critic_model_config=network,
        seed=0,
        config=config,
        callbacks=[clock],
    )
    experiment.run()
    seconds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    print(json.dumps({"rates": [frames / s for s in seconds]}))


if __name__ == "__main__":
    main()
