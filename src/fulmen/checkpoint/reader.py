"""Published checkpoints into a model: tensor by tensor, never a second copy, never a pickle."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fulmen.checkpoint.config import load_config
from fulmen.checkpoint.keys import read_json
from fulmen.checkpoint.names import TEXT, Model, Piece, ignored_names, published_pieces, stacked_pieces, text_model
from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig, VisionLanguageModel
from fulmen.model.int8 import NAMES, allocate_int8, int8_matrices, rest_dtype
from fulmen.ops.int8 import quantize_rows

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Entry(NamedTuple):
    """A tensor that a file holds, by the file's own header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The text or vision-language model in the checkpoint folder `path`, in either dialect, in eval mode.

    The headers of all files are checked before the first tensor is read. Files are mapped into memory, and each tensor
    is copied from there straight to its place on `device` in `dtype`: the model is held once, and the map of one shard
    at a time is cache that the kernel may take back. Decay rates stay fp32. With torch.int8 each tensor of projections
    and experts is rounded on its way (see `fulmen.ops.int8`); the rest is fp32 on a CPU and bf16 on a GPU.

    Raises:
        UserError: a file is missing, cut short or not safetensors; a tensor is missing, unexpected, of another shape or
            quantised; the configuration is refused (`load_config`); there are only pickled weights; a weight that int8
            is wanted of is not finite.
    """
    folder = Path(path)
    model, shards, entries = _described(folder)
    pieces = _match(folder, entries, model)
    _allocate(model, device, dtype)
    scales = {name: getattr(module, NAMES[matrix]) for name, (module, matrix) in int8_matrices(model).items()}
    parameters = dict(model.named_parameters())
    for shard in shards:
        with open_shard(shard) as file, torch.no_grad():
            for name in file.offset_keys():
                if name in pieces:
                    parameter, index = pieces[name].parameter, pieces[name].index
                    _put(parameters[parameter][index], scales.get(parameter), index, file.get_tensor(name), name)
    # Only the decay rates are left to move.
    return model.to(device).eval()


def open_model(path: str | Path) -> Model:
    """The same model in fp32, its text model on the meta device, for whoever holds no more than a part of it at once.

    `init_part(part)` of the text model reads what the checkpoint has of one of its `parts`, whose parameters are there
    by then, where it would draw them. Raises UserError as `load_model`.
    """
    folder = Path(path)
    model, _, entries = _described(folder)
    pieces = _match(folder, entries, model)
    text = text_model(model)

    def read(parameters: Iterable[nn.Parameter]) -> None:
        asked = {id(parameter) for parameter in parameters}
        places = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in asked}
        names = [name for name, piece in pieces.items() if piece.parameter in places]
        for shard in {entries[name].file for name in names}:
            with open_shard(shard) as file, torch.no_grad():
                for name in (name for name in names if entries[name].file == shard):
                    places[pieces[name].parameter][pieces[name].index].copy_(file.get_tensor(name))

    text.init_part = lambda part: read(part.parameters())
    if text is not model:
        # All else is small.
        for name, module in model.named_modules():
            if not f"{name}.".startswith(TEXT):
                allocate_own(module, "cpu", torch.float32)
        read(parameter for parameter in model.parameters() if not parameter.is_meta)
    return model


def _described(folder: Path) -> tuple[Model, dict[Path, set[str]], dict[str, Entry]]:
    """The model on the meta device; the files of its checkpoint, and what these say they hold."""
    config = load_config(folder)
    with torch.device("meta"):
        model = LanguageModel(config) if isinstance(config, ModelConfig) else VisionLanguageModel(config)
    shards = find_shards(folder)
    return model, shards, read_headers(shards)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or `checkpoint` inside a training run's folder."""
    path = Path(path)
    inside = path / "checkpoint"
    if not (path / "config.json").exists() and inside.is_dir():
        return inside
    if (path / "recipe.toml").exists():
        raise UserError(f"{path} is a training run that has not ended: go on with --resume first")
    return path


