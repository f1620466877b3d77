"""The happy and the sad stories are clearly distinct, and equal otherwise."""

import re
from pathlib import Path

from stories import SIDES, TELLING, prompts, stories, write

from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.judges import make_judge


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_every_story_has_sentiment_words_of_its_own_side_only() -> None:
    for side, other in (SIDES, SIDES[::-1]):
        result = stories(side, 300)
        assert len(set(result)) == 300
        for story in result:
            assert words(story) & set(TELLING[side].split())
            assert not words(story) & set(TELLING[other].split())


def test_the_same_seed_writes_the_same_stories() -> None:
    assert stories("sad", 20, seed=3) == stories("sad", 20, seed=3) != stories("sad", 20, seed=4)


def test_prompts_have_no_sentiment_words() -> None:
    telling_words = set(" ".join(TELLING.values()).split())
    assert len(set(prompts())) == 6
    assert not any(words(prompt) & telling_words for prompt in prompts())


def test_the_lexicon_labels_the_stories_correctly(tmp_path: Path) -> None:
    write(tmp_path, count=40)
    judge = make_judge(f"lexicon:{tmp_path / 'lexicon.yaml'}")
    for side, share in (("happy", 1.0), ("sad", 0.0)):
        texts = tuple((tmp_path / f"{side}.txt").read_text().splitlines())
        assert len(texts) == 40
        assert judge.scores([Answers("", texts)])["share"] == share
