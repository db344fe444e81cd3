"""Whether a response is right: the last box against the answer, in processes that can be killed; and what is added to
that.

Doors: golds grader graded verifiers shaping
Uses: config types
"""
