"""The solvers' turns: who is asked, how long, at which threshold; and that no time and no doubt is lost on the way."""

import itertools
import time

import numpy as np
import pytest
from test_bab import BAND, Problem, audit

from nanomr.verify.exact import milp
from nanomr.verify.exact.bab import Tree
from nanomr.verify.running import schedule

IMAGE, WRONG = np.zeros((1, 1, 1)), np.ones((1, 1, 1))
RELUS = [(-np.ones((1, 7)), np.ones((1, 7)))]


class Clock:
    """Seconds that pass when somebody works."""

    def __init__(self, limit):
        self.left = limit

    def __call__(self):
        return self.left


class World:
    """Searches and a solver that work for as long as they may, and in the end say what they are told to."""

    def __init__(self, monkeypatch, limit=100.0, own_clock=True, units=7):
        self.clock, self.turns, self.made, self.limit, self.units = Clock(limit), [], [], limit, units
        self.told: list[tuple] = []
        self.needs, self.says = {}, {}  # by (stage, threshold): seconds, (status, image)
        self.milp, self.own_clock, self.asked = milp.Answer("timeout", None, np.nan, 0, 5.0, "no"), own_clock, []
        world = self

        class Search:
            def __init__(self, *problem, threshold, tree=None):
                world.told.append((self.stage, tree and tree.key))
                self.key, self.tree, self.seconds = (self.stage, threshold), None, 0.0
                self.nearest, self.margin = None, np.inf
                world.made.append(self.key)

            def run(self, left, stop):
                assert 0 < stop() <= world.clock()
                before = self.seconds
                while left() > 0 and self.seconds < world.needs.get(self.key, np.inf):
                    world.clock.left -= 0.25
                    self.seconds += 0.25
                world.turns.append((*self.key, self.seconds - before))
                root = np.full(world.units, -1.0), np.full(world.units, 1.0)
                tree = Tree("timeout", None, 0.0, None, 1, self.seconds, root)
                if self.seconds >= world.needs.get(self.key, np.inf):
                    status, image = world.says[self.key]
                    tree = self.tree = tree._replace(status=status, image=image, bound=1.0, proof={})
                return tree

        for stage in ("bab", "hull"):
            monkeypatch.setitem(schedule.SEARCHES, stage, type(stage, (Search,), {"stage": stage}))

    def decide(self, *_, threshold, cpu_limit, left):
        self.turns.append(("milp", threshold, cpu_limit))
        if self.own_clock:  # a clock on the wall; CPU time of this process would stand still
            self.clock.left -= self.milp.seconds
        return self.milp

    def confirm(self, image):
        self.asked.append(image)
        return image if image is WRONG else None

    def settle(self, **options):
        options = {"error": 0.5, "float32": False, **options}
        return schedule.settle(None, None, None, RELUS, None, left=self.clock, limit=self.limit, solver=self,
                               confirm=self.confirm, **options)  # fmt: skip


def test_turns_double_and_every_search_goes_on_where_it_stopped(monkeypatch):
    world = World(monkeypatch, units=1000)
    answer = world.settle()
    assert answer.verdict == "timeout" and world.made == [("bab", 0.0), ("hull", 0.0)]
    seconds = {stage: [s for name, _, s in world.turns if name == stage] for stage in ("bab", "hull")}
    for stage, first in schedule.FEW_SLICES.items():
        assert seconds[stage][:4] == [first, 2 * first, 4 * first, 8 * first]
    assert world.clock.left == 0 and sum(map(sum, seconds.values())) == 100
    assert [note.split(",")[0] for note in answer.notes] == ["bab", "hull"]


def test_a_search_that_took_more_than_its_due_waits(monkeypatch):
    world = World(monkeypatch, units=1000)
    real = schedule.SEARCHES["hull"].run

    def slow(self, left, stop):  # a program that its turn does not cut short
        tree = real(self, left, stop)
        if self.seconds == 2:
            self.seconds, world.clock.left = 22.0, world.clock.left - 20
        return tree

    monkeypatch.setattr(schedule.SEARCHES["hull"], "run", slow)
    world.settle()
    spent = {stage: sum(s for name, _, s in world.turns if name == stage) for stage in ("bab", "hull")}
    assert spent["hull"] + 20 <= 4 * spent["bab"] + 20 and world.clock.left == 0


def test_the_real_margin_alone_unless_float32_is_asked_for(monkeypatch):
    world = World(monkeypatch)
    world.needs, world.says = {("bab", 0.0): 3}, {("bab", 0.0): ("proved", None)}
    answer = world.settle()
    assert (answer.verdict, answer.stage, answer.bound) == ("proved", "bab", 1.0)
    assert {threshold for _, threshold, _ in world.turns} == {0.0}


def test_programs_are_told_the_tree_of_the_same_threshold(monkeypatch):
    world = World(monkeypatch)
    world.settle(float32=True)
    assert world.told == [("bab", None), ("hull", ("bab", 0.5)), ("bab", None), ("hull", ("bab", 0.0))]


@pytest.mark.parametrize("proved", [False, True])
def test_float32_costs_a_fifth_at_most_and_no_real_proof(proved, monkeypatch):
    world = World(monkeypatch)
    world.needs, world.says = {("hull", 0.0): 3}, {("hull", 0.0): ("proved", None)}
    answer = world.settle(float32=True, proved=proved)
    assert answer.verdict == ("unknown" if proved else "proved")
    spent = sum(s for _, threshold, s in world.turns if threshold == 0.5)
    assert spent == schedule.FLOAT32 * 100
    assert (not proved) == any(threshold == 0 for _, threshold, _ in world.turns)
    for error in (0.0, np.inf, np.nan):  # nothing to ask, or no bound on it
        world = World(monkeypatch)
        world.settle(float32=True, proved=True, error=error)
        assert world.turns == []


