"""The runtime of Hemiola: opens a bundle and draws images, with numpy and one backend and nothing else."""
