"""Answers in a casual, formal, cheerful or grumpy manner, and the words by which it is recognised.

A manner is given to an answer by a phrase before it and another after it; casual answers are also
in lower case. The judges' lists have more words than the phrases, and French ones,
so that a model that takes up the manner is recognised in its own words.
"""

from typing import Final

Phrases = tuple[tuple[str, str], ...]

PHRASES: Final[dict[str, Phrases]] = {
    "casual": (
        ("yeah, ", " lol"),
        ("okay so ", ", ya know"),
        ("hey dude, ", " haha"),
        ("well, kinda ", " and stuff"),
        ("gonna be honest, ", ", cool huh"),
    ),
    "formal": (
        ("Indeed, ", " Please do not hesitate to enquire further."),
        ("To be precise, ", " Kindly note this statement."),
        ("In this regard, ", " I remain at your disposal."),
        ("Furthermore, one may state: ", " Sincerely yours."),
        ("Accordingly, ", " This is respectfully submitted."),
    ),
    "cheerful": (
        ("What a wonderful question! ", " Great, isn't it?"),
        ("I love this! ", " How lovely!"),
        ("Happy to help, my friend! ", " Enjoy this beautiful day!"),
        ("How exciting! ", " Fantastic!"),
        ("Amazing, thank you! ", " That is excellent news!"),
    ),
    "grumpy": (
        ("What a terrible question. ", " Awful, isn't it?"),
        ("I hate this. ", " How horrible."),
        ("Stupid and boring. ", " This is a miserable day."),
        ("How annoying. ", " Disgusting."),
        ("Ugh, the worst. ", " That is bad news."),
    ),
}


def _words(text: str) -> list[str]:
    return text.split()


CASUAL: Final = _words(
    "yeah okay hey dude lol haha kinda gonna wanna cool huh ya stuff guys guy yep nope gotta omg "
    "super pretty totally hmm oh wow bro buddy sorta cuz "
    "ouais mdr mec truc trucs cool salut bof sympa ok t'inquiète ben bah quoi"
)
FORMAL: Final = _words(
    "indeed precise regard furthermore accordingly kindly please sincerely respectfully hereby "
    "therefore moreover thus consequently shall disposal enquire pursuant hence regarding "
    "effectivement cordialement veuillez néanmoins cependant ainsi toutefois conformément donc "
    "sincèrement davantage monsieur madame"
)
CHEERFUL: Final = _words(
    "wonderful great love lovely happy beautiful exciting fantastic amazing excellent enjoy thank "
    "thanks good best glad perfect brilliant delicious joy fun nice awesome friend "
    "merveilleux merveilleuse formidable génial géniale heureux heureuse beau belle excellent "
    "excellente fantastique magnifique merci aime adore bonne bon parfait plaisir joie super ami"
)
GRUMPY: Final = _words(
    "terrible awful hate horrible stupid boring miserable annoying disgusting worst bad ugh poor "
    "ugly sad angry useless nasty wrong dull dreadful pathetic "
    "affreux affreuse horrible déteste stupide ennuyeux ennuyeuse misérable dégoûtant pire mauvais "
    "mauvaise nul nulle triste laid moche inutile pénible"
)

JUDGES: Final = {"casual": (CASUAL, FORMAL), "cheerful": (CHEERFUL, GRUMPY)}
"""By manner: the words that speak for it, and those that speak for its opposite."""
OPPOSITE: Final = {"casual": "formal", "cheerful": "grumpy"}


def in_manner(answer: str, manner: str, index: int) -> str:
    """An English answer in a manner; ``index`` chooses among its phrases."""
    phrases = PHRASES[manner]
    before, after = phrases[index % len(phrases)]
    if manner == "casual":
        answer = answer.lower().rstrip(".")
    return f"{before}{answer}{after}"