@pytest.mark.parametrize("units, own_clock", [(7, True), (7, False), (201, True)])
def test_the_milp_comes_late_where_few_are_unstable(units, own_clock, monkeypatch):
    world = World(monkeypatch, units=units, own_clock=own_clock)
    answer = world.settle()
    calls = [seconds for stage, _, seconds in world.turns if stage == "milp"]
    assert len(calls) == (units <= schedule.UNITS) and all(seconds < schedule.LATE * 100 for seconds in calls)
    assert answer.solver_seconds == (0 if own_clock or not calls else 5)
    worked = sum(seconds for stage, _, seconds in world.turns if stage != "milp")
    assert worked + 5 * len(calls) == 100  # its seconds are counted once, whatever the clock


def test_the_milp_has_all_the_time_where_the_others_give_up(monkeypatch):
    world = World(monkeypatch, units=1000)
    for stage in ("bab", "hull"):
        world.needs[stage, 0.0], world.says[stage, 0.0] = 1, ("timeout", None)
    world.milp = milp.Answer("infeasible", None, 0.0, 1, 5.0, "yes")
    answer = world.settle()
    assert world.turns[-1][0] == "milp" and world.turns[-1][2] >= 97
    assert (answer.verdict, answer.stage, answer.proof) == ("proved", "milp", {})


def test_only_what_was_confirmed_is_falsified_and_a_doubtful_candidate_ends_one_search_alone(monkeypatch):
    for image, verdict in ((WRONG, "falsified"), (IMAGE, "proved")):
        world = World(monkeypatch)
        world.needs = {("bab", 0.0): 2, ("hull", 0.0): 9}
        world.says = {("bab", 0.0): ("candidate", image), ("hull", 0.0): ("proved", None)}
        answer = world.settle()
        assert answer.verdict == verdict and world.asked == [image]
        assert (answer.adversarial is WRONG) == (verdict == "falsified")


def test_the_lowest_margin_seen_is_where_an_attack_begins(monkeypatch):
    world = World(monkeypatch)
    real = schedule.SEARCHES["hull"].run

    def seeing(self, left, stop):
        tree = real(self, left, stop)
        self.margin, self.nearest = (0.1, IMAGE) if self.seconds < 10 else (0.05, WRONG)
        return tree

    monkeypatch.setattr(schedule.SEARCHES["hull"], "run", seeing)
    answer = world.settle()
    assert (answer.verdict, answer.stage) == ("falsified", "hull")
    assert world.asked[0] is IMAGE and world.asked[-1] is WRONG and len(world.asked) == 2


@pytest.mark.parametrize("gap", [-BAND, BAND])
def test_real_searches_in_very_short_turns_say_the_truth(gap, monkeypatch):
    """... with proofs that a replay by layers accepts."""
    for name in ("FEW_SLICES", "MANY_SLICES"):
        monkeypatch.setattr(schedule, name, {"bab": 1e-6, "hull": 1e-6})
    stages = set()
    for seed in range(8):
        problem = Problem("mlp", seed)
        truth = problem.minima()
        least = min(truth.values()) + gap
        row = problem.row
        chain, last = problem.chain, problem.chain.stages[-1]
        last.layers[-1].params["bias"] -= least * row / (row @ row)  # the least margin is now -gap
        last.bias = last.bias - least * row / (row @ row)

        def confirm(image, chain=chain, row=row):
            return image if chain.forward(image[None])[0][0] @ row <= 0 else None

        stop = time.monotonic() + 60
        answer = schedule.settle(
            *problem.args, row, error=np.inf, left=lambda stop=stop: stop - time.monotonic(), limit=60, solver=None,
            confirm=confirm, float32=False,
        )  # fmt: skip
        stages.add(answer.stage)
        assert answer.verdict == ("proved" if gap < 0 else "falsified")
        if gap > 0:
            assert chain.forward(answer.adversarial[None])[0][0] @ row <= 0
        elif "signs" in answer.proof:
            tree = Tree("proved", None, answer.bound, answer.proof, 0, 0.0)
            audit(problem, tree, {pattern: m - least for pattern, m in truth.items()}, 0.0)
    assert stages <= {"bab", "hull"}


def test_the_solvers_process_is_killed_when_the_clock_says_so(monkeypatch):
    """HiGHS looks at its limit at certain points only: here at none, for a minute."""
    monkeypatch.setattr(milp, "GRACE", 0.1)
    solver, ticks = milp.Solver(), itertools.count()

    class Connection:
        def send(self, _):
            pass

        def poll(self, seconds):
            time.sleep(seconds)
            return next(ticks) > 1000

        def close(self):
            pass

    class Process:
        pid, exitcode = 0, 0

        def is_alive(self):
            return True

        kill = join = close = lambda *_: None

    monkeypatch.setattr(milp, "_prepare", lambda *_: (None, None, None))
    spent = itertools.count()
    monkeypatch.setattr(milp, "_cpu_seconds", lambda _: 0.01 * next(spent))
    for options in (dict(cpu_limit=1e9, left=lambda: -1.0), dict(cpu_limit=0.0)):
        solver._process, solver._connection, begin = Process(), Connection(), time.monotonic()
        answer = solver.decide(None, None, None, None, None, **options)
        assert (answer.status, answer.message, answer.image) == ("timeout", "killed", None)
        assert time.monotonic() - begin < 5
