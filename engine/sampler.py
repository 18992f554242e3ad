"""What the draws of one sequence depend on besides logits: the tokens before, its options and its grammar.

All of it follows from (prompt, answer, options), so it is never moved: a sequence that comes back from host memory or
from another worker has it made again from its tokens.
"""

from __future__ import annotations

import collections.abc

from engine.batch import Sampled, Sequence
from engine.constraint import Grammars
from engine.kernels.sample import History, How, Row, is_plain, needs_history
from wire.types import PromptScores


class Draws:
    """One sequence's part of the sampler: made from the answer so far, and told of every token drawn since."""

    def __init__(self, sequence: Sequence, ends: tuple[int, ...], grammars: Grammars) -> None:
        """`ends`: token ids that end any answer, EOS."""
        params = sequence.sampling
        self._params = params
        self._banned = (*params.stop_token_ids, *(() if params.ignore_eos else ends)) if params.min_tokens else ()
        self._history: History | None = None
        if needs_history(params):
            # Only repetition looks at the prompt.
            self._history = History(sequence.prompt if params.repetition_penalty != 1 else ())
        self._follower = grammars.follow(params.grammar) if params.grammar else None
        self._scores: list[Sampled] = []
        self.how = How.of([params])  # its rows are drawn, at any position
        self.push(sequence.answer)

    def is_plain(self, index: int) -> bool:
        """Whether the answer's tokens from `index` on depend on nothing but their logits, their places and `how`, and
        nothing else is asked about them.
        """
        if self._follower is not None or (index == 0 and self._params.prompt_logprobs is not None):
            return False
        return is_plain(self.row(0, index))

    def push(self, tokens: collections.abc.Sequence[int]) -> None:
        """These tokens were added to the answer."""
        if self._history is not None:
            self._history.push(tokens)
        if self._follower is not None:
            self._follower.push(tokens)

    def scored(self, tokens: collections.abc.Sequence[Sampled]) -> None:
        """Log probabilities of these tokens of the prompt, which come next in it."""
        self._scores += tokens

    def prompt_scores(self) -> PromptScores | None:
        """Of the whole prompt, if they were asked for."""
        if self._params.prompt_logprobs is None:
            return None
        return PromptScores(
            logprobs=tuple(token.logprob for token in self._scores),
            top_ids=tuple(token_id for token in self._scores for token_id, _ in token.top),
            top_logprobs=tuple(logprob for token in self._scores for _, logprob in token.top),
        )

    def row(self, position: int, index: int, drafts: collections.abc.Sequence[int] = ()) -> Row:
        """For the draw of the answer's token `index`, at `position`, after the answer so far and `drafts`."""
        mask, problem = None, ""
        if self._follower is not None:
            mask = self._follower.mask(drafts)
            problem = self._follower.problem
        return Row(
            params=self._params,
            position=position,
            index=index,
            history=self._history,
            drafts=tuple(drafts),
            banned=self._banned,
            mask=mask,
            problem=problem,
        )
