"""Log-probs of a linear head without its logits, in Triton and in plain PyTorch; and with them a loss's gradients.

Doors: pick reference linear_logprob linear_grpo
"""
