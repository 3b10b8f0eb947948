"""Words of a prompt: which tokens of the model's text axis they are.

Words are found by the character offsets of the tokenizer, so sub-words, punctuation and capitals do
not matter. Concepts are written `red+circle, blue+square`: commas part concepts, a plus joins the
words of one. A word may be a phrase (`hot dog`); it stands for all its occurrences, and `dog#2` for
the second one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dittune.call import TextAxis
from dittune.errors import ConfigError
from dittune.run import ModelInputs

Concept = tuple[str, ...]  # its words

# What cannot be part of a noun group, for `find_concepts`.
DETERMINERS = "a an the this that these those some any each every another no both all its his her"
NUMBERS = "one two three four five six seven eight nine ten several many few"
CONJUNCTIONS = "and or but nor while"
PREPOSITIONS = (
    "of in on at by with without from to into onto over under above below beside besides behind"
    " between among near inside outside around through across against for as next left right front"
)
VERBS = (
    "is are was were be being has have having wears wearing holds holding sits sitting stands"
    " standing rides riding lies lying walks walking runs running plays playing eats eating"
    " flies flying looks looking there it they who which"
)
BOUNDARIES = set(" ".join((DETERMINERS, NUMBERS, CONJUNCTIONS, PREPOSITIONS, VERBS)).split())
# "a photo of a cat" is about the cat.
MEDIUM = re.compile(
    r"\b(photo|photograph|picture|image|painting|drawing|illustration|render|sketch)\s+of\b", re.I
)
BEHIND = {"background", "backdrop", "backgrounds", "backdrops"}


class PromptWords(NamedTuple):
    """The concepts of one prompt on the model's text axis.

    Attributes:
        tokens: all tokens of the prompt itself, without special tokens and padding.
        concepts: for each concept, for each of its words, its tokens.
        labels: the words of each concept, as text.
    """

    tokens: tuple[int, ...]
    concepts: tuple[tuple[tuple[int, ...], ...], ...]
    labels: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word, whichever concept it belongs to."""
        return tuple(word for concept in self.concepts for word in concept)


def parse_concepts(text: str) -> tuple[Concept, ...]:
    """`red+circle, blue+square` as `(("red", "circle"), ("blue", "square"))`; "" is `()`.

    Raises:
        ConfigError: a concept or a word without a letter.
    """
    if not text.strip():
        return ()
    concepts = tuple(tuple(w.strip() for w in part.split("+")) for part in text.split(","))
    if not all(word and not word.startswith("#") for concept in concepts for word in concept):
        raise ConfigError(
            f"concepts are written like 'red+circle, blue+square', got {text!r}: an empty word"
        )
    return concepts


