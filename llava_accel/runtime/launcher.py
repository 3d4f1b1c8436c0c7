"""Starts the processes of a launch profile with Accelerate's own launcher, and ends as they end.

The launcher itself answers a signal with an exception, and any end of a process with one report of its own and exit code 1.
Here a signal goes on to every process, each of which saves and ends; then their exit code is ours.
"""

import argparse
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import psutil
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from yaml import YAMLError

from llava_accel.exceptions import SIGNALS, Interrupted, UserError
from llava_accel.runtime.invocation import VARIABLE, line_of

# They repeat at length the error of the process that has failed.
_REPORTERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")

_REHEARSAL = 2


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel train RECIPE` with processes to start.

    Raises:
        UserError: the profile cannot be used, or a process was killed.
        SystemExit: with the exit code of the process that ended first, where that is not 0.
    """
    words = [*_profile(arguments), "-m", "llava_accel.train", arguments.recipe, *arguments.overrides]
    settings = launch_command_parser().parse_args(words)
    os.environ[VARIABLE] = line_of(["llava-accel", "train", *sys.argv[1:]])
    for name in _REPORTERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for one in SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:  # as nohup does, and shells do for background jobs
            signal.signal(one, _pass_on)
    try:
        # In the main thread the launcher would put its own handlers in the place of ours.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(launch_command, settings).result()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise UserError(
                f"rank {rank} was killed by {name}. After a SIGKILL that nobody sent, look at the machine's memory: "
                "plan tells what a recipe takes"
            ) from None
        sys.exit(failure.exitcode)


def _profile(arguments: argparse.Namespace) -> list[str]:
    """The launcher's own arguments."""
    processes = [] if arguments.num_processes is None else ["--num_processes", str(arguments.num_processes)]
    number, asked = int(arguments.num_processes or 0), f"--num-processes {arguments.num_processes}"
    if arguments.profile is None:  # every value that the launcher would otherwise tell the user to name
        _refuse_more_than_cores(number, asked)
        plain = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no", "main_process_port": "0"}
        return ["--multi_gpu", *processes, *(word for key, value in plain.items() for word in (f"--{key}", value))]
    try:
        profile = load_config_from_file(arguments.profile)
    except (ValueError, TypeError, KeyError, AttributeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--profile {arguments.profile}: it is not a profile of Accelerate's ({reason}). Name one, such as "
            "launch/ddp.yaml"
        ) from None
    if profile.num_machines > 1:
        raise UserError(
            f"--profile {arguments.profile}: num_machines is {profile.num_machines}, and this command starts the processes "
            "of one machine. Start `accelerate launch` on each machine, as launch/slurm.sh does"
        )
    if not number:
        number = int(getattr(profile, "num_processes", None) or 1)
        asked = f"--profile {arguments.profile}: num_processes is {number}"
    _refuse_more_than_cores(number, asked)
    # Any port that is free: two runs may share a machine.
    port = [] if getattr(profile, "main_process_port", None) else ["--main_process_port", "0"]
    return ["--config_file", arguments.profile, *processes, *port]


def _refuse_more_than_cores(number: int, asked: str) -> None:
    """UserError if processes would take turns on the cores: that is slow, and each has its copy of the model."""
    cores = os.cpu_count() or 1
    if number > max(_REHEARSAL, cores, torch.accelerator.device_count()):
        raise UserError(
            f"{asked}: this machine has {cores} cores, and each process needs one. Set --num-processes to one for each "
            f"GPU; without a GPU, {_REHEARSAL} are enough to rehearse"
        )


def _pass_on(number: int, _frame: FrameType | None) -> None:
    ranks = psutil.Process().children()
    if not ranks:  # none has been started yet
        os._exit(Interrupted(signal.Signals(number)).exit_code)
    for rank in ranks:
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:  # it has ended meanwhile
            continue
