"""How good a policy is: samples of held-out problems, scores with their error bars.

Doors: evaluate scores
Uses: checkpoint config data environment parallel policy report reward rollout types
"""
