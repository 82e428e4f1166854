"""The tensors of an engine: model, pages and states, and the steps that a scheduler decides on."""

from collections.abc import Sequence as List

import torch
from torch import Tensor

from fulmen.model import LanguageModel, VisionLanguageModel
from fulmen.model.pool import CachePool, PoolBatch
from fulmen.serve.features import ImageFeatures
from fulmen.serve.plan import MemoryPlan
from fulmen.serve.scheduler import Sequence, Step


class Runner:
    """Computes what it is told to; decides nothing."""

    def __init__(self, model: LanguageModel | VisionLanguageModel, plan: MemoryPlan):
        self.images = ImageFeatures(model.eval()) if isinstance(model, VisionLanguageModel) else None
        self.model = model if self.images is None else model.language_model
        weight = self.model.embed_tokens.weight
        self.device = weight.device
        # Snapshot n lies behind the slots, as one more.
        self._first_snapshot = plan.slots
        self.pool = CachePool(
            self.model.config,
            slots=plan.slots + plan.snapshots,
            pages=plan.pages,
            page_size=plan.page_size,
            device=self.device,
            dtype=weight.dtype,
        )

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[list[Sequence], Tensor]:
        """The sequences that want a token, and their logits [N, V] fp32; states and pages are advanced."""
        self._copy_before(step)
        sequences, hidden = [], []
        if step.prompts:
            hidden.append(self._prompts(step))
            sequences += [chunk.sequence for chunk in step.prompts if chunk.is_last]
        if step.decoding:
            hidden.append(self._advance(step.decoding, [1] * len(step.decoding)))
            sequences += step.decoding
        taken = [(chunk.sequence.slot, chunk.snapshot) for chunk in step.prompts if chunk.snapshot is not None]
        self._copy_states([slot for slot, _ in taken], [self._first_snapshot + snapshot for _, snapshot in taken])
        if not hidden:
            return [], torch.empty(0, self.model.config.vocab_size, device=self.device)
        logits = self.model.logits(torch.cat(hidden))
        if self.images is not None:
            logits[:, self.images.model.config.image_token] = -torch.inf  # it would stand for no image
        return sequences, logits

    def _copy_before(self, step: Step) -> None:
        first = self._first_snapshot
        self._copy_states(list(step.saved.values()), [first + snapshot for snapshot in step.saved])
        self._copy_states([first + snapshot for snapshot in step.restored.values()], list(step.restored))
        if step.copied:
            self.pool.copy_pages(list(step.copied.values()), list(step.copied))

    def _copy_states(self, sources: list[int], targets: list[int]) -> None:
        if sources:
            self.pool.copy_states(sources, targets)

    def _prompts(self, step: Step) -> Tensor:
        """Hidden [N, hidden] after the prompts that end in this step."""
        lengths = [chunk.length for chunk in step.prompts]
        hidden = self._advance([chunk.sequence for chunk in step.prompts], lengths)
        ends = torch.tensor(lengths).cumsum(0) - 1
        wanted = ends[torch.tensor([chunk.is_last for chunk in step.prompts])]
        return hidden[wanted.to(hidden.device)]

    def _advance(self, sequences: List[Sequence], lengths: list[int]) -> Tensor:
        """Hidden [T, hidden] of the next tokens of each sequence, laid end to end."""
        tokens: list[int] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            tokens += sequence.tokens[sequence.computed : sequence.computed + length]
        batch = PoolBatch(
            self.pool,
            slots=[sequence.slot for sequence in sequences],
            tables=[sequence.pages for sequence in sequences],
            starts=[sequence.computed for sequence in sequences],
            lengths=lengths,
        )
        inserted = None
        if self.images is not None:
            inserted = self.images.insert(sequences, lengths)
            tokens = [max(token, 0) for token in tokens]  # an image's are negative, and are not looked up
        hidden, _ = self.model.hidden(torch.tensor([tokens], device=self.device), cache=batch, inserted=inserted)
        return hidden[0]
