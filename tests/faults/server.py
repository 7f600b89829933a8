"""A fork server: one process that has imported everything and starts each training job as a fork of itself.

A job of a dozen steps then takes about a second, nearly all of it training. Run as `python -m tests.faults.server FD`;
each message on the socket FD is one job, and comes with the socket on which that job reports.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

# All that a run would import late.
import datasets  # noqa: F401
import peft.utils.transformers_weight_conversion  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import prefopt.launch
import prefopt.procedures.train  # noqa: F401
from prefopt.cli import main
from tests.faults.points import Spec, watch
from tests.faults.reports import Reports, report_progress

MESSAGE = 1 << 16


def serve(jobs: socket.socket) -> None:
    """Fork for every message until the other side closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a job: it says itself how it ended
    while True:
        message, descriptors, _, _ = socket.recv_fds(jobs, MESSAGE, 1)
        if not message:
            return
        alone = threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1
        if os.fork() == 0:
            jobs.close()
            connection = socket.socket(fileno=descriptors[0])
            os.register_at_fork(after_in_child=connection.close)  # its end is that of the job, not of a data loader
            reports = Reports(connection)
            reports.send("start", pid=os.getpid(), alone=alone)
            _run(json.loads(message), reports)
        os.close(descriptors[0])


def _run(job: dict[str, Any], reports: Reports) -> None:
    """Run `prefopt` with the job's arguments, as a process of its own would; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.alarm(job["seconds"])  # a job that hangs ends, whatever became of who asked for it
    _settle(job)
    report_progress(reports)
    if job["points"] is not None:
        watch(Spec(**job["points"]), reports)
    status: Any = 1
    reports.send("run")
    try:
        status = main(job["arguments"])
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        reports.send("exit", status=status or 0)
        os._exit(0)


def _settle(job: dict[str, Any]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    for name, value in job["constants"].items():
        module, constant = name.rsplit(".", 1)
        setattr(sys.modules[module], constant, value)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # curves would take longer than the training


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # taking all of it down again would take seconds
