"""Functions that the tasks in this folder name: lm-eval's own.

Imported only when called: lm-eval's for HumanEval load the code that runs generated programs.
"""

from typing import Any


def doc_to_choice(doc: dict) -> list[str]:
    """The options of a MathQA question."""
    from lm_eval.tasks.mathqa.utils import doc_to_choice

    return doc_to_choice(doc)


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
    """Share of samples of k programs with one that passes the tests."""
    from lm_eval.tasks.humaneval.utils import pass_at_k

    return pass_at_k(references, predictions, k)


def build_predictions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Programs from prompts and what was generated."""
    from lm_eval.tasks.humaneval.utils import build_predictions

    return build_predictions(resps, docs)
