"""Training the models: tasks, data, the loop, checkpoints.  The command line is in ``fastattn.train.cli``."""
