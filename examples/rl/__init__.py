"""The parts of examples/grpo.py: the questions, the policy that learns, and the pictures."""
