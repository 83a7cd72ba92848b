"""What a training depends on, as short hashes: the code and the weights of networks and losses."""

import ast
import contextlib
import hashlib
import inspect
import sys
import textwrap
from pathlib import Path

from torch import Tensor, nn

from utils import count_parameters

PROJECT = Path(__file__).resolve().parent.parent


def identity_of(network: nn.Module, loss_fn) -> dict[str, str]:
    """What is compared of network and loss when a training is resumed: class, arguments, size and code."""
    plain = {
        name: value for name, value in vars(loss_fn).items() if type(value) in (str, int, float, bool) and name != "training"
    }
    loss_type = loss_fn if inspect.isroutine(loss_fn) else type(loss_fn)
    size = f"{count_parameters(network):,} parameters"
    return {
        "the network": f"{type(network).__name__} {getattr(network, 'arguments', '')}, {size}",
        "the loss": f"{loss_type.__qualname__} {plain or ''}",
        "the code of network and loss": code_fingerprint(*map(type, network.modules()), loss_type),
    }


def code_fingerprint(*objects) -> str:
    """20 characters that change with the code of classes and functions and of everything in this project that they use.

    Comments, docstrings and formatting do not count: it is the syntax trees that are hashed.
    """
    dumps, todo, seen = set(), list(objects), set()
    while todo:
        thing = inspect.unwrap(todo.pop())  # under decorators such as torch.no_grad
        if thing in seen:
            continue
        seen.add(thing)
        dumps.add(thing.__qualname__)
        with contextlib.suppress(OSError, TypeError):  # typed at a prompt, or not written in Python
            file = Path(inspect.getsourcefile(thing)).resolve()
            if not file.is_relative_to(PROJECT) or "site-packages" in file.parts:
                continue
            tree = without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(thing))))
            dumps.add(ast.dump(tree))
            namespace = vars(sys.modules[thing.__module__])
            for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & namespace.keys():
                value = namespace[name]
                if inspect.isclass(value) or inspect.isroutine(value):
                    todo.append(value)
                elif isinstance(value, (int, float, str, tuple, Tensor)):
                    dumps.add(f"{name} = {value.tolist() if isinstance(value, Tensor) else value!r}")
    return hashlib.sha256("\n".join(sorted(dumps)).encode()).hexdigest()[:20]


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def fingerprint(network: nn.Module) -> str:
    """20 characters that change with any weight of ``network``, with its shape, and with the code that runs it."""
    digest = hashlib.sha256(code_fingerprint(*map(type, network.modules())).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]
