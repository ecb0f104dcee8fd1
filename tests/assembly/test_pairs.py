"""What teacher and student must share, and what is said where they do not."""

import json
import shutil

import pytest

from s2dcli.assembly.pairs import require_same_pair
from s2dcli.errors import ModelError
from s2dcli.models.checkpoints import resolve
from s2dcli.models.prompts import load_tokenizer
from s2dcli.options import ModelOptions


@pytest.fixture
def teacher(toy, tmp_path):
    """A copy of the toy teacher, to be changed."""
    return shutil.copytree(toy / "teacher", tmp_path / "teacher")


def check(teacher, toy, **loading):
    student = resolve(str(toy / "student"))
    require_same_pair(resolve(str(teacher)), student, load_tokenizer(student.folder), ModelOptions(**loading))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_pair_of_one_family_passes_without_a_word(teacher, toy, capfd):
    check(teacher, toy)
    assert capfd.readouterr().err == ""


def test_an_added_token_of_one_side_is_named(teacher, toy):
    added = {"id": 33, "content": "<think>", "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    edit(teacher / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(added))
    with pytest.raises(ModelError, match="id 33 is '<think>' in the teacher and None in the student"):
        check(teacher, toy)


def test_a_head_that_is_narrower_than_the_tokenizer_is_refused_before_it_is_loaded(teacher, toy):
    edit(teacher / "config.json", lambda config: config.update(vocab_size=32))
    with pytest.raises(ModelError, match=r"the teacher's head has 32 ids, its tokenizer 33: .*resize_token_embeddings\(33\)"):
        check(teacher, toy)


@pytest.mark.parametrize("eos", [[3, 4], [4]])
def test_another_eos_is_refused_either_way(teacher, toy, eos):
    edit(teacher / "generation_config.json", lambda config: config.update(eos_token_id=eos))
    with pytest.raises(ModelError, match=r"end a completion with different tokens: .*4 \('\\n'\)") as caught:
        check(teacher, toy)
    assert "eos_token_id" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_chat_template_is_told_with_where_it_differs(teacher, toy, capfd):
    template = (teacher / "chat_template.jinja").read_text()
    (teacher / "chat_template.jinja").write_text(template[:40] + "X" + template[40:])
    check(teacher, toy)
    assert "the chat templates of teacher and student differ from character 40 on" in capfd.readouterr().err
    check(teacher, toy, chat_template="plain")
    assert capfd.readouterr().err == ""
