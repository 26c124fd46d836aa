"""Another process on the same devices, for the tests of the device backends: does what its standard input says.

Each line of input is a JSON object {"do": name, ...}, each line of output the answer. It is no child of the memory it
maps: exports go both ways between a test and its peer.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import msgspec

from afield.errors import AfieldError
from afield.gpu_store.backends.base import Device, DeviceBackend, Slab, SlabExport


def open_backend(where: str) -> DeviceBackend:
    """Return the backend that `where` names: "cuda", "fake" or the address of an emulated machine."""
    if where in ("cuda", "fake"):
        from afield.gpu_store.backends.cuda import CudaBackend
        from tests.fake_cuda import libraries

        return CudaBackend(libraries() if where == "fake" else None)
    from afield.gpu_store.backends.emulated import EmulatedBackend

    return EmulatedBackend.attach(where)


def act(backend: DeviceBackend, slabs: list[Slab], order: dict[str, Any]) -> Any:
    """Do one thing on one device; slabs go by their number."""
    device: Device = backend.open(order["uuid"])
    match order["do"]:
        case "allocate":
            slabs.append(device.allocate_slab(order["size"]))
            return base64.b64encode(msgspec.msgpack.encode(device.export_slab(slabs[-1]))).decode()
        case "import":
            export = msgspec.msgpack.decode(base64.b64decode(order["export"]), type=SlabExport)
            slabs.append(device.import_slab(export))
        case "free":
            device.free_slab(slabs[order["slab"]])
        case "write":
            stream = device.new_stream()
            device.copy_from_host(slabs[order["slab"]], order["offset"], memoryview(order["text"].encode()), stream)
            stream.synchronize()
        case "read":
            stream, target = device.new_stream(), bytearray(order["size"])
            device.copy_to_host(slabs[order["slab"]], order["offset"], memoryview(target), stream)
            stream.synchronize()
            return target.decode()
    return len(slabs) - 1


def main() -> None:
    """Answer until the input ends."""
    backend = open_backend(sys.argv[1])
    slabs: list[Slab] = []
    for line in sys.stdin:
        try:
            answer = {"answer": act(backend, slabs, json.loads(line))}
        except AfieldError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
