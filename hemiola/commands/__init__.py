"""The subcommands, one file each: `add_arguments` describes it, `run` does it and returns the exit code.

Nothing heavy is imported before `run`, so that `--help` answers at once and a service needs no PyTorch.
"""
