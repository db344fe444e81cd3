"""Problems and answers become prompts: token ids, and an endless seeded stream of them.

Doors: prompts arithmetic
Uses: config reward types
"""
