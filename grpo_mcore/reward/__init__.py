"""What a response is worth: by a verifier or by the user's own functions, in processes that can be killed; and what is
added to that.

Doors: channel function_process functions golds graded grader killable rewards shaping verifiers
Uses: config types
"""
