"""How much memory tensors take, packed ones included, which show no storage."""

import gc

import torch


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive in this process; those that share memory count once."""
    gc.collect()
    storages: dict[int, int] = {}
    packed_bytes = 0
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.is_meta:
            continue
        if thing.is_mkldnn:
            packed_bytes += thing.numel() * thing.element_size()
        else:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return packed_bytes + sum(storages.values())
