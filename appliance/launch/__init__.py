"""Processes: bring the server up, run the start-up sequence, keep the engine process alive, leave in order.

    scratch.py      the directory of a run's sockets, and the removal of what killed runs left
    bootstrap.py    first code of every child process: dies with its parent
    child.py        one child process and its channel
    replicas.py     one supervisor per replica, and the server's state made of theirs
    engine.py       keeps an engine process running: restart budget, resubmission, repair
    startup.py      detect, select, find or build the engine: the named steps of a start
    report.py       log lines of long phases, the breakdown of a start, the termination log
    server.py       PID 1: sockets, uvicorn, signals, drain, exit code

Nothing is imported here: child processes pass through this package on their way to their own module.
"""
