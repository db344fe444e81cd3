"""Several runs one after the other, each from the one before, with a record of what came of what.

Doors: stages actions
Uses: checkpoint config entry evaluate policy report run
"""
