"""Rows of your own form, for `data.reader = "recipes/my_data.py:read"`.

A reader is a function of one row of a file, as it is there, and returns a row of a form that is known here. It is called in
several processes, in any order and more than once for a row, so what it returns must depend on the row alone.
"""

from typing import Any


def read(row: dict[str, Any]) -> dict[str, Any] | None:
    """A medical report as a question and its answer.

    Args:
        row: What the file holds: {"scan": "chest/07", "findings": ["effusion"], "quality": "good"}. An image inside the
            file is replaced by a text that names it.

    Returns:
        Fields as in data/row_forms.py, such as question, answer and image; None leaves the row out.
    """
    if row["quality"] == "poor":
        return None
    findings = row["findings"] or ["nothing of note"]
    return {
        "id": row["scan"],
        "image": f"{row['scan']}.png",
        "question": "What does the scan show?",
        "answer": f"It shows {' and '.join(findings)}.",
    }
