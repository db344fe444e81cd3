"""What is trained: Megatron's model, its log-probs and updates, Hugging Face's weights into it and out of it.

Doors: model hf_weights policy warm_start
Uses: config data kernels loss parallel report types
"""
