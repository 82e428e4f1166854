"""Functions of tensors: attention in both kinds, experts, norm, rotary, loss. No module, no file, no rank."""
