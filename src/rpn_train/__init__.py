"""Train a class-agnostic Region Proposal Network and know exactly how good its proposals are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpn_train.proposer import Proposer, load

__all__ = ["Proposer", "load"]


def __getattr__(name: str) -> Any:
    """The names above, at their first use: torch takes seconds, and scoring does without it."""
    if name in __all__:
        from rpn_train import proposer

        return getattr(proposer, name)
    raise AttributeError(f"module 'rpn_train' has no attribute {name!r}")
