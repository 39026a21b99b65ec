"""Runs the --device cuda path of a script where there is no GPU: python posed_gpu.py SCRIPT.py [flags of the script].

A device named "posed" stands in for CUDA. Its tensors hold their values in CPU memory, but as on a GPU there is an error
where one is mixed with a CPU tensor of one dimension or more, or asked for its numpy array; also where one is indexed by a
CPU tensor, which a GPU would wait for. Pinned memory that is sent without waiting and overwritten before the host waits for
the device is an error, too, and what is fetched without waiting has nonsense in it until then. With --compile the functions
are not compiled, but called as CUDA graphs would be: see Graph. The last line of stdout is a JSON object: kind of transfer or
wait -> function of the script -> how often.
"""

import collections
import importlib.util
import json
import math
import re
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "posed"
SCRIPT = ""  # file of the script that runs
EVENTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
PINNED: dict[int, torch.Tensor] = {}  # address -> tensor, which must stay alive so that its address stays its own
SENT: list[tuple[torch.Tensor, torch.Tensor]] = []  # pinned memory that the device may still read, and what was in it
FETCHED: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory of the host that the device will write, and what will be in it
STATIC: list[torch.Tensor] = []  # tensors that stay where they are in memory, as the script says
# operations whose result has a size that only the device knows, or that the host reads
WAIT = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"}
WAIT |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
# a CPU tensor without dimensions goes to the kernel by value
TAKES_SCALARS = {"add", "sub", "mul", "div", "pow", "where", "clamp", "minimum", "maximum", "lerp", "fill", "copy"}
TAKES_SCALARS |= {"lt", "gt", "le", "ge", "eq", "ne"}


class Posed(torch.Tensor):
    """A tensor of the posed device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        kind: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(NAME, 0), **kind)

    def __init__(self, inner: torch.Tensor):
        self.held = inner

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):  # type: ignore[override]
        return dispatch(f, args, kwargs or {})

    def numpy(self, **options):  # type: ignore[assignment, override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy  # type: ignore[assignment]


def is_posed(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def inner(x: Any) -> Any:
    return x.held if isinstance(x, Posed) else x


def posed(x: Any) -> Any:
    return Posed(x) if isinstance(x, torch.Tensor) and not isinstance(x, Posed) else x


def is_pinned(x: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() in PINNED


def pin(x: torch.Tensor) -> torch.Tensor:
    if isinstance(x, Posed):
        raise RuntimeError("only dense CPU tensors can be pinned")
    pinned = x.clone()
    PINNED[pinned.untyped_storage().data_ptr()] = pinned
    return pinned


def note(kind: str):
    """Counts an event. Where the host waits, what it sent before must not have changed meanwhile."""
    frames = [f for f in traceback.extract_stack() if f.filename == SCRIPT]
    EVENTS[kind][frames[-1].name if frames else "?"] += 1
    if "waits" in kind:
        if any(not torch.equal(now, sent) for now, sent in SENT):
            raise RuntimeError("pinned memory was overwritten before the device had read it")
        for to, fetched in FETCHED:
            to.copy_(fetched)
        SENT.clear()
        FETCHED.clear()


def spoil(x: torch.Tensor):
    """Nonsense in place of what is not there yet, or no longer."""
    x.fill_(math.nan if x.is_floating_point() else 1)


def move(x: torch.Tensor, device: Any, changes: dict, non_blocking: bool) -> torch.Tensor:
    """x.to(device)."""
    if is_posed(device):
        if not isinstance(x, Posed):
            asynchronous = non_blocking and is_pinned(x)
            note("to the device" if asynchronous else "to the device, waits")
            if asynchronous:
                SENT.append((x, x.clone()))
        return Posed(inner(x).to(**changes, device="cpu", copy=True))
    out = inner(x).to(**changes, device="cpu", copy=True)
    if isinstance(x, Posed) and non_blocking:
        fetch(out, out.clone())
    elif isinstance(x, Posed):
        note("to the host, waits")
    return out


def fetch(to: torch.Tensor, values: torch.Tensor):
    """The device will write these values into memory of the host, at the latest when the host waits."""
    note("to the host")
    FETCHED.append((to, values))
    spoil(to)


def copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """to.copy_(source)."""
    asynchronous = non_blocking and is_pinned(source if isinstance(to, Posed) else to)
    if isinstance(source, Posed) and not isinstance(to, Posed) and asynchronous:
        fetch(to, inner(source).to(to.dtype, copy=True).expand_as(to))
        return to
    if isinstance(to, Posed) != isinstance(source, Posed):
        note(f"to the {'device' if isinstance(to, Posed) else 'host'}{'' if asynchronous else ', waits'}")
        if asynchronous:
            SENT.append((source, source.clone()))
    inner(to).copy_(inner(source))
    return to


class Graph:
    """A function that is called as if it were a CUDA graph.

    Its results may be overwritten after the next mark of a step, and are, with nonsense. It is called once between two marks.
    What it changes in place has to be static, and what is large, too: the rest is copied at every call.
    """

    made: ClassVar["list[Graph]"] = []

    def __init__(self, f: Any, options: dict[str, Any] | None = None, **_):
        self.f, self.name, self.results, self.called = f, f.__name__, list[Posed](), False
        kinds = [kind for kind in ("triton.cudagraphs", "deterministic") if (options or {}).get(kind)]
        EVENTS["compiled"][f"{self.name}: {', '.join(kinds)}"] += 1
        Graph.made.append(self)

    def __call__(self, *args):
        if self.called:
            raise RuntimeError(f"{self.name} is called twice without a mark of a step in between")
        inputs = [x for x in tree_leaves(args) if isinstance(x, Posed)]
        own = [x for x in inputs if not any(x is marked for marked in STATIC)]
        if large := [tuple(x.shape) for x in own if x.nbytes > 200_000]:
            raise RuntimeError(f"{self.name} would copy inputs that are not static: {large}")
        versions = [x._version for x in own]
        results = self.f(*args)
        if changed := [tuple(x.shape) for x, n in zip(own, versions, strict=True) if x._version != n]:
            raise RuntimeError(f"{self.name} changes inputs that are not static: {changed}")
        self.results, self.called = [x for x in tree_leaves(results) if isinstance(x, Posed)], True
        return results

    @staticmethod
    def mark_step():
        for graph in Graph.made:
            for x in graph.results:
                spoil(x.held)
            graph.results, graph.called = [], False


def masks(indices: Any) -> bool:
    """Whether one of these indices is a mask, whose number of elements only the device knows."""
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def dispatch(f, args: tuple, kwargs: dict) -> Any:
    name, device = f._schema.name.removeprefix("aten::"), kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = any(isinstance(x, Posed) for x in tensors)

    def run(**changes):
        return f(*tree_map(inner, args), **(tree_map(inner, kwargs) | changes))

    if name == "is_pinned":
        return is_pinned(tensors[0])
    if name == "_pin_memory":
        return pin(tensors[0])
    if name == "_to_copy" and device is not None:
        changes = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format")}
        return move(tensors[0], device, changes, kwargs.get("non_blocking", False))
    if name == "copy_":
        return copy(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
    if not on_device and not is_posed(device):
        return run()
    # a mask that is given a single number of the host needs no count
    number = name.startswith("index_put") and not isinstance(args[2], Posed) and args[2].numel() == 1
    if name in WAIT or (name.startswith("index") and isinstance(args[1], list | tuple) and masks(args[1]) and not number):
        note(f"{name}, waits")
    if name.startswith("_fused_adam"):
        rate = args[6] if len(args) > 6 else kwargs["lr"]
        if isinstance(rate, Posed) and rate.dtype != torch.float32:
            raise RuntimeError(f"expected scalar type Float but found {rate.dtype}")
    for x in tensors:
        if on_device and not isinstance(x, Posed) and (x.dim() > 0 or name.rstrip("_") not in TAKES_SCALARS):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} has cuda:0 and cpu")
    out = run(**({"device": torch.device("cpu")} if device is not None else {}))
    for argument, x in [*zip(f._schema.arguments, args, strict=False)]:  # in place: the same object
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(x, Posed):
            return x
    return tree_map(posed, out)


class Dispatch(TorchDispatchMode):
    """Tensors that are made on the posed device."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return dispatch(f, args, kwargs or {})


