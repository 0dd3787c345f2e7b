"""The search stage of Hemiola: finds schedules in PyTorch, scores them on real trajectories, and reports."""
