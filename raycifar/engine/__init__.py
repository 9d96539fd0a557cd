"""Training on one worker: the loop and its parts."""
