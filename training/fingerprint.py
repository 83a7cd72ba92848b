"""What a training depends on, as short hashes: the code and the weights of networks and losses."""

import ast
import contextlib
import functools
import hashlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from utils import count_parameters

PROJECT = Path(__file__).resolve().parent.parent


def identity_of(network: nn.Module, loss_fn: nn.Module | Callable) -> dict[str, str]:
    """What is compared of network and loss when a training is resumed: class, arguments, size, code and constants."""
    is_module = isinstance(loss_fn, nn.Module)
    code = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    code = code if inspect.isroutine(code) else type(code)
    settings = [settings_of(part) for part in (loss_fn.modules() if is_module else [loss_fn])]
    content = f"{fingerprint(loss_fn) if is_module else code_fingerprint(code)} {settings}"
    size = f"{count_parameters(network):,} parameters"
    return {
        "the network": f"{type(network).__name__} {getattr(network, 'arguments', '')}, {size}",
        "the code of the network": code_fingerprint(*map(type, network.modules())),
        "the loss": f"{code.__qualname__} {settings[0][:200]}",  # for the message; all of it counts in the next
        "the code and parts of the loss": hashlib.sha256(content.encode()).hexdigest()[:20],
    }


def settings_of(part: nn.Module | Callable) -> str:
    """The attributes of a loss or of a module in it; of a ``functools.partial`` its arguments."""
    own = {name: value for name, value in getattr(part, "__dict__", {}).items() if name not in vars(nn.Module())}
    texts = [] if isinstance(part, nn.Module) else [text_of(part)]
    return ", ".join([*texts, *(f"{name} {text_of(value)}" for name, value in own.items())])


def text_of(value) -> str:
    """All of a plain value; of any other its ``repr``, without what differs between processes."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    elif isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))  # an address


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
        # Typed at a prompt, not written in Python, or a lambda in lines that are no code alone
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            if not in_project(inspect.getsourcefile(thing)):
                continue
            dump, nodes = parse(textwrap.dedent(inspect.getsource(thing)))
            dumps.add(dump)
            for name, value in values_used(nodes, thing).items():
                if inspect.isclass(value) or inspect.isroutine(value):
                    todo.append(value)
                elif not inspect.ismodule(value):  # its text holds the path to its file
                    dumps.add(f"{name} = {text_of(value)}")
    return hashlib.sha256("\n".join(sorted(dumps)).encode()).hexdigest()[:20]


@functools.cache  # a training asks for the same code six times
def parse(source: str) -> tuple[str, list[ast.AST]]:
    """The syntax tree of ``source`` without docstrings, as text, and its nodes."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree), list(ast.walk(tree))


def values_used(nodes: list[ast.AST], thing) -> dict[str, object]:
    """What the code of ``thing``, a function or class, reads of its file, the functions around it, and other files here."""
    namespace = dict(vars(sys.modules[thing.__module__]))
    for function in [thing] if inspect.isfunction(thing) else filter(inspect.isfunction, vars(thing).values()):
        namespace |= inspect.getclosurevars(function).nonlocals
    values = {}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in namespace:
            values[node.id] = namespace[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):  # module.name
            module = namespace.get(node.value.id)
            if inspect.ismodule(module) and in_project(getattr(module, "__file__", None) or "/"):
                values[f"{node.value.id}.{node.attr}"] = getattr(module, node.attr, None)
    return values


@functools.cache
def in_project(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_relative_to(PROJECT) and "site-packages" not in path.parts


def fingerprint(network: nn.Module) -> str:
    """20 characters that change with any weight of ``network``, with its shape, and with the code that runs it."""
    digest = hashlib.sha256(code_fingerprint(*map(type, network.modules())).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]
