"""What is kept: attested checkpoints, and Hugging Face folders of them with a proof.

Doors: checkpoint convert parity
Uses: config loss parallel policy report types
"""
