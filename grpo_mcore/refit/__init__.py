"""The policy's weights go into the engines, in memory, and are attested there.

Doors: refit weight_transfer senders receiver
Uses: config loss parallel policy report rollout types
"""
