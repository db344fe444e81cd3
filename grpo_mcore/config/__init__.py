"""What a run is told: the configuration's dataclasses, its YAML file and schema, the rules, the recipes.

Doors: config data_sources bounds file rules recipe
"""
