"""The files from which transformers makes a vision-language model's input: its image processor, processor and chat.

transformers cuts pictures by the rules of `ImageProcessor`, but for one rounding (docs/checkpoint.md).
"""

from pathlib import Path
from typing import Any

from fulmen.checkpoint.folder import write_json
from fulmen.checkpoint.keys import read_json
from fulmen.checkpoint.vision_config import FIXED, pinpoints
from fulmen.data import Tokenizer
from fulmen.data.images import MEAN, STD
from fulmen.data.tokenizer import IMAGE
from fulmen.model import VisionConfig, VisionLanguageConfig

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

PROCESSOR = "LlavaNextProcessor"
BICUBIC = 3  # Pillow's number


def write_processor(config: VisionLanguageConfig, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write into the draft `folder` of a checkpoint, its tokenizer's files in it, what `AutoProcessor` reads.

    Nothing is written for a tokenizer whose `<image>` is another token than the model's: transformers would put images
    where the model does not look for them.
    """
    if tokenizer is not None and tokenizer.image_id != config.image_token:
        return
    write_json(folder / PREPROCESSOR_FILE, preprocessor_keys(config.vision))
    write_json(folder / PROCESSOR_FILE, processor_keys(config.vision))
    # transformers' processors do not look for a template among the tokenizer's keys.
    if tokenizer is not None and (template := read_json(folder / "tokenizer_config.json").get("chat_template")):
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def preprocessor_keys(config: VisionConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json: how a picture becomes crops [N, 3, image_size, image_size]."""
    size = config.image_size
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_pad": True,
        "image_grid_pinpoints": pinpoints(config),
    }


def processor_keys(config: VisionConfig) -> dict[str, Any]:
    """The content of processor_config.json: how many `<image>` tokens a picture takes."""
    return {
        "processor_class": PROCESSOR,
        "image_token": IMAGE,
        "patch_size": config.patch_size,
        "vision_feature_select_strategy": FIXED["vision_feature_select_strategy"],
        # The class token, which that strategy takes away again.
        "num_additional_image_tokens": 1,
    }
