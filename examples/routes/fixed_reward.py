"""A reward for negative-advantage.sh."""


def minus_one(completion: str, answer: str, record: dict) -> float:
    """The same for every completion: with `s2d grpo --advantage reward` it is the advantage of each of its tokens."""
    return -1.0
