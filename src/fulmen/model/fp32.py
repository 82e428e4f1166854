"""Constants that a change of a model's dtype must not round."""

from torch import nn


class KeepsFp32(nn.Module):
    """`model.to(dtype)` moves its buffers and leaves them in fp32.

    Decay rates: rounded, a head would forget at another pace. Scales of int8 rows: rounded, all of a row would be off.
    """

    def _apply(self, fn, recurse: bool = True) -> "KeepsFp32":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self
