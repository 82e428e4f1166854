"""`fulmen train` and `quickstart`."""

import argparse
import functools
from pathlib import Path

from fulmen.cli.parts import fail, recipe_arguments, stopped, verb
from fulmen.cli.tasks import load_task

SAMPLES = ("def ", "import ", "class ")


def add(verbs) -> None:
    parser = verb(
        verbs,
        "quickstart",
        _quickstart,
        "train a small model on this Python's own library, then let it write",
        "fulmen quickstart",
    )
    recipe_arguments(parser)
    parser = verb(
        verbs,
        "train",
        _train,
        "train as a recipe says",
        "fulmen train quickstart --dir runs/first --set schedule.steps=200",
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last good snapshot in the run's folder")
    recipe_arguments(parser)


def _train(arguments: argparse.Namespace) -> int:
    from fulmen.parallel import LostRankError, is_first_rank, restarts
    from fulmen.train import TrainingDivergedError, train

    recipe, build = load_task(arguments.recipe, arguments.set)
    folder = arguments.dir or Path("runs") / Path(arguments.recipe).stem
    if restarts() and is_first_rank():
        print(f"restart {restarts()}: a rank was lost; going on from the last good snapshot in {folder}", flush=True)
    resume = arguments.resume or restarts() > 0
    try:
        result = train(recipe, folder, build=build, resume=resume, report=functools.partial(print, flush=True))
    except LostRankError as error:
        return fail(str(error), 1)
    except TrainingDivergedError as error:
        return fail(str(error), 1) if is_first_rank() else 1
    if not is_first_rank():
        return 0
    if result.checkpoint is None:
        return stopped(["train"], folder, f"step {result.step} of {recipe.schedule.steps}", result.stopped_by)
    print(f"checkpoint: {result.checkpoint}\nloss plot:  {folder / 'plots' / 'loss.png'}")
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    folder = arguments.dir or Path("runs/quickstart")
    if (folder / "checkpoint").exists() and not arguments.set:
        print(f"{folder} holds a trained model; delete the folder to train it anew.")
    else:
        print("Training a hybrid lightning + softmax mixture-of-experts model on the Python standard library's source.")
        # A run that was broken off goes on.
        code = _train(argparse.Namespace(recipe="quickstart", dir=folder, set=arguments.set, resume=True))
        if code:
            return code
    _print_samples(folder)
    print(f"""
Go on with:
  fulmen chat {folder}                          ask it for a function
  fulmen generate {folder} --prompt 'import '   let it continue a text
  fulmen info {folder}                          sizes and memory
  tensorboard --logdir {folder}/tensorboard     all curves (loss, expert load, router entropy)""")
    return 0


def _print_samples(folder: Path) -> None:
    from fulmen.run import read_metrics
    from fulmen.serve import Conversation, Engine, EngineSettings, SamplingParams

    curve = [
        line["held_out_bits_per_byte"] for line in read_metrics(folder / "metrics.jsonl") if "held_out_loss" in line
    ]
    if curve:
        print(f"\nHeld-out text: {curve[0]:.2f} bits per byte before training, {curve[-1]:.2f} after.")
    engine = Engine.load(folder, EngineSettings(max_sequences=len(SAMPLES)))
    params = SamplingParams(max_tokens=80, temperature=0.7, top_p=0.95, seed=1)
    for prompt, completion in zip(SAMPLES, engine.generate(SAMPLES, params), strict=True):
        print(f"\n--- it continues {prompt!r} ---\n{prompt}{completion.text}")
    request = "Return the number of items in the list."
    print(f"\n--- asked: {request} ---\n{''.join(Conversation(engine).reply(request, params))}")
