"""What a run would take, before it is paid for: memory, seconds, a worst case tried out, a cluster simulated.

Doors: check memory time fit predict cluster
Uses: checkpoint config data entry environment kernels loss parallel policy report rollout run trainer types
"""
