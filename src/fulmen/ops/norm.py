"""RMSNorm over the last dim, in fp32 whatever the input's dtype (MiniMax-01 uses no other norm in its text model)."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 and given back in x's dtype; x [..., D], weight [D]."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
