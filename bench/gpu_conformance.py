"""Single instructions on the device: their answers, kept for the tests that have no device."""

from __future__ import annotations

import sys
from typing import Any

from bench.gpu_record import ROOT
from bench.gpu_suite import Skip, Suite

_FOLDER = ROOT / "tests" / "cuda" / "conformance"


def conformance(suite: Suite) -> dict[str, Any]:
    """Asks the device, holds the simulators' bounds against it, and writes the fixture.

    Raises:
        Skip: the probes are not here, or neither is PTX of them nor nvcc.
    """
    probes, engines = _modules()
    import numpy as np

    answer = engines.simulated if suite.rehearsal else _Device(engines).answer
    kept: dict[str, Any] = {}
    skipped = []
    for probe in probes.probes():
        if not suite.rehearsal and not _has(probe):
            skipped.append(probe.name)
            continue

        def one(probe: Any = probe) -> tuple[float, float]:
            found = answer(probe)
            kept[probe.name], kept[f"{probe.name}.inputs"] = found, np.array(probe.sha256())
            other = engines.on_cpu(probe) if suite.rehearsal and probe.shim else None
            if other is None:
                other = engines.simulated(probe)
            return probe.distance(found, other, probe.device), 1.0

        suite.check(probe.name, one)
    if suite.artefacts is not None and kept:
        path = suite.artefacts.with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **kept)
    return {"answered": len(kept) // 2, "skipped": skipped}


def _modules() -> tuple[Any, Any]:
    if not (_FOLDER / "conformance_probes.py").exists():
        raise Skip("the tree has no tests")
    if str(_FOLDER) not in sys.path:
        sys.path.append(str(_FOLDER))
    import conformance_engines
    import conformance_probes

    if conformance_engines.ptx_of("warp", "sm_80") is None:
        raise Skip("neither PTX of the probes nor nvcc is here")
    return conformance_probes, conformance_engines


def _has(probe: Any) -> bool:
    """Whether this device has the instruction."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    if probe.source == "hopper":
        return (major, minor) == (9, 0)
    return "e4m3" not in probe.name or (major, minor) >= (8, 9)


class _Device:
    """Launches probes on the current device, as PTX that its driver compiles."""

    def __init__(self, engines: Any) -> None:
        import torch

        from bench.gpu_driver import Driver

        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.engines, self.driver = engines, Driver()
        newer = torch.cuda.get_device_capability() >= (8, 9)
        self.archs = {"warp": "sm_89" if newer else "sm_80", "hopper": "sm_90a"}

    def answer(self, probe: Any) -> Any:
        import numpy as np
        import torch

        from bench.gpu_driver import Map

        ptx = self.engines.ptx_of(probe.source, self.archs[probe.source])
        held: list[Any] = []
        given: list[Any] = []
        for x in probe.inputs:
            array = x.tensor if hasattr(x, "tensor") else x
            there = torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).cuda()
            held.append(there)
            if hasattr(x, "tensor"):
                facts = (x.tensor.shape, x.tensor.strides, x.box, x.row_bytes)
                given.append(Map(there.data_ptr(), *facts))
            else:
                given.append(there.data_ptr())
        out = torch.zeros(4 * probe.words, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        arguments = [*given, out.data_ptr()]
        self.driver.launch(ptx, probe.name, probe.threads, probe.shared_bytes, arguments)
        return out.cpu().numpy().view(np.uint32)
