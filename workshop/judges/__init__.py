"""Training of evaluator and auditor, and how far both can be trusted."""
