"""One recipe in one process, or in many that a launcher or `--nproc` has started."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mllm.errors import DataError, MllmError, PlanError, RecipeError
from mllm.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Rank 0 writes a large model while the others wait.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun, deepspeed and accelerate describe them."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and speaks to people."""
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world() -> World:
    """The world this process is in; alone without a launcher."""
    if not launched():
        return World()
    rank = int(os.environ["RANK"])
    return World(rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ["WORLD_SIZE"]))


@contextlib.contextmanager
def joined(recipe: Recipe) -> Iterator[World]:
    """Meet the other processes, and make ready for DeepSpeed where the recipe asks for it.

    Raises:
        RecipeError: DeepSpeed is missing, or the address of the meeting cannot be had.
    """
    given: dict[str, str] = {}
    if _with_deepspeed(recipe) and not launched():
        # DeepSpeed wants a process group, also of one, and reads about it here.
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = free_port()
        given = {name: str(value) for name, value in alone.items() if name not in os.environ}
    os.environ.update(given)
    try:
        yield _join(recipe)
    finally:
        for name in given:
            del os.environ[name]


def _with_deepspeed(recipe: Recipe) -> bool:
    return any(part.parallel.zero is not None for _, part in recipe.tunes())


def _join(recipe: Recipe) -> World:
    import torch

    here = world()
    zero = _with_deepspeed(recipe)
    if zero:
        _prepare_deepspeed()
    if (here.size > 1 or zero) and not torch.distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(here.local_rank)
        try:
            torch.distributed.init_process_group(
                "cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=PATIENCE
            )
        except (torch.distributed.DistNetworkError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RecipeError(
                f"the {here.size} processes cannot meet at {where}: {str(error).splitlines()[0]}",
                argument="MASTER_PORT",
                given=os.environ.get("MASTER_PORT"),
                expected="a port that no other run uses: --master-port of the launcher",
            ) from error
    if zero:
        import deepspeed.comm

        # ZeRO-3 asks for the size of the world while the model is read, before the Trainer is made.
        deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    return here


def check_deepspeed() -> None:
    """Raise RecipeError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "parallel.zero needs DeepSpeed, which is not installed",
            argument="parallel.zero",
            given="no deepspeed",
            expected="DS_BUILD_OPS=0 pip install deepspeed, or parallel.zero=null",
        )


def _prepare_deepspeed() -> None:
    import torch

    check_deepspeed()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # Otherwise DeepSpeed compiles its shared-memory collectives: a minute, and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_first(work: Callable[[], T]) -> T:
    """Do `work` in the first process; all processes get what it returns, or its error."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except MllmError as error:
            outcome[1] = error.as_dict()
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise _error(outcome[1])
    return outcome[0]


def barrier() -> None:
    """Wait for the other processes, if there are any."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def any_of(flag: bool, device: Any = "cpu") -> bool:
    """Whether `flag` is set in any process; all of them must ask."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found)


def anywhere(flags: Tensor) -> Tensor:
    """bool `[N]`: the flags that are set in any process; all of them must ask."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return flags
    found = flags.to(torch.uint8)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.bool()


def end_worker(code: int) -> None:
    """End a process of many at once: gloo's threads may abort an ordinary end.

    A process group stays as long as its process: DeepSpeed keeps parts of it, and a second one in
    the same process may wait for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse_stages(recipe: Recipe, here: World) -> None:
    """Raise RecipeError for a recipe from scratch in many processes."""
    if recipe.from_scratch and here.size > 1:
        raise RecipeError(
            "a recipe with stages of scenes trains a small model in one process",
            argument="nproc",
            given=here.size,
            expected="1",
        )


def many(
    recipe: Recipe, resume: bool | str, nproc: int, arguments: Sequence[str]
) -> dict[str, Any]:
    """`spawn`, after everything that can be checked in one process.

    Args:
        recipe: what the processes will run.
        resume: as for `mllm.training.run.run`.
        nproc: how many processes.
        arguments: what follows `mllm train`.
    """
    refuse_stages(recipe, World(size=nproc))
    if not resume:
        from mllm.training.data import load_data
        from mllm.training.preview import check

        for _, part in recipe.tunes():
            check(part, load_data(part.data)[0], World(size=nproc))
    return spawn(nproc, arguments)


def spawn(nproc: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `mllm train` in `nproc` processes of this machine.

    Args:
        nproc: how many processes.
        arguments: what follows `mllm train`.

    Returns:
        What the first of them reports: the run's record. SIGTERM reaches all of them, and the run
        is then "stopped".

    Raises:
        MllmError: the error of the first process, or that a process has died.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={nproc}", "-m", "mllm", "train", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        out, _ = process.communicate()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    lines = [line for line in out.splitlines() if line.startswith('{"schema"')]
    if not lines:
        raise RecipeError(
            f"a process of the run ended with code {process.returncode}; its message is above, and "
            "--resume continues from the newest whole checkpoint",
            argument="nproc",
            given=nproc,
            expected="processes that all reach the end",
        )
    report = json.loads(lines[-1])
    if report["ok"]:
        return report["data"]
    raise _error(report["error"])


def _error(found: dict[str, Any]) -> MllmError:
    kinds = {kind.__name__: kind for kind in (RecipeError, DataError, PlanError)}
    kind = kinds.get(found["type"], MllmError)
    parts = {key: found[key] for key in ("argument", "given", "expected")}
    return kind(found["message"], **parts)


def deepspeed_config(recipe: Recipe) -> dict[str, Any] | None:
    """What `TrainingArguments(deepspeed=)` is given; None without DeepSpeed.

    The optimizer is torch's own in every stage: DeepSpeed's need a compiler.
    """
    part = recipe.parallel
    if part.zero is None:
        return None
    zero: dict[str, Any] = {"stage": part.zero}
    if part.zero:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if part.zero == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if part.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if part.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in part.deepspeed.items():
        nested = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if nested else value
    return config
