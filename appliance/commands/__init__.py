"""The commands beside `serve`, one file per subject: `add_arguments(parser)` and a function `run_<command>(args)`.

A command gives its exit code and prints its result to stdout; logs and progress go to stderr. Errors are raised, and
`appliance.cli` turns them into one line.
"""
