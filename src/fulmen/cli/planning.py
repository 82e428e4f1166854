"""`fulmen plan`: memory and time of a server or of training, before anything is loaded or rented."""

import argparse
import dataclasses

from fulmen.cli.parts import DTYPES, count, model_config, verb
from fulmen.cli.serving import GB, engine_settings, gigabytes, memory_arguments
from fulmen.config import UserError

SERVING = ("dtype", "max_sequences", "max_context", "chunk_tokens", "page_size", "no_prefix_cache")
TRAINING = ("context", "batch_tokens", "mesh")
"""Arguments that only one of the two plans takes."""


def add(verbs) -> None:
    parser = verb(
        verbs,
        "plan",
        _plan,
        "print what a server or, with --train, training needs of some GPUs, without loading anything",
        "fulmen plan minimax-text-01 --dtype int8 --devices 8 --memory 80 --max-context 1000000",
    )
    parser.add_argument("model", help="a named size, a checkpoint's folder or a training run's")
    parser.add_argument("--devices", type=count, default=1, help="that share the model (default: 1)")
    help_text = "H100, H800, H200, H20 or A100, one with other numbers (H800,link=450), or numbers alone"
    parser.add_argument("--machine", metavar="NAME", help=help_text)
    parser.add_argument("--memory", type=gigabytes, metavar="GB", help="of each device (default: the machine's)")
    parser.add_argument("--share", type=float, default=0.9, help="of the memory that is used (default: 0.9)")
    serving = parser.add_argument_group("serving")
    dtypes = (*DTYPES, "int8")
    serving.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of weights (default: bfloat16)")
    memory_arguments(serving)
    text = "for example: fulmen plan minimax-text-01 --train --machine H800 --devices 256 --context 131072"
    training = parser.add_argument_group("training", text)
    training.add_argument("--train", action="store_true", help="plan training instead of a server")
    training.add_argument("--context", type=count, default=8192, help="tokens of a sample (default: 8192)")
    help_text = "tokens of a step, whole samples (default: 16777216)"
    training.add_argument("--batch-tokens", type=count, default=2**24, help=help_text)
    help_text = (
        "sizes of its axes, as pp=4,cp=2,ep=8; what is left out is 1, dp and edp what remains (default: find one)"
    )
    training.add_argument("--mesh", default="find", help=help_text)
    parser.set_defaults(default_of=parser.get_default)


def _plan(arguments: argparse.Namespace) -> int:
    _check(arguments)
    return _plan_training(arguments) if arguments.train else _plan_serving(arguments)


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.share <= 1:
        raise UserError(f"--share must be above 0 and at most 1, got {arguments.share}")
    if arguments.machine is None and arguments.train:
        raise UserError("the following arguments are required with --train: --machine")
    if arguments.machine is None and arguments.memory is None:
        raise UserError("the following arguments are required: --memory, or --machine")
    for name in SERVING if arguments.train else TRAINING:
        if getattr(arguments, name) != arguments.default_of(name):
            where = "of serving: leave it out with --train" if arguments.train else "of training: it needs --train"
            raise UserError(f"--{name.replace('_', '-')} is {where}")


def _machine(arguments: argparse.Namespace):
    from fulmen.parallel.plan import read_machine

    machine = read_machine(arguments.machine)
    return machine if arguments.memory is None else dataclasses.replace(machine, memory=arguments.memory * GB)


def _plan_serving(arguments: argparse.Namespace) -> int:
    from fulmen.parallel.plan import Serving
    from fulmen.serve import plan_memory

    config, devices, dtype = model_config(arguments.model), arguments.devices, arguments.dtype
    machine = _machine(arguments) if arguments.machine else None
    # First, as it may refuse.
    spread = machine and Serving(model=config, machine=machine, devices=devices, dtype=dtype)
    memory = machine.memory / GB if machine else arguments.memory
    settings = engine_settings(arguments)
    plan = plan_memory(
        config,
        settings,
        budget=round(devices * memory * arguments.share * GB),
        weights=config.weight_bytes(dtype),
        number_bytes=4 if dtype == "float32" else 2,
        is_int8=dtype == "int8",
        device="cuda",
    )
    print(f"{devices} x {memory:g} GB, of which {arguments.share:.0%}; {dtype} weights")
    print(plan.table())
    if spread:
        chunk = settings.on("cuda").chunk_tokens
        print(f"\n{spread.table(context=plan.max_context, sequences=plan.slots, chunk=chunk)}")
    return 0


def _plan_training(arguments: argparse.Namespace) -> int:
    from fulmen.model import ModelConfig
    from fulmen.parallel.plan import Job, find_plan

    config = model_config(arguments.model)
    if not isinstance(config, ModelConfig):
        print("of the text model alone: what sees images is left out")
        config = config.text
    job = Job(config=config, context=arguments.context, batch=arguments.batch_tokens)
    sizes = None if arguments.mesh == "find" else _sizes(arguments.mesh)
    found = find_plan(job, _machine(arguments), arguments.devices, sizes=sizes, share=arguments.share)
    if sizes is None and found.refusal:
        raise UserError(found.refusal)
    print(found.table())
    return 0


def _sizes(text: str):
    """The axes of "pp=4,cp=2"."""
    from fulmen.parallel import MeshSizes

    sizes = {}
    names = [field.name for field in dataclasses.fields(MeshSizes)]
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in names or not number.isdecimal():
            raise UserError(f"--mesh is find, or sizes of {', '.join(names)} as pp=4,cp=2; got {part!r:.100}")
        sizes[name] = int(number)
    return MeshSizes(**sizes)
