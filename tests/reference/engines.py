"""Engines and a trainer in virtual time, iteration by iteration and response by response: the oracle of
grpo_mcore/plan/simulate.py.

Shares with it who samples what and which groups make a step (Dispatch, Admission: tested on their own), nothing else.
"""

from grpo_mcore.rollout.admission import Admission
from grpo_mcore.rollout.dispatch import Dispatch


class Engine:
    def __init__(self, sizes, index, begins):
        self.sizes, self.index, self.begins, self.ends = sizes, index, begins, None
        self.running, self.queue = [], []  # of dicts
        self.busy = self.slots = 0

    def cached(self):
        return sum(r["prompt"] + len(r["versions"]) for r in self.running)

    def begin_iteration(self):
        """What runs in the next iteration, and how long it takes."""
        capacity, left = self.sizes["capacity"], False
        while capacity is not None and len(self.running) > 1 and self.cached() + len(self.running) > capacity:
            self.queue.insert(0, self.running.pop())
            left = True
        cost = 0
        while self.queue and not left:
            first = self.queue[0]
            if first["request"]["cancelled"]:
                self.queue.pop(0)
                continue
            after = self.cached() + first["prompt"] + len(first["versions"]) + len(self.running) + 1
            if len(self.running) == self.sizes["max_running"] or (
                self.running and capacity is not None and after > capacity
            ):
                break
            context = first["prompt"] + len(first["versions"])
            if first["versions"] or not first["request"]["computed"] or not self.sizes["block"]:
                cost += self.sizes["prefill"] * context
            else:
                cost += self.sizes["prefill"] * (context - self.sizes["block"] * ((context - 1) // self.sizes["block"]))
            first["request"]["computed"] = True
            cost += self.sizes["start"]
            self.running.append(self.queue.pop(0))
        self.ends = None
        if self.running:
            self.begins += cost
            self.busy += cost
            self.slots += cost * len(self.running)
            self.ends = self.begins + self.sizes["iteration"](len(self.running), self.cached())

    def end_iteration(self, version):
        """The requests that are done with it."""
        self.busy += self.ends - self.begins
        self.slots += (self.ends - self.begins) * len(self.running)
        self.begins = self.ends
        for r in self.running:
            r["versions"].append(version)
        self.running = [r for r in self.running if not r["request"]["cancelled"]]
        done = [r for r in self.running if len(r["versions"]) == r["length"]]  # in the order in which they started
        self.running = [r for r in self.running if len(r["versions"]) < r["length"]]
        out = []
        for r in done:
            r["request"]["left"] -= 1
            if r["request"]["left"] == 0:
                out.append(r["request"])
        return out


class Run:
    def __init__(
        self,
        *,
        prompts_per_step,
        group_size,
        admission,
        recompute,
        num_engines,
        sizes,
        train,
        refit_s,
        lives,
        restart_s,
        draw,
    ):
        self.P, self.G, self.sizes, self.recompute, self.train, self.refit_s, self.draw = (
            prompts_per_step,
            group_size,
            sizes,
            recompute,
            train,
            refit_s,
            draw,
        )
        self.dispatch, self.admission = (
            Dispatch(sizes["max_running"]),
            Admission(prompts_per_step=prompts_per_step, **admission),
        )
        self.lives, self.restart_s = lives, restart_s
        self.engines, self.fails, self.starts = {}, {}, {}
        self.started = list(range(num_engines))
        self.requests, self.arrived, self.rows = {}, {}, []
        self.version, self.now, self.trainer = 0, 0, None  # (when, what)

    def steps(self, num_steps):
        self.row = {"refit": 0, "wait": 0, "failures": 0, "again": 0, "dropped": 0}
        self.busy = self.slots = 0
        self.mark, self.waiting = 0, False
        self.refit()
        while len(self.rows) < num_steps:
            times = [(e.ends, 0, i) for i, e in self.engines.items() if e.ends is not None]
            times += [(t, 1, i) for i, t in self.fails.items()] + [(t, 2, i) for i, t in self.starts.items()]
            times += [(self.trainer[0], 3, 0)] if self.trainer else []
            self.now, kind, i = min(times)
            if kind == 0:
                done = self.engines[i].end_iteration(self.version)
                self.engines[i].begin_iteration()
                for request in done:
                    self.finish(i, request)
            elif kind == 1:
                self.fail(i)
            elif kind == 2:
                del self.starts[i]
                self.started.append(i)
                if not self.engines and self.waiting:
                    self.refit()
            else:
                what, self.trainer = self.trainer[1], None
                what()
        return self.rows

    def refit(self):
        self.row["wait"] += self.now - self.mark
        self.mark = self.now
        if not self.engines and not self.started:
            self.waiting = True
            return
        self.waiting = False
        for e in self.engines.values():
            if e.ends is None:
                e.begins = max(e.begins, self.now)
            e.begins += self.refit_s
            if e.ends is not None:
                again = self.sizes["prefill"] * e.cached() if self.recompute else 0
                e.begins, e.ends = e.begins + again, e.ends + self.refit_s + again
                e.busy += again
                e.slots += again * len(e.running)
        for i in self.started:
            self.engines[i] = Engine(self.sizes, i, self.now + self.refit_s)
            self.dispatch.join(i)
            if self.lives is not None:
                self.fails[i] = self.now + self.lives.pop(0)
        self.started = []
        self.trainer = (self.now + self.refit_s, self.after_refit)

    def after_refit(self):
        self.row["refit"] += self.now - self.mark
        self.mark, self.waiting = self.now, True
        admitted, stale = self.admission.begin(self.version)
        for p in stale:
            self.dispatch.cancel((p,))
            if p in self.requests:  # else it was waiting
                self.requests.pop(p)["cancelled"] = True
            self.arrived.pop(p, None)
        self.row["dropped"] += len(stale)
        self.submit(admitted)
        self.look()
        if self.waiting and not self.engines and self.started:
            self.refit()

    def submit(self, positions):
        for p in positions:
            self.dispatch.submit((p,), self.G)
        self.deal()

    def deal(self):
        dealt = list(self.dispatch.deal())
        for i, (p,) in dealt:
            prompt, lengths, _ = self.draw(p)
            request = self.requests[p] = {"position": p, "left": self.G, "cancelled": False, "computed": False}
            request["responses"] = [
                {"prompt": prompt, "length": n, "versions": [], "request": request} for n in lengths
            ]
            self.engines[i].queue += request["responses"]
        for i in {i: None for i, _ in dealt}:
            e = self.engines[i]
            if e.ends is None:  # idle: an iteration of nothing, after which it begins with all that is queued then
                e.begins = e.ends = max(e.begins, self.now)

    def finish(self, i, request):
        p = request["position"]
        assert self.dispatch.done(i, (p,))
        self.arrived[p] = request
        self.submit(self.admission.arrived(p, self.draw(p)[2]))
        if self.waiting:
            self.look()

    def look(self):
        taken = self.admission.take()
        if taken is None:
            return
        self.row["wait"] += self.now - self.mark
        self.mark, self.waiting = self.now, False
        responses = [r for p in taken.positions for r in self.arrived[p]["responses"]]
        ages = [self.version - v for r in responses for v in r["versions"]]
        self.row |= {
            "positions": taken.positions,
            "tokens": len(ages),
            "staleness": sum(ages),
            "max_staleness": max(ages),
        }
        self.trainer = (self.now + self.train([r["prompt"] + r["length"] for r in responses]), self.after_training)

    def after_training(self):
        self.row["train"] = self.now - self.mark
        self.row |= {
            "busy": self.busy + sum(e.busy for e in self.engines.values()),
            "slots": self.slots + sum(e.slots for e in self.engines.values()),
        }
        self.rows.append(self.row)
        self.row = {"refit": 0, "wait": 0, "failures": 0, "again": 0, "dropped": 0}
        self.mark = self.now
        self.version += 1
        self.refit()

    def fail(self, i):
        del self.fails[i]
        e = self.engines.pop(i)
        self.busy, self.slots = self.busy + e.busy, self.slots + e.slots
        self.row["failures"] += 1
        left = self.dispatch.leave(i)
        self.row["again"] += len(left)
        self.starts[i] = self.now + self.restart_s
        self.deal()
