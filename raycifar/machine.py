"""What this process may use of its machine."""

import math
import os
import platform
import stat
import tempfile
from pathlib import Path, PurePosixPath


def processor() -> str:
    """Return the name of this machine's processor, or of its architecture where the system doesn't tell more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def available_cpus() -> int:
    """Return the number of CPUs that this process may use: those it is bound to, or less by a cgroup's quota.

    A quota is rounded down: a thread too many is stopped in the middle of a step, and the others wait for it.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(bound, cpu_quota())))


def cpu_quota(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU quota of this process's cgroups, version 1 or 2, in CPUs; infinity if there is none.

    A container's own cgroup is mounted as the root, whatever its path on the host, so the root is checked as well.

    Args:
        mounted: where the cgroups are mounted. own: the file that names this process's.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    folders: list[Path] = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        relative = PurePosixPath(place.lstrip("/"))
        if not controllers:
            hierarchies = [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            hierarchies = [mounted / controllers, mounted / "cpu"]
        else:
            continue
        for hierarchy in hierarchies:
            folders += (hierarchy / path for path in (relative, *relative.parents))
    return min(map(quota_of, folders), default=math.inf)


def quota_of(folder: Path) -> float:
    """Return the quota of one cgroup, in CPUs."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # there is none, or it is "max"
        return math.inf


def provide_home() -> None:
    """If the user has no home folder, as in a container that runs as another user, give this process a private one.

    The libraries that keep something in a home fail without one. A home that can only be read stays: it may hold keys.
    """
    home = os.path.expanduser("~")  # noqa: PTH111 (Path raises what this returns unchanged)
    if home == "~":
        home = os.environ["HOME"] = str(private_folder("raycifar", tempfile.gettempdir()))
    if not os.access(home, os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(private_folder("raycifar", tempfile.gettempdir())))


def private_folder(name: str, parent: str | Path) -> Path:
    """Return a folder that only this user can enter, the same in each call unless another user has taken its name.

    Args:
        parent: a folder that others may write to, too; it is created.

    Raises:
        OSError: it can't be created.
    """
    folder = Path(parent) / f"{name}-{os.getuid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    return folder