def find_shards(folder: Path) -> dict[Path, set[str]]:
    """The files with tensors, and the names that the index says each holds (none for a single file)."""
    if (folder / SINGLE_FILE).exists():
        return {folder / SINGLE_FILE: set()}
    if not (folder / INDEX_FILE).exists():
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} holds pickled weights ({pickles[0]}), which can run code and are never opened: "
                "convert them to safetensors"
            )
        raise UserError(f"there is neither {SINGLE_FILE} nor {INDEX_FILE} in {folder}: get the weights again")
    shards: dict[Path, set[str]] = {}
    for name, file in _weight_map(folder / INDEX_FILE).items():
        shards.setdefault(folder / file, set()).add(name)
    return shards


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: get it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} says that {name} is in {file!r}, which is not the name of a file: get it again")
    return weight_map


def read_headers(shards: Mapping[Path, set[str]]) -> dict[str, Entry]:
    """All tensors of all shards by name."""
    entries: dict[str, Entry] = {}
    for shard, promised in shards.items():
        with open_shard(shard) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in entries:
                    raise UserError(f"{name} is both in {entries[name].file} and in {shard}: keep one of them")
                header = file.get_slice(name)
                entries[name] = Entry(shard, tuple(header.get_shape()), header.get_dtype())
        if lacking := sorted(promised - entries.keys()):
            raise UserError(f"{shard} lacks {_listed(lacking)}, which {INDEX_FILE} says it holds: get both again")
    return entries


@contextmanager
def open_shard(shard: Path) -> Iterator[Any]:
    """A safetensors file, opened; raises UserError, naming it, if that or reading it fails."""
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{shard} is missing, although {INDEX_FILE} names it: get it again") from None
    except SafetensorError as error:
        raise UserError(f"{shard} is cut short or not safetensors ({error}): get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from None


def _match(folder: Path, entries: Mapping[str, Entry], model: Model) -> dict[str, Piece]:
    """Where each tensor of the files goes, by name; raises UserError unless they are exactly the model's."""
    layouts = ({piece.name: piece for piece in pieces(model)} for pieces in (published_pieces, stacked_pieces))
    expected = max(layouts, key=lambda layout: len(layout.keys() & entries.keys()))
    check_entries(folder, entries, {name: piece.shape for name, piece in expected.items()}, ignored_names(model))
    return expected


def check_entries(
    folder: Path, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()
) -> None:
    """Raise UserError unless a folder's tensors are exactly those of `shapes`, but for `ignored`, and can be read."""
    if missing := sorted(shapes.keys() - entries.keys()):
        raise UserError(f"{folder}: {len(missing)} of {len(shapes)} tensors are missing: {_listed(missing)}")
    if extra := sorted(entries.keys() - shapes.keys() - set(ignored)):
        raise UserError(f"{entries[extra[0]].file}: {len(extra)} tensors are not of this model: {_listed(extra)}")
    for name, expected in shapes.items():
        file, shape, dtype = entries[name]
        if shape != expected:
            raise UserError(f"{file}: {name} should have the shape {list(expected)}, found {list(shape)}")
        if dtype not in READABLE_DTYPES:
            raise UserError(f"{file}: {name} is stored as {dtype}; quantised weights are not supported")


def _put(place: Tensor, scales: Tensor | None, index: tuple[int | slice, ...], tensor: Tensor, name: str) -> None:
    """Copy a tensor of a file to its place, or its int8 numbers there and the scales of their rows to scales[index]."""
    if scales is None:
        place.copy_(tensor)
        return
    try:
        rounded = quantize_rows(tensor.to(place.device))
    except ValueError as error:
        raise UserError(f"{name} cannot be int8: {error}; load the checkpoint in another dtype") from None
    place.copy_(rounded.numbers)
    scales[index].copy_(rounded.scales)


def _allocate(model: Model, device: str | torch.device, dtype: torch.dtype) -> None:
    """Put parameters with undefined content in the place of the meta device's."""
    if dtype == torch.int8:
        dtype = rest_dtype(device)
        for module, matrix in int8_matrices(model).values():
            allocate_int8(module, matrix, device)
        model.requires_grad_(False)
    for module in model.modules():
        allocate_own(module, device, dtype)


def allocate_own(module: nn.Module, device: str | torch.device, dtype: torch.dtype | None = None) -> None:
    """Give a module's own parameters, where they are on the meta device, memory, unfilled; dtype None: their own."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            new = torch.empty_like(parameter, device=device, dtype=dtype)
            setattr(module, name, nn.Parameter(new, requires_grad=parameter.requires_grad))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
