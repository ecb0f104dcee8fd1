"""Plans, shards and groups."""

from s2dcli.engines.base import Request, Sample
from s2dcli.engines.sampling import Sampler, Task, plan, shard_of, tasks_of_step
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


def test_groups_of_a_step_are_named_apart_when_a_problem_is_drawn_again():
    todo = tasks([3, 3])
    assert [task.group_id for task in tasks_of_step(todo, [1, 0, 1, 1], 7)] == ["p1@7", "p0@7", "p1@7.1", "p1@7.2"]


class Backwards:
    """An engine whose samples finish in reverse order."""

    name = "backwards"

    def generate(self, requests: list[Request], params):
        for index in reversed(range(len(requests))):
            yield index, Sample([requests[index].seed % 7, 2], [-0.12345678, -1.0], "stop")


class Encoder:
    template_sha256 = "t"
    description = "own"

    def decode(self, ids):
        return str(ids)


def test_groups_come_out_in_input_order_whatever_finishes_first():
    from s2dcli.engines.base import SamplingParams

    sampler = Sampler(Backwards(), Encoder(), SamplingParams(1.0, 1.0, 0, 8), seed=3, identity={}, batch_tokens=10_000)
    groups = list(sampler.sample(tasks([3, 3, 3]), 2))
    assert [[row.group_id for row in group] for group in groups] == [["p0"] * 2, ["p1"] * 2, ["p2"] * 2]
    assert [[row.sample_index for row in group] for group in groups] == [[0, 1]] * 3
    assert groups[1][1].seed == row_seed(3, "p1", 1)
    assert groups[1][1].completion_logprobs == [-0.123457, -1.0]


def test_row_seeds_differ_by_seed_group_and_sample_and_stay_exact_in_json():
    seeds = {row_seed(seed, group, sample) for seed in range(5) for group in "abc" for sample in range(20)}
    assert len(seeds) == 5 * 3 * 20
    assert max(seeds) < 2**53
    assert row_seed(0, "a", 0) == row_seed(0, "a", 0)
