"""One row per task: files of three rows or so in the format of its source, what they become, and what is refused.

`golden` holds, by prompt, what the first training row is asked, with ‹› where the answer stands, and what may stand
there. The strings are written by hand from the published templates (MeZO's, LM-BFF's, PET's), not from our code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Golden = dict[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class TaskCase:
    """good: files of a local copy, and the texts and labels of its training rows. bad: files, and the message."""

    good: dict[str, str]
    rows: list[tuple[str, int]]
    bad: tuple[tuple[dict[str, str], str], ...]
    golden: Golden


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def without(content: str, key: str) -> str:
    """JSON lines with `key` misspelt."""
    return content.replace(f'"{key}"', f'"{key}x"')


_FILM = ("negative", "positive")
_FILM_GOLDEN: Golden = {
    "causal": ("Review: {}\nSentiment:‹›", (" negative", " positive")),
    "masked": ("{} It was ‹›.", ("terrible", "great")),
    "text-to-text": ("Review: {}\nSentiment:‹›", _FILM),
    "causal:mezo": ("{} It was ‹›", ("terrible", "great")),
}


def film(text: str) -> Golden:
    return {name: (question.format(text), words) for name, (question, words) in _FILM_GOLDEN.items()}


_REVIEWS = "text,label,source\n" + "".join(f'"film, {i}",{i % 2},rotten_tomatoes\n' for i in range(10))

_SNLI = lines(
    {"premise": "A man sleeps.", "hypothesis": "A man runs.", "label": "contradiction"},
    {"premise": "Two dogs play", "hypothesis": "Animals play.", "label": "entailment"},
    {"premise": "I see.", "hypothesis": "I am tall.", "label": "neutral"},
)
_SUPPOSE = ('Suppose A man sleeps. Can we infer that "A man runs."? Yes, No, or Maybe?', ("Yes", "Maybe", "No"))
_NLI_GOLDEN: Golden = {
    "causal": (_SUPPOSE[0] + "\n‹›", _SUPPOSE[1]),
    "masked": ("A man sleeps? ‹›, a man runs.", _SUPPOSE[1]),
    "text-to-text": (_SUPPOSE[0] + "‹›", _SUPPOSE[1]),
}

_CB = lines(
    {"premise": "A man sleeps.", "hypothesis": "A man runs.", "idx": 0, "label": 1},
    {"premise": "It rains, he said!", "hypothesis": "it rains", "idx": 1, "label": 0},
    {"premise": "Perhaps.", "hypothesis": "so", "idx": 2, "label": 2},
)
_RTE = lines(
    {"premise": "Rome fell in 476.", "hypothesis": "Rome fell.", "label": "entailment"},
    {"premise": "No one came.", "hypothesis": "Ann came.", "label": "not_entailment"},
    {"premise": "He sings.", "hypothesis": "He dances.", "label": "not_entailment"},
)
_BOOLQ = lines(
    {"question": "is the sky blue", "answer": True, "passage": "The sky looks blue by day."},
    {"question": "do fish fly", "answer": False, "passage": "Most fish swim."},
    {"question": "Can cats swim?", "answer": True, "passage": "Cats can swim."},
)
_WIC = lines(
    {
        "word": "bank",
        "pos": "N",
        "index1": 3,
        "sentence1": "A river bank .",
        "sentence2": "The bank pays .",
        "label": False,
    },
    {"word": "feel", "sentence1": "I feel it.", "sentence2": "She felt it.", "label": True, "version": 1.1},
    {"word": "go", "sentence1": "Go on.", "sentence2": "He goes on.", "label": True},
)
_WSC = lines(
    {"text": "Ann told Eve that She won.", "target": {"span1_text": "Ann", "span2_text": "She"}, "label": True},
    {"text": "The cup broke; it was old.", "target": {"span1_text": "The cup", "span2_text": "it"}, "label": True},
    {"text": "Tom saw Max as he left.", "target": {"span1_text": "Max", "span2_text": "he"}, "label": False},
)
_MULTIRC = lines(
    *(
        {
            "passage": {
                "text": text,
                "questions": [
                    {"question": f"Who {verb}?", "answers": [{"text": "Ann", "label": 1}, {"text": "Eve", "label": 0}]}
                ],
            }
        }
        for text, verb in (("Ann came.", "came"), ("Ann sang.", "sang"), ("Ann left.", "left"))
    )
)
_COPA = lines(
    {"premise": "The glass broke.", "choice1": "It fell.", "choice2": "I slept.", "question": "cause", "label": 0},
    {
        "premise": "It rained.",
        "choice1": "It was dry.",
        "choice2": "The street got wet.",
        "question": "effect",
        "label": 1,
    },
    {"premise": "He ran.", "choice1": "He was late.", "choice2": "He was early.", "question": "cause", "label": 0},
)
_NEWS = "Ann met Bob in Rome.\n@highlight\nAnn smiled\n@highlight\nBob left"
_RECORD = lines(
    *(
        {
            "source": "news",
            "passage": {
                "text": _NEWS,
                "entities": [
                    {"start": 0, "end": 2},
                    {"start": 8, "end": 10},
                    {"start": 15, "end": 18},
                    {"start": 32, "end": 34},
                ],
            },
            "qas": [
                {"query": "In Rome, @placeholder met Ann's friend", "answers": [{"start": 8, "end": 10, "text": "Bob"}]}
            ],
        }
        for _ in range(1)
    )
)
_RECORD_HUB = {
    "passage": _NEWS,
    "query": "So @placeholder left",
    "entities": ["Bob", "Ann"],
    "answers": ["Ann", "Bob"],
    "idx": {"passage": 0, "query": 0},
}
_SQUAD = lines(
    *(
        {
            "id": str(i),
            "context": context,
            "question": question,
            "answers": {"text": [answer, answer], "answer_start": [0, 0]},
        }
        for i, (context, question, answer) in enumerate(
            [
                ("The Nile is long.", "What is long?", "The Nile"),
                ("The Nile is long.", "How is it?", "long"),
                ("Ann sings.", "Who sings?", "Ann"),
                ("It is 4 pm.", "When?", "4 pm"),
            ]
        )
    )
)
_SQUAD_TITLED = lines({"title": "Rivers", "context": "The Nile.", "question": "What?", "answers": {"text": ["Nile"]}})
_DROP = lines(
    {
        "passage": "A scored 3, B 4.",
        "question": "How many in all? ",
        "answers_spans": {"spans": ["7", "seven"], "types": []},
    },
    {
        "passage": "A and B won.",
        "question": "Who won?",
        "answers_spans": {"spans": ["A", "B"], "types": ["span", "span"]},
    },
    {"passage": "A left in 1901.", "question": "When?", "answers_spans": {"spans": ["1901"], "types": ["date"]}},
)
_QUESTION_OF_RTE = 'Rome fell in 476.\nDoes this mean that "Rome fell." is true? Yes or No?'
_QUESTION_OF_WIC = (
    'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank .\nThe bank pays .'
)
_QUESTION_OF_WSC = (
    'Ann told Eve that She won.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?'
)
_QUESTION_OF_MULTIRC = 'Ann came.\nQuestion: Who came?\nI found this answer "Ann". Is that correct? Yes or No?'
_NO_YES = ("No", "Yes")
_GRADES = ("terrible", "bad", "okay", "good", "great")
_KINDS = ("Description", "Entity", "Expression", "Human", "Location", "Number")
_TOPICS = ("World", "Sports", "Business", "Technology")
_POINTS = "Ann met Bob in Rome.\n- Ann smiled\n- Bob left\n-"
_FILLED = tuple(f"In Rome, {name} met Ann's friend" for name in ("Ann", "Bob", "Rome"))
_TREC = (
    "question\tlabel\tcoarse\tfine\nWhere is Rome ?\t4\tLOC\tLOC:city\nWho ran ?\t3\tHUM\tHUM:ind\nWhy ?\t0\tDESC\tx\n"
)

TASKS: dict[str, TaskCase] = {
    "sst2": TaskCase(
        {
            "train.tsv": 'sentence\tlabel\na "fine" film\t1\nno plot\t0\n',
            "dev.tsv": "sentence\tlabel\nbright\t1\n",
        },
        [('a "fine" film', 1), ("no plot", 0)],
        (
            (
                {},
                r"sst2 needs a folder with train, dev .or validation. and test files .*jsonl\), got none",
            ),
            (
                {"train.tsv": "sentence\tlabel\nx\t2\n", "dev.tsv": "sentence\tlabel\ny\t1\n"},
                r"label must be 0 \(negative\) or 1 \(positive\), got '2'",
            ),
            ({"train.tsv": "text\tlabel\nx\t1\n", "dev.tsv": "sentence\tlabel\ny\t1\n"}, "sentence"),
        ),
        film('a "fine" film'),
    ),
    "rotten-tomatoes": TaskCase(
        {"reviews.csv": _REVIEWS},
        [(f"film, {i}", i % 2) for i in (2, 8, 4, 9, 1, 6, 7, 3)],  # numpy's RandomState(0).permutation(10), first 80%
        (
            ({}, "needs CSV, TSV or JSONL files in the folder, got none"),
            ({"reviews.csv": "text,label\nx,1\n"}, "must have at least 10 rows to split 80/10/10, got 1"),
            (
                {"reviews.csv": _REVIEWS.replace(",1,rotten", ",7,rotten")},
                "label must be 0 .negative. or 1 .positive., got '7'",
            ),
            ({"a.csv": _REVIEWS, "b.csv": _REVIEWS}, "needs a folder with train, dev .or validation. and test files"),
            ({"reviews.csv": _REVIEWS.replace("label", "verdict")}, "label"),
        ),
        film("film, 2"),
    ),
    "imdb": TaskCase(
        {
            "train.csv": "text,label,source\nBad,0,imdb\n\"Good.<br /><br />Very, 'good'.\",1,imdb\nshort,0,other\n",
            "test.csv": "text,label\nFine,1\n",
        },
        [("Good. Very, 'good'.", 1)],
        (
            ({"train.csv": "text,label,source\na,1,x\n"}, "some rows must be of source imdb, got none"),
            ({"train.csv": "text,label\na,pos\n"}, "label must be 0 .negative. or 1 .positive., got 'pos'"),
        ),
        film("Good. Very, 'good'."),
    ),
    "sst5": TaskCase(
        {
            "train.tsv": "sentence\tlabel\nso so .\t2\ngrand !\t4\nawful\t0\n",
            "dev.jsonl": lines({"text": "fine", "label": 3, "label_text": "positive"}),
        },
        [("so so .", 2), ("grand !", 4), ("awful", 0)],
        (
            ({"train.tsv": "sentence\tlabel\nx\t5\n"}, r"label must be 0 \(very negative\), .* or 4 .*, got '5'"),
            ({"train.tsv": "sentenc\tlabel\nx\t1\n"}, "unknown column for the text 'sentence'; did you mean 'sentenc'"),
        ),
        {
            "causal": ("Review: so so .\nThe film is ‹›", _GRADES),
            "masked": ("so so . It was ‹›.", _GRADES),
            "text-to-text": ("Review: so so .\nThe film is‹›", _GRADES),
            "causal:mezo": ("so so . It was ‹›", _GRADES),
        },
    ),
    "trec": TaskCase(
        {"train.tsv": _TREC, "test.tsv": _TREC},
        [("Why ?", 0), ("Who ran ?", 3)],  # numpy's RandomState(0).permutation(3) is 2, 1, 0; a tenth, at least a row
        (
            ({"train.tsv": _TREC.replace("LOC\t", "SPACE\t")}, "label must be 0 .DESC.*got 'SPACE'"),
            ({"train.tsv": "q\tlabel\nx\t1\n"}, "unknown column for the text 'question'"),
        ),
        {
            "causal": ("Question: Why ?\nAnswer type: ‹›", _KINDS),
            "masked": ("‹›: Why ?", _KINDS),
            "text-to-text": ("Question: Why ?\nAnswer type:‹›", _KINDS),
        },
    ),
    "ag-news": TaskCase(
        {"train.csv": "text,label\nStocks fell.,2\nA game.,1\n", "dev.csv": "text,label\nTalks.,World\n"},
        [("Stocks fell.", 2), ("A game.", 1)],
        (({"train.csv": "text,label\nx,4\n"}, "label must be .* or 3 .Sci/Tech., got '4'"),),
        {
            "causal": ("News: Stocks fell.\nTopic: ‹›", _TOPICS),
            "masked": ("‹› news: Stocks fell.", _TOPICS),
            "text-to-text": ("News: Stocks fell.\nTopic:‹›", _TOPICS),
        },
    ),
    "snli": TaskCase(
        {
            "train.jsonl": _SNLI + lines({"premise": "A", "hypothesis": "B", "label": "-"}),
            "dev.jsonl": _SNLI,
        },
        [("A man sleeps.", 2), ("Two dogs play", 0), ("I see.", 1)],
        (
            (
                {"dev.jsonl": without(_SNLI, "hypothesis")},
                "unknown column for the hypothesis 'hypothesis'; did you mean",
            ),
            (
                {"dev.jsonl": _SNLI.replace("neutral", "nix")},
                "label must be 0 .entailment., 1 .neutral. or 2 .*got 'nix'",
            ),
            ({"dev.jsonl": _SNLI.replace("I see.", " ")}, "line 3: column 'premise' must hold text, got an empty one"),
        ),
        _NLI_GOLDEN,
    ),
    "mnli": TaskCase(
        {"train.jsonl": _SNLI, "dev.jsonl": _SNLI},
        [("A man sleeps.", 2), ("Two dogs play", 0), ("I see.", 1)],
        (({"dev.jsonl": _SNLI.replace('"neutral"', '"-"')}, "line 3: label must be .*got '-'"),),
        _NLI_GOLDEN,
    ),
    "rte": TaskCase(
        {"train.jsonl": _RTE, "dev.jsonl": _RTE},
        [("Rome fell in 476.", 0), ("No one came.", 1), ("He sings.", 1)],
        (
            ({"train.jsonl": without(_RTE, "label")}, "unknown column for the label 'label'; did you mean 'labelx'"),
            ({"RTE.jsonl": _RTE.replace("not_ent", "no_ent")}, "label must be 0 .entailment. or 1 .not_entailment."),
            ({"rte.txt": _RTE}, r"rte needs a folder with train, .* or RTE.jsonl \("),
        ),
        {
            "causal": (_QUESTION_OF_RTE + "\n‹›", ("Yes", "No")),
            "masked": ("Rome fell in 476? ‹›, rome fell.", ("Yes", "No")),
            "text-to-text": (_QUESTION_OF_RTE + "‹›", ("Yes", "No")),
        },
    ),
    "cb": TaskCase(
        {"train.jsonl": _CB, "validation.jsonl": _CB, "test.jsonl": _CB.replace('label": ', 'label": -1, "was": ')},
        [("A man sleeps.", 1), ("It rains, he said!", 0), ("Perhaps.", 2)],
        (
            (
                {"train.jsonl": _CB, "dev.jsonl": _CB, "validation.jsonl": _CB},
                "must hold one validation file, got dev.jsonl",
            ),
        ),
        {name: (question, ("Yes", "No", "Maybe")) for name, (question, _) in _NLI_GOLDEN.items()},
    ),
    "boolq": TaskCase(
        {"train.jsonl": _BOOLQ, "validation.jsonl": _BOOLQ},
        [("The sky looks blue by day.", 1), ("Most fish swim.", 0), ("Cats can swim.", 1)],
        (({"train.jsonl": _BOOLQ.replace("true", "3")}, "label must be 0 .no. or 1 .yes., got '3'"),),
        {
            "causal": ("The sky looks blue by day. Is the sky blue?\n‹›", _NO_YES),
            "masked": ("The sky looks blue by day. Question: Is the sky blue? Answer: ‹›.", _NO_YES),
            "text-to-text": ("The sky looks blue by day. Is the sky blue?‹›", _NO_YES),
        },
    ),
    "wic": TaskCase(
        {"train.jsonl": _WIC, "dev.jsonl": _WIC},
        [("bank: A river bank .", 0), ("feel: I feel it.", 1), ("go: Go on.", 1)],
        (({"train.jsonl": without(_WIC, "word")}, "unknown column for the word 'word'; did you mean 'wordx'"),),
        {
            "causal": (_QUESTION_OF_WIC + "\n‹›", _NO_YES),
            "masked": ('"A river bank ." "The bank pays ." Same meaning of "bank"? ‹›.', _NO_YES),
            "text-to-text": (_QUESTION_OF_WIC + "‹›", _NO_YES),
        },
    ),
    "wsc": TaskCase(
        {"train.jsonl": _WSC, "dev.jsonl": _WSC},
        [("Ann told Eve that She won.", 1), ("The cup broke; it was old.", 1), ("Tom saw Max as he left.", 0)],
        (({"train.jsonl": without(_WSC, "span1_text")}, "column 'span1_text' must hold text, got nothing"),),
        {
            "causal": (_QUESTION_OF_WSC + "\n‹›", _NO_YES),
            "masked": ('Ann told Eve that She won. Does the pronoun "she" refer to Ann? ‹›.', _NO_YES),
            "text-to-text": (_QUESTION_OF_WSC + "‹›", _NO_YES),
        },
    ),
    "multirc": TaskCase(
        {"train.jsonl": _MULTIRC, "dev.jsonl": _MULTIRC},
        [(f"Ann {verb}.", label) for verb in ("came", "sang", "left") for label in (1, 0)],
        (({"MultiRC.jsonl": without(_MULTIRC, "questions")}, "line 1: 'passage' must hold text, questions and their"),),
        {
            "causal": (_QUESTION_OF_MULTIRC + "\n‹›", _NO_YES),
            "masked": ('Ann came. Question: Who came? Is the correct answer "Ann"? ‹›.', _NO_YES),
            "text-to-text": (_QUESTION_OF_MULTIRC + "‹›", _NO_YES),
        },
    ),
    "copa": TaskCase(
        {"train.jsonl": _COPA, "validation.jsonl": _COPA},
        [("The glass broke.", 0), ("It rained.", 1), ("He ran.", 0)],
        (({"COPA.jsonl": _COPA.replace('"effect"', '"affect"')}, "unknown question 'affect'; did you mean 'effect'"),),
        {
            "causal": ("The glass broke because ‹›", ("it fell.", "I slept.")),
            "masked": ('"it fell" or "I slept"? The glass broke, because ‹›', ("it fell.", "I slept.")),
            "text-to-text": ("The glass broke because‹›", ("it fell.", "I slept.")),
        },
    ),
    "record": TaskCase(
        {"train.jsonl": _RECORD, "dev.jsonl": lines(_RECORD_HUB)},
        [(_NEWS, 1)],
        (
            ({"ReCoRD.jsonl": _RECORD.replace("@placeholder", "he")}, "line 1: query must hold @placeholder once, got"),
            ({"ReCoRD.jsonl": lines({**_RECORD_HUB, "answers": ["Tom"]})}, "one of the entities .Bob, Ann., got Tom"),
            (
                {"ReCoRD.jsonl": lines({**_RECORD_HUB, "entities": "Bob"})},
                "'entities' must hold a list of names, got 'Bob'",
            ),
            ({"ReCoRD.jsonl": without(_RECORD, "entities")}, "line 1: must hold a passage with text and entities"),
        ),
        {
            "causal": (_POINTS + "‹›", tuple(" " + each for each in _FILLED)),
            "masked": (_POINTS + " In Rome, ‹› met Ann's friend", ("Ann", "Bob", "Rome")),
            "text-to-text": (_POINTS + "‹›", _FILLED),
        },
    ),
    "squad": TaskCase(
        {"train.jsonl": _SQUAD, "dev.jsonl": _SQUAD_TITLED},
        [("The Nile is long.", 0), ("The Nile is long.", 0), ("Ann sings.", 0), ("It is 4 pm.", 0)],
        (
            (
                {"dev.jsonl": _SQUAD.replace('["4 pm", "4 pm"]', "[]")},
                "line 4: column 'answers' must hold answers, got",
            ),
            ({"dev.jsonl": without(_SQUAD, "context")}, "unknown column for the context 'context'; did you mean"),
        ),
        {
            "causal": ("Context: The Nile is long.\nQuestion: What is long?\nAnswer:‹›", (" The Nile\n",)),
            "text-to-text": ("Context: The Nile is long.\nQuestion: What is long?\nAnswer:‹›", ("The Nile",)),
        },
    ),
    "drop": TaskCase(
        {"train.jsonl": _DROP, "dev.jsonl": _DROP},
        [("A scored 3, B 4.", 0), ("A and B won.", 0), ("A left in 1901.", 0)],
        (
            (
                {"dev.jsonl": _DROP.replace('"spans": ["1901"]', '"spans": [1901]')},
                "line 3: column 'answers_spans' must hold",
            ),
        ),
        {
            "causal": ("Passage: A scored 3, B 4.\nQuestion: How many in all?\nAnswer:‹›", (" 7\n",)),
            "text-to-text": ("Passage: A scored 3, B 4.\nQuestion: How many in all?\nAnswer:‹›", ("7",)),
        },
    ),
}