class Rename(TorchFunctionMode):
    """cuda in an argument means the posed device."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        def rename(x: Any) -> Any:
            name = x if isinstance(x, str) else x.type if isinstance(x, torch.device) else ""
            return torch.device(NAME, 0) if re.fullmatch(r"cuda(:\d+)?", name) else x

        name, kwargs = getattr(f, "__name__", ""), {key: rename(x) for key, x in (kwargs or {}).items()}
        if name == "pin_memory":
            return pin(args[0])
        if name == "numpy" and isinstance(args[0], Posed):
            return args[0].numpy()
        if name == "tolist" and isinstance(args[0], Posed):
            note("tolist, waits")
            return args[0].held.tolist()
        if name in ("as_tensor", "tensor"):
            device = kwargs.pop("device", None)
            out = f(*args, **kwargs)
            return out.to(device) if is_posed(device) else out
        if name == "__set__" and all(isinstance(x, Posed) for x in args[:2]):
            args[0].held = args[1].held  # parameter.data = view of theta
        return f(*(args if name.startswith("__") else map(rename, args)), **kwargs)


def pose():
    """torch as it is with one GPU, which is the posed device."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)  # type: ignore[attr-defined]
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda.get_device_name = lambda device=None: "posed GPU"
    cuda.set_device = lambda device: EVENTS["device set"].update([str(device)])
    torch._dynamo.mark_static_address = STATIC.append  # type: ignore[assignment]
    torch.compiler.cudagraph_mark_step_begin = Graph.mark_step
    torch.compile = Graph  # type: ignore[assignment, misc]
    save = torch.save
    torch.save = lambda x, *rest, **options: save(tree_map(inner, x), *rest, **options)


def main(path: str, *flags: str):
    global SCRIPT
    SCRIPT = str(Path(path).resolve())
    spec = importlib.util.spec_from_file_location(Path(SCRIPT).stem, SCRIPT)
    script: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[Path(SCRIPT).stem] = script
    spec.loader.exec_module(script)  # type: ignore[union-attr]
    pose()
    eager = ["--no-compile"] if hasattr(script.Args, "compile") and "--compile" not in flags else []
    args, _ = script.parse_args(["--device", "cuda", *eager, *flags])
    with Rename(), Dispatch():
        script.train(args)
    precise = torch.backends.cudnn.deterministic
    EVENTS["settings"].update([f"products {torch.get_float32_matmul_precision()}", f"cudnn deterministic {precise}"])
    print(json.dumps(EVENTS), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
