"""What a run is told: the configuration's dataclasses, its YAML file, the rules it must keep, the published recipes.

Doors: config file rules recipe
"""
