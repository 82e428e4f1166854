"""Many prompts at once through one model: requests go in, pieces of their answers come out, step by step."""

import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fulmen.checkpoint import find_checkpoint, load_config, load_generation_config, load_model
from fulmen.config import UserError
from fulmen.data import Tokenizer, encode_chat, images_of
from fulmen.model import LanguageModel, VisionLanguageModel
from fulmen.model.graph import BUCKETS
from fulmen.run import Progress
from fulmen.serve import scheduler as policy
from fulmen.serve.memory import plan_for_config, plan_for_model
from fulmen.serve.plan import EngineSettings, MemoryPlan
from fulmen.serve.prompt import Prompt
from fulmen.serve.runner import Runner
from fulmen.serve.sampling import Draw, Drawn, SamplingParams, sample
from fulmen.serve.structure import Grammars
from fulmen.serve.text import TextStream
from fulmen.serve.types import Completion, Piece

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Answer:
    """One of a request's n answers."""

    request: "_Request"
    index: int
    sequence: policy.Sequence
    draw: Draw
    text: TextStream


@dataclass(eq=False)
class _Request:
    number: int
    prompt: Prompt
    params: SamplingParams
    limit: int  # tokens of prompt and answer
    answers: dict[int, _Answer] = field(default_factory=dict)  # those that are being made
    ended: set[int] = field(default_factory=set)


