"""Train a class-agnostic Region Proposal Network and know exactly how good its proposals are."""
