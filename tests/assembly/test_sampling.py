"""Plans, shards and groups."""

import pytest

from s2dcli.assembly.sampling import Sampler, Task, count_done, plan, shard_of, tasks_of_step
from s2dcli.engines.base import Request, Sample, SamplingParams
from s2dcli.errors import DataError
from s2dcli.files.output import CompleteLine
from s2dcli.files.records import Problem, row_seed


def tasks(lengths: list[int]) -> list[Task]:
    problems = [Problem(f"p{i}", [{"role": "user", "content": "?"}], "1", "0" * 64, {}) for i in range(len(lengths))]
    return [Task(problem, [5] * length, problem.id) for problem, length in zip(problems, lengths, strict=True)]


def test_batches_hold_whole_consecutive_groups_within_the_budget():
    todo = tasks([4, 4, 10, 2, 2, 2])
    batches = plan(todo, num_samples=2, max_tokens=6, batch_tokens=64)
    assert [task for batch in batches for task in batch] == todo
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert [len(batch) for batch in plan(todo, 2, 6, 1)] == [1] * 6


def test_shards_are_runs_of_whole_batches_and_cover_everything():
    batches = [[task] for task in tasks([3] * 7)]
    for count in (1, 2, 3, 7, 9):
        shards = [shard_of(batches, index, count) for index in range(1, count + 1)]
        assert [batch for shard in shards for batch in shard] == batches


def test_groups_of_a_step_are_named_apart_when_a_problem_is_resampled_groups():
    todo = tasks([3, 3])
    assert [task.group_id for task in tasks_of_step(todo, [1, 0, 1, 1], 7)] == ["p1@7", "p0@7", "p1@7.1", "p1@7.2"]


class Backwards:
    """An engine whose samples finish in reverse order."""

    name = "backwards"
    whole_batches = True
    max_length = None

    def generate(self, requests, params):
        requests: list[Request] = list(requests)
        for index in reversed(range(len(requests))):
            yield index, Sample([requests[index].seed % 7, 2], [-0.12345678, -1.0], "stop")


class Encoder:
    template_sha256 = "t"
    description = "own"

    def decode(self, ids):
        return str(ids)

    def opens_reasoning(self, messages):
        return False


def test_groups_come_out_in_input_order_whatever_finishes_first():

    sampler = Sampler(Backwards(), Encoder(), SamplingParams(1.0, 1.0, 0, 8), seed=3, identity={}, batch_tokens=10_000)
    groups = list(sampler.sample(tasks([3, 3, 3]), 2))
    assert [[row.group_id for row in group] for group in groups] == [["p0"] * 2, ["p1"] * 2, ["p2"] * 2]
    assert [[row.sample_index for row in group] for group in groups] == [[0, 1]] * 3
    assert groups[1][1].seed == row_seed(3, "p1", 1)
    assert groups[1][1].completion_logprobs == [-0.123457, -1.0]


def rows_of(sampler, todo, **more):
    batches = plan(todo, 2, 8, 22)
    return [(row.group_id, row.sample_index) for group in sampler.sample_batches(batches, 2, **more) for row in group]


def test_rows_that_are_there_are_not_asked_again():
    from s2dcli.engines.base import SamplingParams

    asked = []

    class Recorder(Backwards):
        def generate(self, requests, params):
            asked.extend(requests)
            return super().generate(requests, params)

    sampler = Sampler(Recorder(), Encoder(), SamplingParams(1.0, 1.0, 0, 8), seed=3, identity={}, batch_tokens=10_000)
    todo = tasks([3, 3, 3])
    everything = rows_of(sampler, todo)
    for done in range(7):  # at the end of a batch, of a group, and within a group
        asked.clear()
        assert rows_of(sampler, todo, done=done) == everything[done:]
        assert len(asked) == 6 - done


def kept(todo, count):
    rows = [{"group_id": task.group_id, "sample_index": i, "prompt_ids": task.prompt_ids} for task in todo for i in range(2)]
    return [CompleteLine(f"file:{number}", b"", row) for number, row in enumerate(rows[:count], 1)]


def test_whole_batches_are_kept_or_whole_rows():
    todo = tasks([3, 3, 3])
    batches = [todo[:2], todo[2:]]
    assert [count_done(kept(todo, n), batches, 2, whole_batches=True) for n in range(7)] == [0, 0, 0, 0, 4, 4, 6]
    assert [count_done(kept(todo, n), batches, 2, whole_batches=False) for n in range(7)] == [0, 1, 2, 3, 4, 5, 6]


def test_rows_of_another_plan_are_refused():
    todo = tasks([3, 3, 3])
    with pytest.raises(DataError, match="file:3: cannot be resumed: sample 0 of group 'p2' was expected here"):
        count_done(kept(todo, 6), [[todo[0]], [todo[2]]], 2, whole_batches=True)
    with pytest.raises(DataError, match="file:5: cannot be resumed: the end was expected here"):
        count_done(kept(todo, 6), [todo[:2]], 2, whole_batches=False)


def test_row_seeds_differ_by_seed_group_and_sample_and_stay_exact_in_json():
    seeds = {row_seed(seed, group, sample) for seed in range(5) for group in "abc" for sample in range(20)}
    assert len(seeds) == 5 * 3 * 20
    assert max(seeds) < 2**53
    assert row_seed(0, "a", 0) == row_seed(0, "a", 0)


class Hasty(Backwards):
    """An engine that batches by itself: it takes requests while others are under way, and answers the second of two first."""

    name = "hasty"
    whole_batches = False
    max_length = None

    def generate(self, requests, params):
        self.taken = 0
        waiting = []
        for index, request in enumerate(requests):
            self.taken += 1
            waiting.append((index, Sample([request.seed % 7, 2], [-1.0, -1.0], "stop")))
            if len(waiting) == 2:
                yield waiting.pop()
        yield from waiting


def test_an_engine_that_batches_by_itself_gets_all_rows_as_it_asks_for_them():
    engine = Hasty()
    sampler = Sampler(engine, Encoder(), SamplingParams(1.0, 1.0, 0, 8), seed=3, identity={}, batch_tokens=1)
    groups = sampler.sample(tasks([3] * 20), 2)
    engine.taken = 0
    rest = list(groups)
    assert [group[0].group_id for group in rest] == [f"p{i}" for i in range(20)]
    assert engine.taken == 40
    whole = list(
        Sampler(Backwards(), Encoder(), SamplingParams(1.0, 1.0, 0, 8), seed=3, identity={}, batch_tokens=1).sample(tasks([3] * 20), 2)
    )
    assert [[row.seed for row in group] for group in rest] == [[row.seed for row in group] for group in whole]
