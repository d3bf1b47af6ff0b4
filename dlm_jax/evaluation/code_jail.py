"""The script that `code_execution.Sandbox` starts for each program: it shuts itself in, and then runs the program.

    this process                new namespaces, and in them a jail that holds Python and an empty folder
      the first one inside      only waits; when it ends, the kernel ends whatever else is left inside
        the program's own       without privileges and under limits; it says that it begins, and that its tests passed

It imports nothing but the standard library, for it runs without any other (`python -I -S`).
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types
from typing import Any, NoReturn

JOB_FILE = "job.json"
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_NAMESPACES = _NEWNS | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000  # and of IPC, host name, processes, network
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18  # of mount(2)
_DETACH = 2  # of umount2(2)
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY_NOSUID = 442, -100, 0x8000, 3  # of mount_setattr(2)
_SET_PDEATHSIG, _SET_NO_NEW_PRIVS = 1, 38  # of prctl(2)
_CAPABILITY_VERSION = 0x20080522
_NOBODY = 65534
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64")


def main() -> NoReturn:
    """Runs the job in the folder of the first argument; its outcome is written to the descriptor of the second."""
    folder, pipe = sys.argv[1], int(sys.argv[2])
    sys.argv = [""]
    try:
        with open(os.path.join(folder, JOB_FILE), encoding="utf-8") as file:
            job = json.load(file)
        _die_with_parent()
        root = _leave_namespaces()
        _build(folder, job)
    except OSError as error:
        os.write(pipe, str(error).encode())
        os._exit(1)
    first = os.fork()
    if first == 0:
        _first_inside(job, pipe, root)
    os.waitpid(first, 0)
    os._exit(0)


def _leave_namespaces() -> bool:
    """Enters new namespaces, as root or through a user namespace; returns whether as root."""
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", _NAMESPACES)
    except PermissionError:
        _call("unshare", _NAMESPACES | _NEWUSER)
    else:
        return True
    for name, content in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {uid} 1"), ("gid_map", f"{_NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    return False


def _build(folder: str, job: dict[str, Any]) -> None:
    """A root of its own in memory, with nothing but the system's libraries, Python and /tmp; the old one is let go.

    The jail is a folder of that root and entered by chroot as well: who is in a chroot gets no new user namespace,
    and so no rights that were given up.
    """
    _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)
    options = f"size={job['disk']},nr_inodes=4096,mode=755"
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", _NOSUID | _NODEV, options.encode())
    jail = os.path.join(folder, "jail")
    for path in _visible():
        place = jail + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        else:
            open(place, "x").close()
        _call("mount", os.fsencode(path), os.fsencode(place), None, _BIND | _REC, None)
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID)
        _call("syscall", *map(ctypes.c_long, (_MOUNT_SETATTR, _AT_FDCWD)), os.fsencode(place),
              ctypes.c_long(_AT_RECURSIVE), attributes, ctypes.c_long(ctypes.sizeof(attributes)))
    os.mkdir(jail + "/tmp")
    os.chmod(jail + "/tmp", 0o777)
    os.chdir(folder)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)
    os.chroot("/jail")
    os.chdir("/tmp")


def _visible() -> list[str]:
    """Returns the paths that remain visible, none of which belongs to a user."""
    with open("/proc/self/maps") as file:
        files = [line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) == 6]
    libraries = sorted({os.path.dirname(name) for name in files if ".so" in os.path.basename(name)})
    found: list[str] = []
    for path in (*_SYSTEM, "/dev/null", "/dev/urandom", sys.base_prefix, sys.base_exec_prefix, *libraries):
        path = os.path.normpath(path)
        within = any(path == other or path.startswith(other + "/") for other in found)
        if path != "/" and os.path.lexists(path) and not within:
            found.append(path)
    return found


def _first_inside(job: dict[str, Any], pipe: int, root: bool) -> NoReturn:
    _die_with_parent()
    program = os.fork()
    if program == 0:
        try:
            _give_up_rights(job, root)
        except (OSError, ValueError) as error:
            os.write(pipe, str(error).encode())
            os._exit(1)
        _run(job.pop("program"), job.pop("tests"), pipe, job.pop("start_token").encode(), job.pop("passed").encode())
    _, status = os.waitpid(program, 0)
    if os.WIFSIGNALED(status):
        os.write(pipe, f"ended by {signal.Signals(os.WTERMSIG(status)).name}".encode())
    os._exit(0)


def _give_up_rights(job: dict[str, Any], root: bool) -> None:
    """Drops all capabilities, becomes nobody, and limits the resources of a process."""
    seconds = job["seconds"]
    for limit, most in ((resource.RLIMIT_AS, job["memory"]), (resource.RLIMIT_FSIZE, job["disk"]),
                        (resource.RLIMIT_NPROC, job["processes"]), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_MSGQUEUE, 0)):
        resource.setrlimit(limit, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # a signal that can be caught, then one that cannot
    if root:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", _SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    _die_with_parent()


def _run(program: str, tests: str, pipe: int, start_token: bytes, passed: bytes,
         write: Any = os.write, exit_now: Any = os._exit, getpid: Any = os.getpid) -> NoReturn:
    """Runs the program and then its tests, compiled separately so that an open string cannot include the other.

    A forked child never writes the outcome.
    """
    pid = getpid()
    write(pipe, start_token)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
        exec(compile(tests, "tests.py", "exec"), module.__dict__)
        said = passed
    except BaseException as error:  # includes SystemExit and KeyboardInterrupt
        said = type(error).__name__.encode(errors="replace")
    if getpid() == pid:
        write(pipe, said)
    exit_now(0)


def _die_with_parent() -> None:
    _call("prctl", _SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))


def _call(name: str, *arguments: Any) -> None:
    """Calls a function of the C library; raises its error as OSError."""
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


_LIBC = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
