"""Rows of the nine data sets, written for the tests in the fields that the official task files read."""

import json
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "wikitext": [{"page": " = Sky = \n \n The sky is hidden , the text is special . \n"}, {"page": "the grass is 27"}],
    "lambada_openai": [
        {"text": "the magic number is in the hidden text"},
        {"text": "grass is special the sky is magic"},
    ],
    "piqa": [
        {"goal": "hide a number", "sol1": "put it in the text", "sol2": "give it to the sky", "label": 0},
        {"goal": "find the grass", "sol1": "see the sky", "sol2": "see the text", "label": 1},
    ],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Sky",
            "ctx_a": "The sky is hidden.",
            "ctx_b": "the grass",
            "label": label,
            "endings": ["is magic.", "are 27.", "learns the number.", "is the text."],
        }
        for label in ("2", "0")
    ],
    "winogrande": [
        {"sentence": "the grass hid the text so _ is hidden.", "option1": "grass", "option2": "text", "answer": "2"},
        {"sentence": "the sky is magic as _ learns.", "option1": "sky", "option2": "number", "answer": "1"},
    ],
    **{
        task: [
            {
                "id": str(index),
                "question": f"What is number {index}?",
                "answerKey": key,
                "choices": {"text": ["the sky", "the grass", "the text"], "label": ["A", "B", "C"]},
            }
            for index, key in enumerate(keys)
        ]
        for task, keys in (("arc_easy", "ABC"), ("arc_challenge", "CAB"))
    },
    "social_iqa": [
        {
            "context": "The sky is hidden.",
            "question": "What is magic?",
            "label": label,
            "answerA": "the grass",
            "answerB": "the number",
            "answerC": "the text",
        }
        for label in ("1", "3")
    ],
    "boolq": [
        {"passage": "The number is 345.", "question": "is the number 345", "idx": 0, "label": 1},
        {"passage": "The sky is hidden.", "question": "is the sky magic", "idx": 1, "label": 0},
    ],
}

GOLD = [
    "the magic number is in the hidden text",
    "grass is special the sky is magic",
    "Question: hide a number\nAnswer: put it in the text",
    "Question: find the grass\nAnswer: see the text",
    "Sky: The sky is hidden. The grass learns the number.",
    "the grass hid the text so text is hidden.",
    "the sky is magic as sky learns.",
    *(f"Question: What is number {i}?\nAnswer: the {word}" for i, word in enumerate(("sky", "grass", "text"))),
    "Q: The sky is hidden. What is magic?\nA: the grass",
    "The number is 345.\nQuestion: is the number 345?\nAnswer: yes",
    "The sky is hidden.\nQuestion: is the sky magic?\nAnswer: no",
]
"""Contexts with right answers; the tasks whose rows share a context and differ in the answer have one of them here."""


def write_rows(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
