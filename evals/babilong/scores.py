"""How an answer is judged: BABILong's own metric."""

from collections.abc import Collection


def correct(answer: str, target: str, question: str, labels: Collection[str]) -> bool:
    """Whether the labels that the answer's first sentence names, those of the question left out, are the target's.

    Args:
        answer: What the model wrote, prompt left out.
        target: The right label, or several joined by commas (qa8).
        question: Labels that it names are never targets.
        labels: Of the task; one counts as named where it stands, inside a longer word too.
    """
    first = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in first} - {label for label in known if label in question.lower()}
    target = target.lower()
    # qa19's labels are pairs of directions such as "e,s", which are one label.
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return named == wanted