def find_concepts(prompt: str) -> tuple[Concept, ...]:
    """The noun groups of a prompt, by a simple rule.

    A noun group is a longest run of words without punctuation, determiner, number, conjunction,
    preposition or one of a few common verbs: "a red circle and two dogs" has `red+circle` and
    `dogs`. The last word of a group is its noun. What is no object is left out: a medium before
    "of" ("a photo of"), and a group whose noun is `background` or `backdrop`.
    """
    groups: list[list[str]] = [[]]
    seen: dict[str, int] = {}
    medium = [match.span(1) for match in MEDIUM.finditer(prompt)]
    for match in re.finditer(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", prompt):
        word = match[0].lower()
        if not word[0].isalpha() or word in BOUNDARIES or match.span() in medium:
            groups.append([])
            continue
        if len(_spans(prompt, word)) > 1:
            seen[word] = seen.get(word, 0) + 1
            word = f"{word}#{seen[word]}"
        groups[-1].append(word)
    return tuple(tuple(group) for group in groups if group and group[-1] not in BEHIND)


def find_rivals(prompt: str) -> tuple[Concept, ...]:
    """The noun groups of a prompt that has two or more; none of one that has less.

    A concept alone competes with no other: what is done for it only does harm.
    """
    found = find_concepts(prompt)
    return found if len(found) > 1 else ()


def prompt_words(
    axes: Sequence[TextAxis], texts: Mapping[str, str], concepts: Sequence[Concept]
) -> PromptWords:
    """Where the concepts of a prompt are on the model's text axis.

    Args:
        axes: the tokenizers of the model, each with its part of the text axis.
        texts: the prompt of each axis by pipeline argument.
        concepts: the words to look for.

    Raises:
        ConfigError: a word is in no prompt, or only beyond what the text encoders read, or a
            tokenizer has no character offsets.
    """
    encoded = [_encode(axis, texts[axis.argument]) for axis in axes]
    return PromptWords(
        tuple(token for tokens in encoded for token, _, _ in tokens),
        tuple(
            tuple(_word_tokens(axes, texts, encoded, word) for word in concept)
            for concept in concepts
        ),
        tuple(" ".join(concept) for concept in concepts),
    )


def words_of_pictures(
    inputs: ModelInputs,
    asked: Sequence[Concept],
    find: Callable[[str], Sequence[Concept]],
    name: str,
) -> list[PromptWords]:
    """The words of every picture of a generation, from its prompts.

    Args:
        inputs: a denoiser call with conditional rows.
        asked: the concepts of every prompt.
        find: if none are asked for, the concepts of a prompt; those that are cut off are left out.
        name: of the method that asks, for messages.

    Raises:
        ConfigError: the pipeline was given no prompt, or makes a video, or as `prompt_words`.
    """
    run = inputs.run
    if not run.prompts:
        raise ConfigError(
            f"{name} needs the words of the prompt; attach to the pipeline and pass it `prompt`, "
            "not embeddings"
        )
    kwargs = inputs.only("cond").kwargs
    count = len(kwargs[inputs.batched[0]])
    if len(run.prompts["prompt"]) != count:
        raise ConfigError(
            f"{name}: the pipeline makes {count} pictures of {len(run.prompts['prompt'])} prompts; "
            "pass one prompt a picture"
        )
    facts = run.host.facts
    if not hasattr(facts, "text_axes"):
        raise ConfigError(f"{name} reads maps of words in pictures, not yet in a video")
    axes = facts.text_axes(run.host.pipe, kwargs)
    texts = [{key: run.prompts[key][i] for key in run.prompts} for i in range(count)]
    if asked:
        return [prompt_words(axes, text, asked) for text in texts]
    return [prompt_words(axes, text, _read(axes, text, find(text["prompt"]))) for text in texts]


def _read(
    axes: Sequence[TextAxis], texts: Mapping[str, str], concepts: Sequence[Concept]
) -> list[Concept]:
    """The concepts without those of which a text encoder does not read a word."""

    def is_read(concept: Concept) -> bool:
        try:
            prompt_words(axes, texts, [concept])
        except ConfigError:
            return False
        return True

    return [concept for concept in concepts if is_read(concept)]


def _encode(axis: TextAxis, text: str) -> list[tuple[int, int, int]]:
    """`(place on the text axis, first character, one past the last)` of each token of a prompt."""
    if not axis.tokenizer.is_fast:
        raise ConfigError(
            f"{type(axis.tokenizer).__name__} does not know the characters of its tokens; "
            "load the fast tokenizer"
        )
    offsets = axis.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) > axis.length:  # cut off, and the last token is the end of the text
        offsets = offsets[: axis.length - 1]
    return [(axis.first + i, first, last) for i, (first, last) in enumerate(offsets) if last]


def _word_tokens(
    axes: Sequence[TextAxis],
    texts: Mapping[str, str],
    encoded: Sequence[list[tuple[int, int, int]]],
    word: str,
) -> tuple[int, ...]:
    found: list[int] = []
    is_there = False
    for axis, tokens in zip(axes, encoded, strict=True):
        read = max((last for _, _, last in tokens), default=0)
        for first, last in _spans(texts[axis.argument], word):
            is_there = True
            if last <= read:
                found += [place for place, a, b in tokens if a < last and first < b]
    if found:
        return tuple(dict.fromkeys(found))
    prompts = " / ".join(repr(text) for text in dict.fromkeys(texts[a.argument] for a in axes))
    if is_there:
        raise ConfigError(
            f"{word!r} is beyond the {max(axis.length for axis in axes)} tokens that the text "
            f"encoder reads of {prompts}; shorten the prompt"
        )
    raise ConfigError(f"{word!r} is not a word of the prompt {prompts}; name one that is")


def _spans(text: str, word: str) -> list[tuple[int, int]]:
    """First and one-past-last character of a word's occurrences, or of the one it numbers."""
    numbered = re.fullmatch(r"(.+?)#([1-9]\d{0,3})", word)
    bare = numbered[1] if numbered else word
    pattern = r"\s+".join(re.escape(part) for part in bare.split())
    before = r"(?<!\w)" if bare[0].isalnum() else ""
    after = r"(?!\w)" if bare[-1].isalnum() else ""
    spans = [match.span() for match in re.finditer(before + pattern + after, text, re.IGNORECASE)]
    if numbered:
        number = int(numbered[2])
        return spans[number - 1 : number]
    return spans
