"""What the graded samples of some problems say of a model, and how surely. Pure.

mean@k     mean over problems of the share of right samples
pass@j     mean over problems of 1 - C(n - c, j) / C(n, j), of n samples with c right: unbiased, Chen et al. 2021, arXiv
           2107.03374, eq. 1
maj@k      share of problems whose most frequent answer is right: self-consistency, Wang et al. 2022, arXiv 2203.11171.
           Answers count as the same if they are one text after the verifier's normalisation, right ones and wrong ones
           alike; samples without an answer have no vote; of answers with equally many votes each is taken with equal
           probability: a third of a problem is solved if one of three is right
+-         standard error over problems, of which samples are repeated measurements (clustered: Miller 2024, arXiv
           2411.00640): it measures how far other problems of the kind, with as many samples each, would move the mean
95%        value +- 1.96 standard errors, clipped to what is possible. The normal interval, since it has a closed form
           that is the same for a paired difference and needs no seed; a bootstrap over problems agrees with it where
           there are enough, and with 30 Student's would be 4% wider. Where all problems score the same (all or none
           solved) it has no width, which says too much.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.96


@dataclass(frozen=True)
class Problem:
    """The k samples of one problem, in sample order."""

    id: int  # position in its data set
    answer: str  # the right one, as the data set has it
    rewards: tuple[float, ...]
    answers: tuple[str | None, ...]  # normalised; None: none was given
    response_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    source: str = ""  # the data set's name; of one data set alone ""

    @property
    def key(self) -> tuple[str, int, str]:
        """What makes it the same problem in another evaluation."""
        return self.source, self.id, self.answer

    @property
    def mean(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    def pass_at(self, j: int) -> float:
        """The probability that j of the samples, drawn without replacement, hold a right one."""
        n, right = len(self.rewards), sum(r > 0 for r in self.rewards)
        return 1 - math.comb(n - right, j) / math.comb(n, j)

    @property
    def majority(self) -> float:
        """Whether the most frequent answer is right; of ties the share that is."""
        votes = Counter(a for a in self.answers if a is not None)
        if not votes:
            return 0.0
        right = {a for a, r in zip(self.answers, self.rewards, strict=True) if r > 0}
        first = [a for a, n in votes.items() if n == max(votes.values())]
        return sum(a in right for a in first) / len(first)


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float
    low: float  # of the 95% interval
    high: float

    @classmethod
    def of(cls, values: Sequence[float], least: float = 0.0, most: float = 1.0) -> "Estimate":
        """The mean of one value a problem, each within [least, most]. A single problem tells nothing of others: its
        interval is all of that."""
        P = len(values)
        mean = math.fsum(values) / P
        if P == 1:
            return cls(mean, 0.0, least, most)
        error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (P - 1) / P)
        return cls(mean, error, max(mean - Z_95 * error, least), min(mean + Z_95 * error, most))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f} (95%: {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Result:
    """Scores of P problems with k samples each."""

    problems: tuple[Problem, ...]
    num_left_out: int = 0  # problems that were over-long, of which the scores say nothing
    # a verifier decided: rewards are 0 or 1, and answers are known. Otherwise any number, without a majority
    is_verified: bool = True

    @property
    def k(self) -> int:
        return len(self.problems[0].rewards)

    @property
    def truncated_frac(self) -> float:
        return sum(sum(p.truncated) for p in self.problems) / (len(self.problems) * self.k)

    @functools.cached_property
    def estimates(self) -> dict[str, Estimate]:
        """mean@k, maj@k and pass@1 to pass@k."""
        bounds = (0.0, 1.0) if self.is_verified else (-math.inf, math.inf)
        majority = {f"maj@{self.k}": Estimate.of([p.majority for p in self.problems])} if self.is_verified else {}
        return {
            f"mean@{self.k}": Estimate.of([p.mean for p in self.problems], *bounds),
            **majority,
            **{f"pass@{j}": Estimate.of([p.pass_at(j) for p in self.problems]) for j in range(1, self.k + 1)},
        }

    @property
    def _of_k(self) -> list[str]:
        """The estimates that are metrics."""
        return [f"mean@{self.k}", f"pass@{self.k}", *([f"maj@{self.k}"] if self.is_verified else [])]

    def by_source(self) -> dict[str, "Result"]:
        """Of each data set by its name; none where there is one alone. Over-long problems are told of all together."""
        names = dict.fromkeys(p.source for p in self.problems if p.source)
        return {
            name: Result(tuple(p for p in self.problems if p.source == name), is_verified=self.is_verified)
            for name in names
        }

    def metrics(self) -> dict[str, float]:
        """Over all problems, and the means of each data set."""
        return {
            **{f"eval/{name}": self.estimates[name].value for name in self._of_k},
            "eval/standard_error": self.estimates[f"mean@{self.k}"].standard_error,
            "eval/truncated_frac": self.truncated_frac,
            "eval/overlong_left_out": float(self.num_left_out),
            **{
                f"eval/{source}/{name}": result.estimates[name].value
                for source, result in self.by_source().items()
                for name in self._of_k
            },
        }

    def __str__(self) -> str:
        mean, *others = self._of_k
        left_out = f", {self.num_left_out} more left out as over-long" if self.num_left_out else ""
        others_said = ", ".join(f"{name} {self.estimates[name].value:.3f}" for name in others)
        of_each = "".join(f"; {name} {r.estimates[f'mean@{r.k}']}" for name, r in self.by_source().items())
        return (
            f"{mean} {self.estimates[mean]}, {others_said} "
            f"({len(self.problems)} problems{left_out}, {self.truncated_frac:.1%} truncated){of_each}"
        )


@dataclass(frozen=True)
class Comparison:
    """Of two models on the same problems, from problem to problem: what is hard for both does not blur it."""

    difference: Estimate  # of the means, mine minus the other's
    num_better: int  # problems whose mean is higher
    num_worse: int
    num_problems: int

    def __str__(self) -> str:
        return (
            f"{self.difference} over {self.num_problems} problems, {self.num_better} better and {self.num_worse} worse"
        )


def compare(mine: Sequence[Problem], other: Sequence[Problem]) -> Comparison:
    """Problems in any order; their numbers of samples may differ. Raises ValueError if they are not the same
    problems."""
    most = 1.0 if all(r in (0, 1) for p in (*mine, *other) for r in p.rewards) else math.inf
    theirs = {p.key: p for p in other}
    if {p.key for p in mine} != theirs.keys():
        raise ValueError(f"{len(mine)} problems and {len(other)}, not the same ones")
    differences = [p.mean - theirs[p.key].mean for p in mine]
    return Comparison(
        Estimate.of(differences, least=-most, most=most),
        sum(d > 0 for d in differences),
        sum(d < 0 for d in differences),
        len(mine),
    )
