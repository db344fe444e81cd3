"""Problems and answers become prompts: token ids, and an endless seeded stream of them.

Doors: sources rows prompts arithmetic hub
Uses: config reward types
"""
