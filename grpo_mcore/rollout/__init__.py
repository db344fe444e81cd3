"""What is sampled: vLLM engines as Ray actors, which prompts they get and when, graded groups of responses.

Doors: rollout admission dispatch engine engines placement
Uses: config data parallel report reward types
"""
