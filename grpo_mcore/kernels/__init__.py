"""Log-probs of a linear head without its logits: in Triton, and in plain PyTorch.

Doors: pick reference linear_logprob
"""
