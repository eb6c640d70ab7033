"""Answers of earlier runs, found by what was asked, so that no run pays for them again."""

from batchllm_operators.answers.answer_store import AnswerStore, answers_scope, check_answers_object, old_answers
from batchllm_operators.answers.keeping import keep_answers
from batchllm_operators.answers.reuse import reuse_answers

__all__ = ["AnswerStore", "answers_scope", "check_answers_object", "keep_answers", "old_answers", "reuse_answers"]
