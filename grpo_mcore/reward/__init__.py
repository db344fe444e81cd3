"""What a response is worth: by a verifier or by the user's own functions, in processes that can be killed; and what is
added to that.

Doors: functions golds graded grader rewards shaping verifiers
Uses: config types
"""
