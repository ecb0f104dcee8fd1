"""Prompts become ids once, with one BOS, and tokenizers that differ are told apart."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from s2dcli.errors import ModelError, UsageError
from s2dcli.files.records import Rollout
from s2dcli.models.prompts import (
    PromptEncoder,
    load_tokenizer,
    parse_template_kwargs,
    require_made_with,
    require_same_tokens,
    tokenizer_sha256,
    unused_ids,
    vocabulary_size,
)
from s2dcli.train.rows import RowMaker

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


def test_worked_solutions_end_with_the_end_of_turn_that_the_template_writes():
    """Phi-3.5's layout: a turn ends with <|end|>, a conversation with the tokenizer's EOS."""
    tokenizer = make("a b c question", template="{% for m in messages %}{{ m['content'] }} <|end|> \n{% endfor %}{{ eos_token }}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    encoder = PromptEncoder(tokenizer)
    assert encoder.encode_completion("b c", eos_ids=(2, end)) == [5, 6, end]
    assert encoder.encode_completion("b c", eos_ids=(2,)) == [5, 6, 2]  # the model stops at nothing else
    assert encoder.encode_completion("b c") == [5, 6, end]  # without a generation config: what the template writes
    assert PromptEncoder(tokenizer, "plain").encode_completion("b c", eos_ids=(2, end)) == [5, 6, 2]


def test_identity_of_tokenizers():
    assert tokenizer_sha256(make()) == tokenizer_sha256(make(template="other"))
    assert tokenizer_sha256(make()) != tokenizer_sha256(make("a c b"))
    assert vocabulary_size(make()) == 7
    tokens = lambda words="a b c": make(words).get_vocab()  # noqa: E731
    require_same_tokens(tokens(), tokens())
    with pytest.raises(ModelError, match="id 5 is 'c' in the teacher and 'b' in the student"):
        require_same_tokens(tokens("a c b"), tokens())
    with pytest.raises(ModelError, match="id 7 is 'd' in the teacher and None in the student"):
        require_same_tokens(tokens("a b c d"), tokens())


def rollout(ids: list[int], text: str, prompt: str = "", prompt_ids: tuple[int, ...] = (1,)) -> Rollout:
    return Rollout(
        problem_id="p",
        problem_sha256="",
        group_id="g",
        sample_index=0,
        prompt=[{"role": "user", "content": prompt}],
        completion=[{"role": "assistant", "content": text}],
        answer="",
        prompt_ids=list(prompt_ids),
        completion_ids=ids,
        completion_logprobs=[0.0] * len(ids),
        finish_reason="stop",
        seed=0,
        source={},
        sampler={},
        template_sha256="",
    )


def check(tokenizer, sample: Rollout) -> None:
    require_made_with(tokenizer, [RowMaker().row(sample)], [sample])


def test_rollouts_of_another_tokenizer_are_noticed():
    check(make(), rollout([4, 5, 2], "a b"))
    with pytest.raises(ModelError, match="made with another tokenizer"):
        check(make("b a c"), rollout([4, 5, 2], "a b"))


def test_tags_around_the_reasoning_stay_in_the_text_though_they_are_special():
    tokenizer = make("a b <think> </think>")
    plain = PromptEncoder(tokenizer, "plain").decode([6, 4, 7, 5, 2])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    encoder = PromptEncoder(tokenizer, "plain")
    assert tokenizer.decode([6, 4, 7, 5, 2], skip_special_tokens=True) == "a b"
    assert encoder.decode([6, 4, 7, 5, 2]) == plain == "<think> a </think> b"
    assert encoder.decode([4, 5, 2]) == "a b"
    check(tokenizer, rollout([6, 4, 7, 5, 2], "<think> a </think> b"))
    check(tokenizer, rollout([6, 4, 7, 5, 2], "a b"))  # of another tool, which leaves the tags out
    with pytest.raises(ModelError, match="made with another tokenizer"):
        check(tokenizer, rollout([6, 4, 7, 5, 2], "a"))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("{{ messages[-1]['content'] }}", USER, False),
        ("{{ messages[-1]['content'] }} <think>\n", USER, True),
        ("{{ messages[-1]['content'] }} <think>\n\n</think>\n", USER, False),
        ("{{ messages[-1]['content'] }} <think> Let me see.", USER, True),
        ("{{ messages[-1]['content'] }} c", [{"role": "user", "content": "Use <think> tags"}], False),
        ("{{ messages[-1]['content'] }}", [*USER, {"role": "assistant", "content": "<think> so"}], True),
        ("{{ messages[-1]['content'] }}", [{"role": "user", "content": "a <think>"}], True),
    ],
)
def test_whether_the_rendered_prompt_ends_inside_the_reasoning(template, messages, expected):
    assert PromptEncoder(make(template=template)).opens_reasoning(messages) is expected


def test_prompts_of_another_tokenizer_are_noticed():
    """Two words swapped that no completion holds; another chat template with the same tokenizer is no reason to refuse."""
    sample = rollout([4, 2], "a", prompt=" b  c\n", prompt_ids=(1, 5, 6))
    check(make(), sample)
    check(make(template="{{ bos_token }} c {{ messages[0]['content'] | trim }} a"), sample)
    with pytest.raises(ModelError, match="'g' was made with another tokenizer: its prompt_ids decode to another text"):
        check(make("a c b"), sample)
    check(make(), rollout([4, 2], "a", prompt="b rare", prompt_ids=(1, 5, 3)))


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
