"""An agent: it asks for turns as it likes, and may return a reward.

environment: {path: "examples/agent_that_checks_itself.py:run"}
reward:
  functions:
  - path: environment
"""


async def run(session, row):
    first = await session.generate()
    second = await session.generate("Are you sure? Answer again, with the number alone.")
    return {"score": float(second.strip() == row["answer"]), "changed": float(first.strip() != second.strip())}
