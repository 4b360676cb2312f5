"""An accelerator that is none, to run `data_training.py` on: devices "sim", done by the CPU.

What a GPU would refuse is an error here too (tensors on two devices), and what it would do behind
the host's back is counted: when the host waits for it, what is sent to it, what it holds. It does
not show speed, streams or the rounding of other kernels.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision import models
from torchvision.models.resnet import Bottleneck, ResNet

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = shutil.which("g++") if sys.platform == "linux" else None


class Counts(NamedTuple):
    """What has been counted so far."""

    waits: int  # of the host for the device, while that was at work
    sent: int  # copies to the device that the host waits for
    live: int  # bytes that tensors hold on the device now
    torn: int  # copies of pinned memory that was changed before the host had waited for them


def count() -> Counts:
    """What has been counted so far."""
    return Counts(*(getattr(torch.ops.sim, name)() for name in Counts._fields))


@contextlib.contextmanager
def watch_steps() -> Iterator[list[Counts]]:
    """A list of what had been counted after each step of an optimizer on the device."""
    steps: list[Counts] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer.param_groups[0]["params"][0].device.type == "sim":
            steps.append(count())

    hook = register_optimizer_step_post_hook(note)
    try:
        yield steps
    finally:
        hook.remove()


def build() -> Path:
    """The library of the device in the user's cache of such; to build it takes 8 s."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    folder, torch_folder = Path(cache).expanduser() / "simulated", Path(torch.__file__).parent
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = folder / f"{torch.__version__}-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [COMPILER or "g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(SOURCE)]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        with tempfile.TemporaryDirectory(dir=folder) as place:  # another process may build it, too
            built = Path(place) / library.name
            subprocess.run([*command, "-ltorch_cpu", "-lc10", "-o", str(built)], check=True)
            built.replace(library)
    return library


def load() -> None:
    """Make the device known to torch.

    Before the first backward pass of a process: there torch counts its devices, once.
    """
    torch.ops.load_library(build())
    torch.utils.rename_privateuse1_backend("sim")
    module: Any = ModuleType("torch.sim")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = torch.accelerator.current_device_index
    module.manual_seed_all = lambda _: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("sim", module)


class Thin(Bottleneck):
    """A block of a ResNet, narrow inside."""

    expansion = 1


def resnet_thin(**options: Any) -> ResNet:
    """Make a ResNet with 40 times fewer weights than the smallest of torchvision."""
    return ResNet(Thin, [1, 1, 1, 1], width_per_group=8, num_classes=options["num_classes"])


resnet_thin.__module__ = "torchvision.models.resnet"  # where `--arch` looks for them
models._api.register_model()(resnet_thin)
