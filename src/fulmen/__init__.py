"""MiniMax-01 hybrid lightning-attention models in PyTorch: train, generate, exchange checkpoints."""
