"""Problems and answers become prompts: token ids, and an endless seeded stream of them.

Doors: sources prompts arithmetic hub
Uses: config reward types
"""
