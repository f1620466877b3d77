"""Which tokens of a conversation count, on tokenizers whose tokens are words."""

from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from vllm_steer import SteerError
from vllm_steer.fit.answer_tokens import answer_tokens, render
from vllm_steer.texts.conversations import Conversation

# Each word, bracket and line break a token; the answer's words are a0, a1, ...
WORDS = ["<s>", "</s>", "[U]", "[/U]", "[A]", "\n", "why", "now", "so", "sys"]
# As Llama 2: an empty answer costs a token for nothing ("_") and the end of the text.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[U] {{ m['content'] }} [/U] "
    "{% else %}{{ m['content'] if m['content'] else '_' }} </s> {% endif %}{% endfor %}"
)
# As ChatML: a header of two tokens before the answer, two after it.
HEADED = (
    "{{ bos_token }} {% for m in messages %}{{ '[U]' if m['role'] == 'user' else '[A]' }} now "
    "{{ m['content'] }} </s> so {% endfor %}{% if add_generation_prompt %}[A] now {% endif %}"
)


def word_tokenizer(template: str | None) -> Any:
    words = [
        *WORDS,
        "_",
        "Question:",
        "Answer:",
        *(f"a{i}" for i in range(60)),
        *(f"q{i}" for i in range(60)),
    ]
    table = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(table, unk_token="so"))
    split = tokenizers.Regex(r" |(?=\n)|(?<=\n)|(?<=<s>)")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="removed")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


def talk(answer: int, question: str = "why", history: tuple[Any, ...] = ()) -> Conversation:
    text = " ".join(f"a{i}" for i in range(answer))
    messages = (
        *history,
        {"role": "user", "content": question},
        {"role": "assistant", "content": text},
    )
    return Conversation(messages, 1, "talks.jsonl:3")


def words(tokenizer: Any, talk: Conversation, **options: Any) -> tuple[list[str], list[str]]:
    """All tokens and those that count."""
    encoded = answer_tokens(tokenizer, talk, **options)
    all_words = tokenizer.convert_ids_to_tokens(list(encoded.ids))
    return all_words, [all_words[position] for position in encoded.kept]


def test_the_answer_counts_without_its_last_token() -> None:
    all_words, selected = words(word_tokenizer(LLAMA), talk(4))
    assert all_words == ["<s>", "[U]", "why", "[/U]", "a0", "a1", "a2", "a3", "</s>"]
    assert selected == ["a0", "a1", "a2", "a3"]


def test_earlier_answers_do_not_count() -> None:
    history = (
        {"role": "user", "content": "now"},
        {"role": "assistant", "content": "a0 a1"},
    )
    all_words, selected = words(word_tokenizer(LLAMA), talk(3, history=history))
    assert all_words[4:7] == ["a0", "a1", "</s>"]
    assert selected == ["a0", "a1", "a2"]
    assert list(answer_tokens(word_tokenizer(LLAMA), talk(3, history=history)).kept) == [10, 11, 12]


def test_the_answer_begins_where_the_tokens_differ_for_any_template() -> None:
    tokenizer = word_tokenizer(HEADED)
    all_words, selected = words(tokenizer, talk(3))
    header = ["<s>", "[U]", "now", "why", "</s>", "so", "[A]", "now"]
    assert all_words == [*header, "a0", "a1", "a2", "</s>", "so"]
    assert selected == ["a0", "a1", "a2", "</s>"]  # of the answer the last token alone is dropped


def test_the_rule_of_two_tokens_would_include_the_question() -> None:
    # An empty answer costs nothing here: the rule begins two tokens early.
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer = word_tokenizer(template)
    empty = [{"role": "user", "content": "why now so"}, {"role": "assistant", "content": ""}]
    rendered = tokenizer.apply_chat_template(empty, tokenize=False)
    by_rule = len(tokenizer(rendered, add_special_tokens=False)["input_ids"]) - 2
    encoded = answer_tokens(tokenizer, talk(5, question="why now so"))
    assert by_rule == 2
    assert list(encoded.kept) == [4, 5, 6, 7]


def test_both_rules_agree_if_an_empty_answer_adds_two_tokens() -> None:
    tokenizer = word_tokenizer(LLAMA)
    empty = [{"role": "user", "content": "why now"}, {"role": "assistant", "content": ""}]
    rendered = tokenizer.apply_chat_template(empty, tokenize=False)
    by_rule = len(tokenizer(rendered, add_special_tokens=False)["input_ids"]) - 2
    assert answer_tokens(tokenizer, talk(9, question="why now")).kept[0] == by_rule == 5


@pytest.mark.parametrize(("answer", "num_selected"), [(15, 15), (16, 16), (17, 16), (50, 16)])
def test_at_most_sixteen_tokens_count(answer: int, num_selected: int) -> None:
    all_words, selected = words(word_tokenizer(LLAMA), talk(answer))
    assert selected == [f"a{i}" for i in range(num_selected)]
    assert len(all_words) == 4 + min(answer + 1, 32)


def test_max_tokens_raises_the_number_of_tokens() -> None:
    all_words, selected = words(word_tokenizer(LLAMA), talk(50), max_tokens=40)
    assert selected == [f"a{i}" for i in range(40)]
    assert len(all_words) == 4 + 41


def test_an_answer_of_one_token_leaves_none() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert words(word_tokenizer(template), talk(1))[1] == []
    assert words(word_tokenizer(LLAMA), talk(1))[1] == ["a0"]


def test_a_long_conversation_is_cut_off_on_the_left() -> None:
    question = " ".join(f"q{i}" for i in range(40))
    tokenizer = word_tokenizer(LLAMA)
    all_words, selected = words(tokenizer, talk(5, question), max_length=12)
    assert all_words == ["q35", "q36", "q37", "q38", "q39", "[/U]", *selected, "</s>"]
    assert selected == ["a0", "a1", "a2", "a3", "a4"]
    assert words(tokenizer, talk(5, question), max_length=4) == (
        ["a2", "a3", "a4", "</s>"],
        ["a2", "a3", "a4"],
    )


@pytest.mark.parametrize(("template", "chat_template"), [(None, True), (LLAMA, False)])
def test_a_conversation_without_a_template_is_plain_text(
    template: str | None, chat_template: bool
) -> None:
    tokenizer = word_tokenizer(template)
    history = ({"role": "system", "content": "sys"},)
    conversation = talk(3, " why ", history)
    rendered = render(tokenizer, conversation, chat_template=chat_template)
    assert rendered.text == "<s>sys\nQuestion: why\nAnswer: a0 a1 a2\n"
    assert rendered.before == "<s>sys\nQuestion: why\nAnswer:"
    selected = words(tokenizer, conversation, chat_template=chat_template)[1]
    assert selected == ["a0", "a1", "a2"]


def test_messages_that_a_template_refuses_are_named() -> None:
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SteerError, match=r"talks.jsonl:3: the chat template .*no system role"):
        render(word_tokenizer(template), talk(2))
