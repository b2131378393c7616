"""What train.py and evaluate.py are made of: settings, set-up, state, evaluation, metrics."""
