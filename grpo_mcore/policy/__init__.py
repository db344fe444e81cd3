"""What is trained: Megatron's model, its log-probs and updates, Hugging Face's weights into it and out of it.

Doors: model model_folder hf_weights policy warm_start
Uses: config data kernels loss parallel report types
"""
