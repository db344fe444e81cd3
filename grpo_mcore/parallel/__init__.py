"""Ranks: the topology, what they tell each other, and how a vocabulary, a sequence and a model's layers are cut over
them.

Doors: topology collectives vocab context pipeline
Uses: config types
"""
