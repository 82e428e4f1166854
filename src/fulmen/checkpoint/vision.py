"""An image encoder as a folder that `transformers` reads as CLIPVisionModel, and a whole CoCa around it.

The folder of a CoCa is that of its encoder, with the rest of the model and its tokenizer in files beside.
"""

import dataclasses
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fulmen.checkpoint.config import CONFIG_FILE
from fulmen.checkpoint.folder import replaced_folder, write_json
from fulmen.checkpoint.keys import integer, number, read_json, refuse_unknown
from fulmen.checkpoint.names import UNUSED
from fulmen.checkpoint.reader import SINGLE_FILE, check_entries, find_shards, open_shard, read_headers
from fulmen.checkpoint.vision_config import ENCODER_FIXED, vision_from_keys, vision_keys
from fulmen.checkpoint.writer import METADATA
from fulmen.config import UserError
from fulmen.data import Tokenizer
from fulmen.model import VisionConfig, VisionEncoder
from fulmen.model.coca import CoCa, CoCaConfig

COCA_CONFIG, COCA_FILE = "coca.json", "coca.safetensors"
PREFIX = "vision_model."
"""What the names of an encoder's tensors begin with in its own folder."""
OWN_FIELDS = tuple(field.name for field in dataclasses.fields(CoCaConfig) if field.name != "vision")
"""What `COCA_CONFIG` holds."""


def save_encoder(encoder: VisionEncoder, path: str | Path) -> None:
    """Write an encoder, in the dtype that it has, as a folder `path`; one that is there is replaced.

    Raises UserError if `path` holds something else than a checkpoint, or the disk refuses.
    """
    with replaced_folder(Path(path)) as draft:
        _write_encoder(encoder, draft)


def load_encoder(path: str | Path, device: str | torch.device = "cpu") -> VisionEncoder:
    """The encoder in a folder of `save_encoder`, `save_coca` or a CLIPVisionModel with exact GELU; fp32, eval mode.

    The norm that a CLIP has behind its last layer is passed over. Raises UserError for a file that is missing, cut
    short or not safetensors, other tensors than the configuration asks for, and another kind of model.
    """
    folder = Path(path)
    with torch.device("meta"):
        encoder = VisionEncoder(load_encoder_config(folder))
    encoder.to_empty(device="cpu")
    places = {PREFIX + name: tensor for name, tensor in encoder.state_dict().items()}
    _fill(places, find_shards(folder), ignored={PREFIX + name for name in UNUSED})
    return encoder.to(device).eval()


def save_coca(coca: CoCa, path: str | Path, tokenizer: Tokenizer) -> None:
    """Write a CoCa with the tokenizer of its captions as a folder `path`, which is also that of its encoder.

    Raises UserError as `save_encoder` does.
    """
    with replaced_folder(Path(path)) as draft:
        _write_encoder(coca.encoder, draft)
        write_json(draft / COCA_CONFIG, {name: getattr(coca.config, name) for name in OWN_FIELDS})
        _write_tensors(_own_tensors(coca), draft / COCA_FILE)
        tokenizer.save(draft)


def load_coca(path: str | Path, device: str | torch.device = "cpu") -> tuple[CoCa, Tokenizer]:
    """What `save_coca` wrote, in fp32 and eval mode. Raises UserError as `load_encoder` does."""
    folder = Path(path)
    for name in (COCA_CONFIG, COCA_FILE):
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}, so it is no CoCa: name the checkpoint of a run of the task coca")
    encoder = load_encoder(folder)
    with torch.device("meta"):
        coca = CoCa(_coca_config(folder / COCA_CONFIG, encoder.config))
    coca.to_empty(device="cpu").encoder = encoder
    _fill(_own_tensors(coca), {folder / COCA_FILE: set()})
    return coca.to(device).eval(), Tokenizer.load(folder)


def load_encoder_config(path: str | Path) -> VisionConfig:
    """The sizes of the encoder that `load_encoder` reads. Raises UserError for another kind of model."""
    file = Path(path) / CONFIG_FILE
    raw = read_json(file)
    kind = ENCODER_FIXED["model_type"]
    if raw.get("model_type") != kind:
        raise UserError(f"{file} is of a model of type {raw.get('model_type')!r}; an encoder's is {kind!r}")
    try:
        return vision_from_keys(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _coca_config(file: Path, vision: VisionConfig) -> CoCaConfig:
    raw = read_json(file)
    try:
        refuse_unknown(raw, set(OWN_FIELDS))
        counts = {name: integer(raw, (name,)) for name in OWN_FIELDS if name != "norm_eps"}
        return CoCaConfig(vision=vision, norm_eps=number(raw, ("norm_eps",)), **counts)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _own_tensors(coca: CoCa) -> dict[str, Tensor]:
    """All but the encoder's, which are in the folder's main file."""
    return {name: tensor for name, tensor in coca.state_dict().items() if not name.startswith("encoder.")}


@torch.no_grad()
def _fill(places: Mapping[str, Tensor], shards: Mapping[Path, set[str]], ignored: Collection[str] = ()) -> None:
    """Copy the tensors of a folder's files to the places of their names."""
    shapes = {name: tuple(place.shape) for name, place in places.items()}
    check_entries(next(iter(shards)).parent, read_headers(shards), shapes, ignored)
    for shard in shards:
        with open_shard(shard) as file:
            for name in places.keys() & file.keys():
                places[name].copy_(file.get_tensor(name))


def _write_encoder(encoder: VisionEncoder, folder: Path) -> None:
    dtype = str(encoder.pre_layrnorm.weight.dtype).removeprefix("torch.")
    keys = vision_keys(encoder.config) | {"architectures": ["CLIPVisionModel"], "dtype": dtype}
    write_json(folder / CONFIG_FILE, keys)
    _write_tensors({PREFIX + name: tensor for name, tensor in encoder.state_dict().items()}, folder / SINGLE_FILE)


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, METADATA)
    # The library gives its files to the owner alone.
    shutil.copymode(file.with_name(CONFIG_FILE), file)
