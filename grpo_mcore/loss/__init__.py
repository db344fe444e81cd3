"""From rewards to a number to minimise: advantages, packed batches with their one denominator, the loss.

Doors: advantage batch loss
Uses: config parallel types
"""
