"""Words of a prompt -> tokens, for CLIP, T5 and both one after the other."""

from types import SimpleNamespace

import pytest

from dittune.call import TextAxis
from dittune.errors import ConfigError
from dittune.samples.shapes import models
from dittune.words.tokens import find_concepts, parse_concepts, prompt_words

CLIP = models.build_tokenizer()  # one token a word of the world, others byte by byte
T5 = models.build_t5_tokenizer()


def clip(length=32):
    return TextAxis(CLIP, "prompt", 0, length)


def t5(first=0, length=40):
    return TextAxis(T5, "prompt_3", first, length)


def words(axes, prompt, *found, t5_prompt=None):
    texts = {"prompt": prompt, "prompt_3": t5_prompt or prompt}
    return prompt_words(axes, texts, [found])


def test_clip_counts_the_start_token():
    found = words([clip()], "a red circle and a blue square", "red", "circle", "blue square")
    assert found.words == ((2,), (3,), (6, 7))
    assert found.tokens == (1, 2, 3, 4, 5, 6, 7)  # without start, end and padding


def test_t5_has_no_start_token():
    found = words([t5()], "a red circle and a blue square", "red", "circle", "blue square")
    assert found.words == ((1,), (2,), (5, 6))
    assert found.tokens == tuple(range(7))


def test_two_axes_give_two_index_sets():
    found = words([clip(), t5(32)], "a red circle", "circle")
    assert found.words == ((3, 32 + 2),)
    assert found.tokens == (1, 2, 3, 32, 33, 34)


def test_a_word_of_several_tokens_in_one_axis_and_one_in_the_other():
    prompt = "a dog, a circle"
    assert words([clip()], prompt, "dog").words == ((2, 3, 4),)
    assert words([clip()], prompt, "circle").words == ((7,),)


@pytest.mark.parametrize("word", ["circle", "CIRCLE", "Circle"])
@pytest.mark.parametrize("prompt", ["a circle.", "a Circle, red", '("circle") - yes', "a\n circle"])
def test_capitals_punctuation_and_spaces_do_not_matter(prompt, word):
    (found,) = words([clip()], prompt, word).words
    assert CLIP.convert_ids_to_tokens([CLIP(prompt).input_ids[i] for i in found]) == ["circle</w>"]


def test_part_of_a_longer_word_is_no_occurrence():
    with pytest.raises(ConfigError, match="'red' is not a word of the prompt 'a redder circle'"):
        words([clip()], "a redder circle", "red")


def test_a_repeated_word_is_all_its_occurrences_or_the_numbered_one():
    prompt = "a red circle and a red square"
    assert words([clip()], prompt, "red", "red#1", "red#2").words == ((2, 6), (2,), (6,))
    assert words([clip(), t5(32)], prompt, "red#2").words == ((6, 37),)
    with pytest.raises(ConfigError, match="'red#3' is not a word"):
        words([clip()], prompt, "red#3")


def test_a_phrase_spans_any_white_space():
    assert words([clip()], "a red   circle", "red circle").words == ((2, 3),)


@pytest.mark.parametrize("prompt", ["a b c d red", "a b c red d"])
def test_a_word_that_is_cut_off_says_so(prompt):
    assert len(CLIP(prompt).input_ids) == 7
    assert words([clip(7)], prompt, "red").words
    with pytest.raises(ConfigError, match=r"'red' is beyond the 5 tokens .*; shorten the prompt"):
        words([clip(5)], prompt, "red")


def test_a_word_half_of_which_is_cut_off_counts_as_cut_off():
    assert words([clip(6)], "a dog", "dog").words == ((2, 3, 4),)
    with pytest.raises(ConfigError, match="beyond the 5 tokens"):
        words([clip(5)], "a dog", "dog")


def test_a_word_that_only_the_longer_axis_reads_is_found_there():
    assert words([clip(5), t5(5)], "a b c d red", "red").words == (
        tuple(5 + i for i in words([t5()], "a b c d red", "red").words[0]),
    )


def test_axes_may_have_prompts_of_their_own():
    assert words([clip(), t5(32)], "a red circle", "blue", t5_prompt="a blue circle").words == (
        (33,),
    )


def test_a_slow_tokenizer_is_refused():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ConfigError, match="load the fast tokenizer"):
        words([TextAxis(slow, "prompt", 0, 77)], "a red circle", "red")


def test_concepts_are_parted_by_commas_and_joined_by_plus():
    assert parse_concepts("red+circle, blue +square#2,hot dog") == (
        ("red", "circle"),
        ("blue", "square#2"),
        ("hot dog",),
    )
    assert parse_concepts(" ") == ()


@pytest.mark.parametrize("text", ["red,", "red++circle", ",", "red, #2"])
def test_empty_words_are_refused(text):
    with pytest.raises(ConfigError, match="concepts are written like 'red\\+circle, blue"):
        parse_concepts(text)


@pytest.mark.parametrize(
    ("prompt", "concepts"),
    [
        ("a red circle and a blue square", "red+circle, blue+square"),
        ("A photo of the cat and two big dogs", "cat, big+dogs"),
        ("a red circle above a red square", "red#1+circle, red#2+square"),
        ("A cat wearing a hat, on a table.", "cat, hat, table"),
        ("an ice-cream's cone", "ice-cream's+cone"),
        ("a cat on a white background", "cat"),
        ("of and the", ""),
        ("", ""),
    ],
)
def test_noun_groups_of_a_prompt(prompt, concepts):
    found = find_concepts(prompt)
    assert found == parse_concepts(concepts)
    assert all(words([clip(99)], prompt, *concept).words for concept in found)
