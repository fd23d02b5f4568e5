"""Train a class-agnostic Region Proposal Network and know exactly how good its proposals are."""

from rpn_train.proposer import Proposer, load

__all__ = ["Proposer", "load"]
