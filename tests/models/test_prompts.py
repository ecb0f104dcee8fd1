"""Prompts become ids once, with one BOS, and tokenizers that differ are told apart."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from s2dcli.errors import ModelError, UsageError
from s2dcli.models.prompts import (
    PromptEncoder,
    load_tokenizer,
    parse_template_kwargs,
    require_made_with,
    require_same_tokenizer,
    tokenizer_sha256,
    unused_ids,
    vocabulary_size,
)

USER = [{"role": "user", "content": "a b"}]


def make(words: str = "a b c", template: str | None = None, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that, like Llama's, puts BOS before every text of its own accord."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words.split()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_writes_bos_gets_no_second_one():
    encoder = PromptEncoder(make(template="{{ bos_token }} {{ messages[0]['content'] }} c"))
    assert encoder.encode(USER) == [1, 4, 5, 6]


def test_a_template_without_bos_gets_none():
    assert PromptEncoder(make(template="{{ messages[0]['content'] }}")).encode(USER) == [4, 5]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_plain_text_gets_the_tokenizers_own_bos_and_stays_open(adds_eos):
    assert PromptEncoder(make(adds_eos=adds_eos), "plain").encode(USER) == [1, 4, 5]
    two = [*USER, {"role": "user", "content": "c"}]
    assert PromptEncoder(make(), "plain").encode(two) == [1, 4, 5, 6]


def test_plain_messages_are_parted_by_an_empty_line():
    encoder = PromptEncoder(make(), "plain")
    text = encoder.tokenizer.apply_chat_template([*USER, *USER], chat_template=encoder.template, tokenize=False)
    assert text == "a b\n\na b"


def test_template_arguments_and_files(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0]['content'] }}{% if think %} c{% endif %}")
    short, long = PromptEncoder(make(), str(path)), PromptEncoder(make(), str(path), {"think": True})
    assert short.encode(USER) == [4, 5]
    assert long.encode(USER) == [4, 5, 6]
    assert short.template_sha256 != long.template_sha256
    assert long.description == f'{path} {{"think": true}}'
    with pytest.raises(UsageError, match="cannot read the chat template"):
        PromptEncoder(make(), str(tmp_path / "none.jinja"))


def test_a_missing_template_is_an_error_that_names_the_option():
    with pytest.raises(UsageError, match="--chat-template plain"):
        PromptEncoder(make())


def test_a_prompt_of_no_tokens_is_refused():
    with pytest.raises(UsageError, match="no tokens"):
        PromptEncoder(make(template="{{ '' }}")).encode(USER)


def test_completions_are_closed_by_eos_and_decode_without_it():
    encoder = PromptEncoder(make(template="x"))
    assert encoder.encode_completion("b c") == [5, 6, 2]
    assert encoder.decode([5, 6, 2]) == "b c"


def test_identity_of_tokenizers():
    assert tokenizer_sha256(make()) == tokenizer_sha256(make(template="other"))
    assert tokenizer_sha256(make()) != tokenizer_sha256(make("a c b"))
    assert vocabulary_size(make()) == 7
    require_same_tokenizer(make(), make())
    with pytest.raises(ModelError, match="id 5 is 'c' in the teacher and 'b' in the student"):
        require_same_tokenizer(make("a c b"), make())
    with pytest.raises(ModelError, match="id 7 is 'd' in the teacher and None in the student"):
        require_same_tokenizer(make("a b c d"), make())


def record(ids: list[int], text: str) -> dict:
    return {
        "group_id": "g",
        "sample_index": 0,
        "prompt_ids": [1],
        "completion_ids": ids,
        "completion": [{"role": "assistant", "content": text}],
    }


def test_rollouts_of_another_tokenizer_are_noticed():
    require_made_with(make(), [record([4, 5, 2], "a b")])
    with pytest.raises(ModelError, match="made with another tokenizer"):
        require_made_with(make("b a c"), [record([4, 5, 2], "a b")])


def test_prompts_of_another_tokenizer_are_noticed():
    """Two words swapped that no completion holds; another chat template with the same tokenizer is no reason to refuse."""
    prompt = {"prompt": [{"role": "user", "content": " b  c\n"}], "prompt_ids": [1, 5, 6]}
    rows = [{**record([4, 2], "a"), **prompt}]
    require_made_with(make(), rows)
    require_made_with(make(template="{{ bos_token }} c {{ messages[0]['content'] | trim }} a"), rows)
    with pytest.raises(ModelError, match="'g' was made with another tokenizer: its prompt_ids decode to another text"):
        require_made_with(make("a c b"), rows)
    unknown = [{**rows[0], "prompt": [{"role": "user", "content": "b rare"}], "prompt_ids": [1, 5, 3]}]
    require_made_with(make(), unknown)


def test_ids_without_a_token():
    tokenizer = make()
    assert unused_ids(tokenizer) == ()
    tokenizer.get_vocab = lambda: {"<s>": 1, "</s>": 2, "a": 4, "b": 6}
    assert unused_ids(tokenizer) == (0, 3, 5)


@pytest.mark.parametrize(
    ("template", "kwargs", "message"),
    [
        ("{{ raise_exception('no system role here') }}", {}, "cannot render problem 'p7': no system role here"),
        ("{% if %}", {}, r"line 1: is no valid Jinja"),
        ("{{ messages[0].content.nothing() }}", {}, "cannot render problem 'p7': .*nothing"),
        ("{{ 1 + messages[0].content }}", {}, "cannot render problem 'p7': "),
        ("{{ messages[0].content }}", {"tokenize": True, "messages": []}, "--chat-template-kwargs: messages, tokenize cannot be set"),
    ],
)
def test_templates_that_fail_are_one_error_with_the_problem(template, kwargs, message):
    with pytest.raises(UsageError, match=message):
        PromptEncoder(make(template=template), None, kwargs).encode(USER, "problem 'p7'")


def test_folders_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_template_kwargs_must_be_an_object():
    assert parse_template_kwargs('{"enable_thinking": false}') == {"enable_thinking": False}
    for text in ("[1]", "{", "3"):
        with pytest.raises(UsageError):
            parse_template_kwargs(text)