class Engine:
    """A model, its memory, and the requests that it works on. Not for several threads: `service.py` is."""

    def __init__(
        self,
        model: LanguageModel | VisionLanguageModel,
        tokenizer: Tokenizer,
        settings: EngineSettings | None = None,
        *,
        eos_ids: Iterable[int] | None = None,
        plan: MemoryPlan | None = None,
    ):
        """The model's device gets pages and states: as many as `plan` says, None: as `settings` and its memory allow.

        Raises UserError if that is too little.
        """
        sees = isinstance(model, VisionLanguageModel)
        self.model = model.language_model if sees else model
        self.image_token = model.config.image_token if sees else None
        self.image_processor = model.config.vision.processor() if sees else None
        if sees and tokenizer.image_id != self.image_token:
            raise UserError(
                f"<image> is token {tokenizer.image_id} of the tokenizer and {self.image_token} of the model: take the "
                "tokenizer that the model was trained with"
            )
        self.settings = (settings or EngineSettings()).on(self.model.embed_tokens.weight.device.type)
        self.plan = plan or plan_for_model(model, self.settings)
        self.tokenizer = tokenizer
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.eos_ids = frozenset(own if eos_ids is None else eos_ids)
        self.runner = Runner(model, self.plan)
        self.scheduler = self._new_scheduler()
        self._grammars = Grammars(tokenizer)
        self._requests: dict[int, _Request] = {}
        self._answers: dict[policy.Sequence, _Answer] = {}
        self._numbers = itertools.count(1)

    @classmethod
    def load(
        cls,
        path: str | Path,
        settings: EngineSettings | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        show_plan: Callable[[MemoryPlan], None] | None = None,
    ) -> "Engine":
        """From a checkpoint's folder, or a training run's, which has one in `checkpoint`.

        `show_plan` is given the division of memory before the weights are read, which an impossible one prevents.
        """
        path, settings = find_checkpoint(path), settings or EngineSettings()
        plan = plan_for_config(load_config(path), settings, device=device, dtype=dtype)
        if show_plan is not None:
            show_plan(plan)
        tokenizer, eos_ids = Tokenizer.load(path), load_generation_config(path).eos_ids
        return cls(load_model(path, device=device, dtype=dtype), tokenizer, settings, eos_ids=eos_ids)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def warm_up(self) -> None:
        """Compute what the first requests would otherwise wait for; nothing must be under way, and no trace is left.

        Kernels are compiled, or chosen, when they are first used, and steps recorded: on a GPU this takes a while.
        """
        assert not self.has_work, "requests are under way"
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        longest = max(1, self.plan.max_context - params.max_tokens)
        tokens = itertools.cycle(t for t in range(self.model.config.vocab_size) if t != self.image_token)
        for lengths in _first_lengths(self.runner.device.type, self.plan.slots, self.settings.chunk_tokens):
            prompts = [[next(tokens)] * min(length, longest) for length in lengths]
            for _ in ("anew", "out of the prefix cache"):
                self.generate(prompts, params)
        if self.image_processor is not None:
            size = self.image_processor.crop_size
            prompt = self.with_images([self.image_token], [Image.new("RGB", (size, size))])
            if len(prompt) <= longest:
                self.generate([prompt], params)
        self.scheduler = self._new_scheduler()

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens as a document begins in training: the beginning-of-sentence token, then the text."""
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return start + self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """A conversation's prompt, with the images in its messages (see `fulmen.data.encode_chat`).

        Raises UserError for what is no conversation or no image, and for images where the model takes none.
        """
        return self.with_images(encode_chat(self.tokenizer, messages), images_of(messages))

    def with_images(self, tokens: list[int], sources: Sequence[Any]) -> Prompt:
        """Tokens with one image token for each of the images that are read from `sources`."""
        if not sources:
            return Prompt(tokens)
        if self.image_processor is None:
            raise UserError("this model takes no images")
        images = [self.image_processor.read(source) for source in sources]
        return Prompt.with_images(tokens, images, self.image_token)

    def check(self, prompt: Prompt | Sequence[int], params: SamplingParams) -> int:
        """Tokens that an answer may have; raises UserError for what can never be served."""
        prompt = Prompt.of(prompt)
        room = self.plan.max_context - len(prompt)
        if not len(prompt):
            raise UserError("the prompt is empty")
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; {self.plan.max_context} is the longest context here, of which "
                "the answer needs at least one"
            )
        size = self.model.config.vocab_size
        if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < size:
            raise UserError(f"the prompt has a token that is not in 0 to {size - 1}, the model's")
        self._check_images(prompt)
        params.check_vocabulary(size)
        if params.structure is not None:
            self._grammars.matcher(params.structure, self.eos_ids)
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _check_images(self, prompt: Prompt) -> None:
        if self.image_token is None:
            if prompt.images:
                raise UserError("this model takes no images")
            return
        marked = prompt.tokens.count(self.image_token)
        if marked != sum(placed.count for placed in prompt.images):
            raise UserError(f"the prompt has {marked} image tokens that stand for no image")

    def submit(self, prompt: Prompt | Sequence[int], params: SamplingParams, *, request: int | None = None) -> int:
        """Let a request wait for its turn; gives back its number. Raises UserError like `check`."""
        prompt = Prompt.of(prompt)
        limit = len(prompt) + self.check(prompt, params)
        number = next(self._numbers) if request is None else request
        self._requests[number] = asked = _Request(number, prompt, params, limit)
        self._begin(asked, 0)
        return number

    def abort(self, request: int) -> None:
        """Forget a request and free what it holds at once. Nothing happens if it has ended."""
        asked = self._requests.pop(request, None)
        for answer in asked.answers.values() if asked else ():
            self.scheduler.abort(answer.sequence)
            self._forget(answer.sequence)

    def step(self) -> list[tuple[int, Piece]]:
        """Compute one step; gives back what came out of it, with the requests' numbers.

        If it fails, all that was running ends with the reason "error" and the engine is as new; an interrupt is passed
        on.
        """
        try:
            return self._step()
        except Exception as error:
            LOG.exception("a step has failed")
            ended = [
                (request.number, _failure(request, index, f"the engine has failed: {error}"))
                for request in self._requests.values()
                for index in range(request.params.n)
                if index not in request.ended
            ]
            self._start_over()
            return ended
        except BaseException:
            self._start_over()
            raise

    def stream(self, prompt: Prompt | Sequence[int], params: SamplingParams) -> Iterator[Piece]:
        """The pieces of one request's answers; leaving it early aborts the request. Raises UserError at once."""
        return self._stream(self.submit(prompt, params), params.n)

    def generate(
        self, prompts: Sequence[str | Prompt | Sequence[int]], params: SamplingParams, *, progress: bool = False
    ) -> list[Completion]:
        """All answers to all prompts (text, token ids, or with images), in their order; `progress` shows how far it is.

        Raises UserError before anything is computed if one of them can never be served.
        """
        ids = [Prompt.of(self.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in prompts]
        for prompt in ids:
            self.check(prompt, params)
        completions = {self.submit(prompt, params): Completion.of(prompt.tokens, params.n) for prompt in ids}
        try:
            with Progress("generate", len(ids), file=sys.stderr) if progress else nullcontext() as bar:
                while self.has_work:
                    for number, piece in self.step():
                        completions[number].add(piece)
                        if bar is not None and completions[number].is_whole:
                            bar.advance()
        finally:
            for number in completions:
                self.abort(number)
        return list(completions.values())

    def _stream(self, number: int, count: int) -> Iterator[Piece]:
        try:
            while count:
                for request, piece in self.step():
                    if request == number:
                        if piece.reason == "error":
                            raise UserError(piece.error)
                        count -= piece.reason is not None
                        yield piece
        finally:
            self.abort(number)

    def _begin(self, request: _Request, index: int) -> None:
        sequence = policy.Sequence(tokens=request.prompt.keys(), prompt_length=len(request.prompt))
        if self.runner.images is not None:
            self.runner.images.add(sequence, request.prompt.images)
        matcher = None
        if request.params.structure is not None:
            matcher = self._grammars.matcher(request.params.structure, self.eos_ids)
        draw = Draw(request.params, request.prompt.tokens, index=index, matcher=matcher)
        answer = _Answer(request, index, sequence, draw, TextStream(self.tokenizer, request.params, self.eos_ids))
        request.answers[index] = self._answers[sequence] = answer
        self.scheduler.add(sequence)

    def _step(self) -> list[tuple[int, Piece]]:
        step = self.scheduler.schedule()
        sequences, logits = self.runner.run(step)
        self.scheduler.finish_step(step)
        if self.runner.images is not None:
            self.runner.images.release()
        if not sequences:
            return []
        answers = [self._answers[sequence] for sequence in sequences]
        drawn = sample(logits, [answer.draw for answer in answers])
        return [
            (answer.request.number, piece)
            for answer, token in zip(answers, drawn, strict=True)
            for piece in self._draw(answer, token)
        ]

    def _draw(self, answer: _Answer, drawn: Drawn) -> Iterator[Piece]:
        """What goes out because of one more token, or of none."""
        request, sequence = answer.request, answer.sequence
        if len(sequence.tokens) == len(request.prompt) and answer.index == 0:
            # From now on the others find the prompt in the prefix cache.
            for index in range(1, request.params.n):
                self._begin(request, index)
        if drawn.token is None:
            self._end(answer)
            yield _failure(request, answer.index, drawn.error)
            return
        sequence.tokens.append(drawn.token)
        piece = answer.text.push(drawn.token, drawn.logprobs)
        if piece.reason is None and answer.draw.is_done:
            piece = answer.text.finish("stop", piece)
        if piece.reason is None and len(sequence.tokens) == request.limit:
            piece = answer.text.finish("length", piece)
        if piece.reason is not None:
            self._end(answer)
        if piece.text or piece.reason is not None:
            piece.index, piece.prompt_tokens, piece.cached_tokens = answer.index, len(request.prompt), sequence.cached
            yield piece

    def _end(self, answer: _Answer) -> None:
        request = answer.request
        self.scheduler.finish(answer.sequence)
        self._forget(answer.sequence)
        del request.answers[answer.index]
        request.ended.add(answer.index)
        if len(request.ended) == request.params.n:
            del self._requests[request.number]

    def _forget(self, sequence: policy.Sequence) -> None:
        del self._answers[sequence]
        if self.runner.images is not None:
            self.runner.images.forget(sequence)

    def _new_scheduler(self) -> policy.Scheduler:
        plan, settings = self.plan, self.settings
        return policy.Scheduler(
            slots=plan.slots,
            pages=plan.pages,
            page_size=plan.page_size,
            chunk_tokens=settings.chunk_tokens,
            snapshots=plan.snapshots,
            snapshot_interval=settings.snapshot_interval,
        )

    def _start_over(self) -> None:
        """Nobody knows what is in pages and states, so nothing of them is used again."""
        counts = self.scheduler.counts
        self.scheduler = self._new_scheduler()
        self.scheduler.counts = counts
        self._requests.clear()
        for sequence in list(self._answers):
            self._forget(sequence)


def _first_lengths(device: str, slots: int, chunk_tokens: int) -> list[list[int]]:
    """Of prompts that make an engine do, batch by batch, all that is slow when it is done for the first time."""
    if device != "cuda":
        return [[1]]
    # In pieces; alone; a few together in one step, of one length and of several.
    prompts = [[2 * chunk_tokens], [128], [100] * 4, [1000, 700, 300, 100]]
    # Those that fill a step: the rest of one that was begun before among few and among more; many, all of them new.
    prompts += [[chunk_tokens // count + 1] * 2 * count for count in (3, 7)]
    prompts += [[chunk_tokens // count] * count for count in (16, 64)]
    return [lengths[:slots] for lengths in prompts] + [[1] * count for count in (*BUCKETS, slots) if count <= slots]


def _failure(request: _Request, index: int, error: str) -> Piece:
    return Piece(text="", reason="error", error=error, index=index, prompt_tokens=len(request.prompt))
