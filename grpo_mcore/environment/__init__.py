"""What takes more than one turn: the session, token for token, and the user's environments and agents, in processes of
their own.

Doors: environments session
Uses: config data reward types
"""
