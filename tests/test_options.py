"""Groups of options: one parameter of a command, many on its command line."""

from __future__ import annotations

import inspect

from s2dcli import options


def command(*, out: str, training: options.TrainingOptions, seed: options.Seed = 0) -> None:
    """Say what was given."""
    command.seen = options.flatten(locals())


def test_a_group_becomes_the_options_of_its_fields_in_place_and_is_put_together_again():
    expanded = options.expand(command)
    parameters = inspect.signature(expanded).parameters
    assert list(parameters)[:2] == ["out", "lr"]
    assert list(parameters)[-1] == "seed"
    assert "training" not in parameters
    assert parameters["schedule"].default is options.Schedule.constant

    given = {name: parameter.default for name, parameter in parameters.items()} | {"out": "x", "lr": 3e-4}
    expanded(**given)
    assert command.seen == given


def test_flatten_leaves_the_context_out():
    assert options.flatten({"context": object(), "n": 8}) == {"n": 8}
