"""An environment: its public methods are tools, which the model is told by the chat template and calls in its turns.

environment: {path: "examples/environment_of_tools.py:Calculator", max_turns: 4}
reward:
  functions:
  - path: math_verify                 # of the whole text
  - {path: environment, weight: 0.1}  # what get_reward returns
"""


class Calculator:
    def reset(self, **row):
        """A session begins, of this row of the data set."""
        self.num_calls = 0

    def multiply(self, a: float, b: float) -> float:
        """
        Multiplies two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.num_calls += 1
        return a * b

    def get_reward(self):
        """A session ends."""
        return float(self.num_calls > 0)
