"""The folder of a probe: what was sampled and graded of both models, and the numbers that the result sums up.

out/ s2d.json results.json
     student.jsonl teacher.jsonl   graded rollouts, as `s2d eval --rollouts` reads them; not written where they were given
     tokens.jsonl                  a row for each completion of the student: KL, overlap, masses and log-probs of its tokens
     problems.jsonl                a row for each problem: right ones among k samples, sums over tokens, the AUC within its group
"""

from __future__ import annotations

from s2dcli.files.eval_folder import PROBLEMS, RESULTS, EvalFolder

FILE_OF = {"student": "student.jsonl", "teacher": "teacher.jsonl"}  # graded rollouts by role
TOKENS = "tokens.jsonl"


class ProbeFolder(EvalFolder):
    """The folder of a probe in this process's hands; rollouts are resumed row by row, what is computed of them is computed anew."""

    FILES = (RESULTS, *FILE_OF.values(), TOKENS, PROBLEMS)
