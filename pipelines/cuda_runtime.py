"""Backward passes over tensors of a CUDA device on a machine without one.

torch's autograd engine asks CUDA's hooks whether device 0 has a context, for its streams. Without a driver that raises,
for fake tensors too. The answer "no context" is enough: the entry of `hasPrimaryContext` in the table of virtual
functions of the hooks is replaced, for the rest of the process. Nothing else in torch's CUDA build is changed.
"""

import atexit
import ctypes
from pathlib import Path

import torch

SLOT = 4
"""entry of `AcceleratorHooksInterface::hasPrimaryContext`: after two destructors, isBuilt and isAvailable"""
ENTRIES = 128
"""entries that are copied; the hooks have about 60"""
ABOVE = 2
"""entries before the first function: offset to the top and type information"""

_replaced: list[object] = []
"""table and function, kept alive"""


def allow_backward_without_a_gpu() -> None:
    """Install the answer, once per process.

    Raises RuntimeError if torch has a GPU, has been built without CUDA, or has other internals than version 2.14 on
    x86-64.
    """
    if _replaced:
        return
    if torch.cuda.is_available():
        raise RuntimeError("simulated CUDA tensors need a machine without a GPU: set CUDA_VISIBLE_DEVICES= (empty)")
    if torch.version.cuda is None:
        raise RuntimeError(f"simulated CUDA tensors need a CUDA build of torch, and this is {torch.__version__}")
    torch._C._ensureCUDADeviceGuardSet()
    libraries = Path(torch.__file__).parent / "lib"
    get_hooks = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks())  # first field of the object
    assert table.value is not None
    old = (ctypes.c_void_p * (ABOVE + ENTRIES)).from_address(table.value - ABOVE * 8)
    implementation = _implementation(libraries / "libc10_cuda.so")
    if _jump_target(old[ABOVE + SLOT]) != implementation:
        raise RuntimeError(f"torch {torch.__version__} has another layout of CUDAHooks: correct SLOT in {__file__}")
    new = (ctypes.c_void_p * (ABOVE + ENTRIES))(*old)
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, device: False)
    new[ABOVE + SLOT] = ctypes.cast(answer, ctypes.c_void_p).value
    _replaced.extend((new, answer))
    atexit.register(setattr, table, "value", table.value)  # torch calls the hooks after Python has freed its objects
    table.value = ctypes.addressof(new) + ABOVE * 8


def _implementation(library: Path) -> int:
    """Address of the function that `c10::cuda::hasPrimaryContext` calls through a variable.

    Its code is `movsbl %dil, %edi; jmp *offset(%rip)`.
    """
    function = ctypes.CDLL(str(library))._ZN3c104cuda17hasPrimaryContextEa
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    code = ctypes.string_at(address, 10)
    if code[:6] != bytes.fromhex("400fbeffff25"):
        return -1
    variable = address + 10 + int.from_bytes(code[6:], "little", signed=True)
    return ctypes.c_void_p.from_address(variable).value or -1


def _jump_target(address: int | None) -> int:
    """Function to which CUDAHooks::hasPrimaryContext passes its argument: `movsbl %sil, %edi; jmp offset`."""
    code = b"" if address is None else ctypes.string_at(address, 9)
    if address is None or code[:5] != bytes.fromhex("400fbefee9"):
        return -2
    return address + 9 + int.from_bytes(code[5:], "little", signed=True)
