"""What a run says of itself: metrics, its folder, where it came from, curves, a page.

Doors: claim metrics sinks run_folder samples provenance curves report
Uses: config reward types
"""
