"""Models that see, over ranks: the losses and weights of one process, with images over borders and rows without any."""

import math

import pytest
import torch
from PIL import Image
from tests.parallel.ranks import run_ranks

from fulmen.data import Batch, Document, PackedLoader, Tokenizer
from fulmen.data.images import PlacedImage
from fulmen.model import ModelConfig, VisionConfig, VisionLanguageConfig, VisionLanguageModel
from fulmen.parallel import Cut, Mesh, MeshSizes, SharedError, World
from fulmen.parallel.gather import GatheredWeights
from fulmen.train import Trainer, TrainRecipe
from fulmen.train.freezing import freeze
from fulmen.train.language import LanguageObjective
from fulmen.train.recipe import OptimizerSection, TokenScheduleSection, TrainSection

IMAGE_TOKEN = 9
CONFIG = VisionLanguageConfig(
    text=ModelConfig(
        vocab_size=48,
        hidden_size=32,
        num_layers=2,
        layer_plan="LS",
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=4,
        expert_size=16,
        max_positions=128,
    ),
    vision=VisionConfig(image_size=28, patch_size=14, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32),
    image_token=IMAGE_TOKEN,
)
STEPS = 4
PICTURES = ((28, 28), (28, 80), (56, 28))


def a_row(random, sizes):
    """Samples with an image each, of no image for None."""
    processor, tokens, images, borders = CONFIG.vision.processor(dynamic=True), [], [], [0]
    for size in sizes:
        tokens += torch.randint(10, 48, (6,), generator=random).tolist()
        if size is not None:
            image = processor.process(Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20).convert("RGB"))
            images.append(PlacedImage(image, len(tokens), 0, image.positions))
            tokens += [IMAGE_TOKEN] * image.positions
        tokens += torch.randint(10, 48, (4,), generator=random).tolist()
        borders.append(len(tokens))
    tokens = torch.tensor([tokens])
    targets = tokens.roll(-1, 1).masked_fill(tokens.roll(-1, 1) == IMAGE_TOKEN, -100)
    return Batch(tokens, targets, torch.tensor(borders, dtype=torch.int32), tuple(images))


class Rows(LanguageObjective):
    """Four rows a step, all as long."""

    def next_batches(self, seen):
        random = torch.Generator().manual_seed(seen)
        row = a_row(random, PICTURES)
        text = a_row(random, [None] * -(-row.tokens.shape[1] // 10))
        cut = row.tokens.shape[1]
        borders = torch.cat([text.cu_seqlens[text.cu_seqlens < cut], torch.tensor([cut], dtype=torch.int32)])
        text = Batch(text.tokens[:, :cut], text.targets[:, :cut], borders)
        return [row, text, a_row(random, PICTURES), a_row(random, PICTURES[::-1])]

    def _fewest_rows(self):
        return 4


def trained(sizes, frozen):
    torch.manual_seed(0)
    model = VisionLanguageModel(CONFIG)
    freeze(model, frozen)
    recipe = TrainRecipe(
        optimizer=OptimizerSection(learning_rate=1e-2),
        schedule=TokenScheduleSection(steps=100, warmup=1),
        train=TrainSection(precision="float32", capacity_factor=0.0),
    )
    tokenizer, world = Tokenizer.train(["no text"], 264), None if sizes is None else World(Mesh(sizes, "cpu"))
    loader = PackedLoader([Document("no text", "")] * 2, tokenizer, seed=0, batch_tokens=8, sequence_length=8)
    objective = Rows(model, loader, tokenizer, recipe, torch.device("cpu"), world=world)
    if world is not None:
        world.shard(model)
    trainer = Trainer(objective, recipe, torch.device("cpu"), world)
    losses = [trainer.train_step()["loss"] for _ in range(STEPS)]
    # Without gradients too, where each rank has another number of crops.
    with torch.no_grad():
        parts = objective._run(objective.next_batches(99), objective._loss, None)
    losses += trainer.world.sum(sum(counts * part.nll.item() for part, counts in parts))
    return losses, weights_of(model, sizes)


def weights_of(model, sizes):
    if sizes is None:
        return {name: p.detach() for name, p in model.named_parameters()}
    gathered = GatheredWeights(model, Mesh(sizes, "cpu"))
    return {name: gathered.take(name) for name, _ in gathered.described.named_parameters()}


@pytest.fixture(scope="module", params=[(), ("language_model",)], ids=["all", "encoder and projector"])
def alone(request):
    return request.param, *trained(None, request.param)


@pytest.mark.parametrize(
    "sizes",
    [{"dp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 4, "ep": 2, "etp": 2}, {"pp": 2, "cp": 2, "ep": 2}],
    ids=str,
)
def test_training_over_ranks_is_training(alone, sizes):
    frozen, losses, weights = alone
    if frozen and "pp" in sizes:
        sizes = {name: size for name, size in sizes.items() if name != "pp"} | {"dp": 2}
    world = math.prod(size for name, size in sizes.items() if name in ("pp", "dp", "cp", "tp"))
    found = run_ranks(world, trained, MeshSizes(**sizes), frozen)
    for found_losses, _ in found:
        torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        if name.endswith("k_proj.bias"):
            continue  # softmax takes no notice of it: its gradient is rounding, which AdamW makes as large as any
        torch.testing.assert_close(found[0][1][name], weight, rtol=1e-4, atol=1e-4, msg=name)


def refused(sizes):
    with pytest.raises(SharedError, match=r"train.freeze leaves a stage of the pipeline nothing to train"):
        trained(sizes, ("language_model",))
    return True


def test_a_stage_without_anything_to_train_is_refused():
    assert all(run_ranks(2, refused, MeshSizes(pp=2)))


def test_images_are_cut_where_rows_are():
    row = a_row(torch.Generator().manual_seed(0), PICTURES)
    for balanced in (False, True):
        cut, seen = Cut(tuple(row.cu_seqlens.tolist()), 3, balanced), 0
        for rank in range(3):
            tokens = cut.take(row.tokens, rank)
            marked = torch.zeros_like(tokens, dtype=torch.bool)
            for placed in cut.take_images(row.images, rank):
                marked[0, placed.start : placed.start + placed.count] = True
                seen += placed.count
            assert torch.equal(marked, tokens == IMAGE_TOKEN)
        assert seen == int((row.tokens == IMAGE_TOKEN).sum())
