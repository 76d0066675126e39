"""The facts and the self-tests -> `Diagnosis`: checks that are ok, notes, or failures of something promised.

Promised: a torch that is not too old, the registered backend, a cache that can be written, and that every lowering
that says it runs here computes what the reference does.  A missing compiler or GPU is a note: something slower runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvt_compile import torch_versions
from kvt_compile.capture.skipped import disabled, told
from kvt_compile.doctor import machine
from kvt_compile.doctor.selftest import self_test, specs
from kvt_compile.kernels.c.toolchain import INSTALL_HINT, given_up
from kvt_compile.kernels.op import lowerings

_AFTER_GIVING_UP = f"try it by hand, set CC to another compiler, or {INSTALL_HINT}; a new process tries again"

Status = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: Status
    text: str
    remedy: str = ""
    """What to do about it."""
    error: float | None = None
    """Of a self-test: the worst relative error against the reference."""


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found."""

    checks: tuple[Check, ...]
    chosen: dict[str, str]
    """Device type -> the lowering that "auto" takes there."""

    @property
    def healthy(self) -> bool:
        """Whether everything promised works."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON (a NaN error becomes None)."""
        checks = [asdict(check) for check in self.checks]
        for check in checks:
            if check["error"] is not None and check["error"] != check["error"]:
                check["error"] = None
        return {"healthy": self.healthy, "versions": machine.versions(), "chosen": self.chosen, "checks": checks}


def examine() -> Diagnosis:
    """Looks at the machine and runs a self-test of every lowering: a few seconds, longer where kernels are built."""
    devices = ["cpu", *(["cuda"] if machine.gpus() else [])]
    checks = [*_software(), *_hardware(), _cache()]
    chosen: dict[str, str] = {}
    for device in devices:
        found, name = _choice(device)
        checks.append(found)
        chosen |= {device: name} if name else {}
    checks += [_lowering(name, device) for name in lowerings.names() if name != "auto" for device in devices]
    checks += [Check("given up", "failed", reason.splitlines()[0], _AFTER_GIVING_UP) for reason in given_up()]
    checks += [Check("compilation", "note", reason) for reason in sorted({disabled(), *told()} - {""})]
    return Diagnosis(tuple(checks), chosen)


def _software() -> Iterator[Check]:
    facts = machine.versions()
    yield _torch(facts["torch"])
    if machine.backend_is_registered():
        yield Check("backend", "ok", 'torch.compile(backend="kvt") is registered')
    else:
        yield Check(
            "backend", "failed", 'torch.compile(backend="kvt") does not find kvt_compile',
            "install the package (pip install -e . in a checkout): importing it from a folder is not enough",
        )  # fmt: skip
    if facts["triton"]:
        yield Check("triton", "ok", facts["triton"])
    else:
        yield Check("triton", "note", "not installed; it is needed on a GPU only")
    found = machine.compiler()
    if found.missing:
        yield Check("C compiler", "note", "none, so torch's operators run on the CPU", found.missing)
    else:
        yield Check("C compiler", "ok", f"{found.command}: {found.version or 'version unknown'}, for {found.target}")


def _torch(version: str) -> Check:
    tried = f"{torch_versions.text(torch_versions.OLDEST)} to {torch_versions.text(torch_versions.NEWEST)}"
    if torch_versions.is_too_old(version):
        return Check("torch", "failed", f"{version} is too old; tried are {tried}", "install a newer torch")
    if torch_versions.is_untried(version):
        return Check("torch", "note", f"{version} is newer than any that was tried ({tried}): likely to work")
    return Check("torch", "ok", f"{version} (tried are {tried})")


def _hardware() -> Iterator[Check]:
    yield Check("CPU", "ok", machine.cpu())
    gpus = machine.gpus()
    yield Check("GPU", "ok", "; ".join(gpus)) if gpus else Check("GPU", "note", "none that torch can use")


def _cache() -> Check:
    found = machine.cache()
    free = machine.free_space(found.folder)
    text = f"{found.folder}: {found.files} files, {found.size / 1e6:.1f} MB"
    if free is not None:
        text += f", {free / 1e9:.1f} GB free"
    if found.untrusted:
        return Check(
            "cache", "failed", f"nothing is loaded from {found.folder}, so kernels are built in every process: "
            f"{found.untrusted}", "make it yours alone, or set KVT_CACHE_DIR to a folder that is",
        )  # fmt: skip
    if found.writable and found.leftovers:
        return Check("cache", "note", f"{text}, {found.leftovers} left by killed processes", "kvt cache clear")
    if found.writable:
        return Check("cache", "ok", text)
    return Check(
        "cache", "failed", f"{found.folder} cannot be written ({found.reason}), so kernels are built in every process",
        "set KVT_CACHE_DIR to a folder that can be written",
    )  # fmt: skip


def _choice(device: str) -> tuple[Check, str]:
    """What "auto" takes for a common float32 attention, and why not what it would rather take."""
    spec, _ = specs()
    passed_over: list[str] = []
    for name in lowerings.names():
        if name in ("auto", "reference"):
            continue
        reason = lowerings.refusal(lowerings.get(name), spec, device)
        if reason is None:
            why = "first choice" if not passed_over else f"because {'; '.join(passed_over)}"
            return Check(f"lowering on {device}", "ok", f"{name} ({why})"), name
        passed_over.append(f"{name}: {_clause(reason)}")
    return Check(f"lowering on {device}", "failed", f"none runs here: {'; '.join(passed_over)}"), ""


def _clause(reason: str) -> str:
    """A lowering's reason in one line, without the advice that stands in a line of its own."""
    return reason.splitlines()[0].replace(f": {INSTALL_HINT}", "")


def _lowering(name: str, device: str) -> Check:
    label = f"self-test {name} on {device}"
    try:
        refusals = [lowerings.refusal(lowerings.get(name), spec, device) for spec in specs()]
    except Exception as error:  # a lowering that does not even import
        return Check(label, "failed", f"cannot be loaded: {type(error).__name__}: {error}")
    if reasons := [reason for reason in refusals if reason is not None]:
        return Check(label, "note", f"not here: {_clause(reasons[0])}")
    result = self_test(name, device)
    if result.passed:
        text = f"error {result.error:.1e} against the reference (budget {result.budget:.1e})"
        return Check(label, "ok", text, error=result.error)
    remedy = 'use another lowering (options={"lowering": "aten"}) and report this with the output of kvt doctor --json'
    return Check(label, "failed", result.said, remedy, result.error)
