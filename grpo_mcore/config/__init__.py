"""What a run is told: the configuration's dataclasses, its YAML file and schema, the rules, the recipes.

Doors: config bounds file rules recipe
"""
