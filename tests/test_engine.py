"""Real vLLM engines under Ray that are killed and stopped while they sample: nothing is lost, nothing comes twice, and others take their place.

Not covered here: an engine that fails during a refit (it ends the run, with its last words); engines on other nodes; GPUs.
"""

import os
import signal
import threading
import time

import pytest
import ray

from grpo_mcore.engine import EngineError
from grpo_mcore.rollout import rollout
from grpo_mcore.types import Prompt
from tests.test_refit import Session

pytestmark = pytest.mark.slow  # engines take 15 to 40 s to start
PROMPTS = [Prompt(i, "", "", (3 + i % 80, 40, 7 * i % 91, 12)) for i in range(60)]


@pytest.fixture(scope="module")
def session(model_folders, tmp_path_factory):
    s = Session(model_folders["qwen2_tied"], str(tmp_path_factory.mktemp("run")), {}, "engine.num_engines=2", "engine.health_timeout_s=4", "engine.max_failures=2",
                "engine.max_running_responses=16", "rollout.max_response_tokens=200", "rollout.timeout_s=120")
    yield s
    s.close()


def sample(session, version: int) -> list[list[tuple[int, ...]]]:
    groups = rollout(session.engines, PROMPTS, group_size=4, temperature=1.0, max_tokens=200, seed=5, version=version)
    assert [g.prompt.id for g in groups] == list(range(len(PROMPTS)))
    return [[r.token_ids for r in g.responses] for g in groups]


def send(session, how: int, index: int) -> threading.Thread:
    """A signal to an engine once it has requests, and others have come back."""
    slot = session.engines.ready[index]

    def later():
        while not slot.pending:
            time.sleep(0.01)
        time.sleep(0.7)
        os.kill(slot.process_id[1], how)

    thread = threading.Thread(target=later)
    thread.start()
    return thread


def wait_for_replacements(session) -> None:
    ray.wait(list(session.engines._starting), num_returns=len(session.engines._starting), timeout=120)


@pytest.fixture(scope="module")
def undisturbed(session) -> list[list[tuple[int, ...]]]:
    session.refit(1)
    return sample(session, 1)


@pytest.mark.parametrize(("how", "words"), [(signal.SIGKILL, "rollout: engine 1 failed"), (signal.SIGSTOP, "rollout: engine 1 failed: did not answer for 4 s")])
def test_an_engine_that_dies_or_hangs_in_mid_generation_changes_nothing_and_is_replaced(session, undisturbed, capsys, how, words):
    thread = send(session, how, 1)
    assert sample(session, 1) == undisturbed  # as many responses of each prompt, and the same
    thread.join()
    said = capsys.readouterr().out
    assert words in said and "requests go to the 1 other engines; a replacement is started" in said and "The end of" in said
    assert len(session.engines.ready) == 1
    assert sample(session, 1) == undisturbed  # with fewer engines
    wait_for_replacements(session)
    assert session.refit(1)["refit/engines"].value == 2
    assert sample(session, 1) == undisturbed


def test_one_failure_too_many_stops_with_the_engines_last_words(session, undisturbed):
    # Last in this module: two failures were allowed.
    thread = send(session, signal.SIGKILL, 0)
    with pytest.raises(EngineError, match=r"rollout: engine 0 failed: (?s:.*)engine_0.*\.log(?s:.*)failure 3 of engines, and engine.max_failures = 2"):
        sample(session, 1)
    thread.join()
