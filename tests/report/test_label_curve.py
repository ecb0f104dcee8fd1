"""The label curve of `s2d report --label-curve`: means and intervals over training runs, and a picture that browsers take."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

SAMPLED = {"k": 4, "problems": 320, "temperature": 1.0, "top_p": 1.0, "max_tokens": 16, "dataset": "test"}
T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with two degrees of freedom (tables)


@pytest.fixture
def evaluated(tmp_path):
    """Return a function that writes the eval folder of a checkpoint whose training has cost so many labels."""

    def write(folder, name, labels, rate, **changes):
        path = tmp_path / folder
        path.mkdir()
        figures = {"avg_at_k": rate, "se": 0.01, "pass_at_k": 0.9, "truncated": 0.0, "ungraded": 0, "ci95": [rate - 0.02, rate + 0.02]}
        result = {**SAMPLED, **figures, "name": name, "model": "student", "checkpoint": folder, **changes}
        (path / "results.json").write_text(json.dumps(result))
        spent = [f"{label:064d}" for label in range(labels)]
        record = {"options": {}, "given": [], "versions": {}, "commit": "", "seeds": {}, "inputs": [], "counts": {}, "output_sha256": ""}
        manifest = {**record, "schema": "s2d.manifest/1", "command": "grpo", "parents": [], "labels": spent, "complete": True}
        manifest["ancestors"] = {}
        (path / "s2d.json").write_text(json.dumps(manifest))
        return folder

    return write


def test_points_are_means_over_training_runs_with_students_interval(s2d, evaluated, tmp_path):
    direct = {32: [0.30, 0.34, 0.38], 128: [0.5, 0.5, 0.5], 512: [0.70]}
    runs = [
        evaluated(f"direct-{labels}-{seed}", "direct", labels, rate) for labels, rates in direct.items() for seed, rate in enumerate(rates)
    ]
    runs += [evaluated(f"bridge-{labels}", "a < b & c", labels, rate) for labels, rate in ((32, 0.6), (512, 0.9))]
    runs.append(evaluated("raw", "raw", 0, 0.2))
    done = s2d("report", *runs, "--label-curve", "curve.svg", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    points = {(point["name"], point["labels"]): point for point in json.loads(done.out)["points"]}
    assert len(points) == 6
    assert points["direct", 32]["runs"] == 3
    error = math.sqrt(0.04**2 * 2 / 2 / 3)  # of three rates 0.04 apart
    assert points["direct", 32]["se"] == pytest.approx(error)
    assert points["direct", 32]["ci95"] == pytest.approx([0.34 - T_2 * error, 0.34 + T_2 * error])
    assert points["direct", 512]["ci95"] is None
    text = (tmp_path / "curve.svg").read_text()
    picture = ElementTree.fromstring(text)
    inside = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"direct", "a < b & c", "raw", "32", "128", "512", "distinct labels spent"} <= set(inside)
    assert "<script" not in text
    assert not re.search(r"(?:href|src)=|url\(|@import", text)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 5  # a name without labels is a line across

    again = s2d("report", *runs, "--label-curve", "curve.svg", cwd=tmp_path)
    assert again.code == 2
    assert "--overwrite" in again.err
    table = s2d("report", *runs, "--label-curve", "curve.svg", "--overwrite", cwd=tmp_path)
    assert table.code == 0
    assert "34.0 ± 2.3" in table.out.decode()
    assert "1 to 3 training runs a point" in table.out.decode()
    assert (tmp_path / "curve.svg").read_text() == text
    (tmp_path / "mine.svg").write_text("<svg/>")
    kept = s2d("report", *runs, "--label-curve", "mine.svg", "--overwrite", cwd=tmp_path)
    assert kept.code == 2
    assert (tmp_path / "mine.svg").read_text() == "<svg/>"


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"dataset": "other"}, "differs from"),
        ({"checkpoint": "a"}, "one training run would count twice"),
        ({"avg_at_k": None, "se": None, "pass_at_k": None}, "no notion of right"),
        (None, "labels behind it are not known"),
    ],
)
def test_what_makes_no_curve_is_refused(s2d, evaluated, tmp_path, second, says):
    runs = [evaluated("a", "x", 32, 0.5), evaluated("b", "x", 64, 0.6, **(second or {}))]
    if second is None:
        (tmp_path / "b" / "s2d.json").unlink()
    done = s2d("report", *runs, "--label-curve", "curve.svg", cwd=tmp_path)
    assert done.code == 1
    assert says in done.err
    assert not (tmp_path / "curve.svg").exists()
