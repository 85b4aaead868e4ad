"""The memory that the intermediate results of a network need for one image."""

import operator

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree


def peak_activation_bytes(network: nn.Module, image: Tensor) -> int:
    """Compute the largest sum of live activations, in bytes, in a forward pass of one image [1, 3, H, W].

    The operators of the graph of `torch.export` run in order. An activation is live from the operator that computes it
    to the last operator that reads it. The image is an activation, weights are not. Views need no memory. A batch norm
    or a pointwise operator, such as ReLU or an addition, overwrites an input of its size that nothing reads later.

    >>> network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 1, 1)).eval()
    >>> peak_activation_bytes(network, torch.zeros(1, 3, 10, 10))  # 3 + 5 channels of 100 pixels of 4 bytes
    3200
    """
    program = torch.export.export(network, (image,)).run_decompositions({})
    nodes, inputs = list(program.graph.nodes), set(program.graph_signature.user_inputs)
    owners: dict[Node, Node] = {}
    last_reader: dict[Node, Node] = {}
    for node in nodes:
        owners[node] = owners[node.all_input_nodes[0]] if _is_view(node) else node
        last_reader.update({owners[read]: node for read in (node, *node.all_input_nodes)})
    sizes = {
        owner: _bytes(owner) if owner.op == "call_function" or owner.name in inputs else 0 for owner in last_reader
    }
    live = peak = 0
    for node in nodes:
        new = sizes[node] if owners[node] is node else 0
        freed = [sizes[owner] for owner, reader in last_reader.items() if reader is node]
        overwrites = _runs_in_place(node) and new in freed
        peak = max(peak, live if overwrites else live + new)
        live += new - sum(freed)
    return peak


def _bytes(node: Node) -> int:
    tensors = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_view(node: Node) -> bool:
    """Return whether the output shares the memory of the first input."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(value.alias_info for value in node.target._schema.returns)
    return node.target is operator.getitem


def _runs_in_place(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or "batch_norm" in str(node.target)
