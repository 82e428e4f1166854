"""The context of an autograd function's passes where autograd takes no part."""

from torch import Tensor


class Context:
    """In the place of `ctx` in forward(ctx, ...) and backward(ctx, ...), called one after the other."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def take_saved(self) -> tuple[Tensor | None, ...]:
        """What was saved, for somebody else to keep until it is saved anew."""
        saved, self.saved_tensors = self.saved_tensors, ()
        return saved
