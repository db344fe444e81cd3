"""What is sampled: vLLM engines as Ray actors, which prompts they get and when, graded groups of responses.

Doors: rollout admission dispatch engine engines placement turns
Uses: config data environment parallel report reward types
"""
