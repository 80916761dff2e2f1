"""Decode with the published model object: python examples/drop_in.py MODULE:FACTORY [CHECKPOINT].

FACTORY is what builds your model, a class or a function without arguments, importable from MODULE; CHECKPOINT is what
you fine-tuned. `sample_tokens` keeps the published signature.
"""

import sys
from importlib import import_module

import torch

import lpd_ext
from lpd_ext.orders import locality_order
from lpd_ext.schedule import group_sizes
from lpd_ext.state_files import read_state_dict

sys.path.insert(0, "")  # MODULE may lie in the current folder
module, _, factory = sys.argv[1].partition(":")
model = getattr(import_module(module), factory)().eval()
if len(sys.argv) > 2:
    model.load_state_dict(read_state_dict(sys.argv[2]))  # whatever the trainer left around the weights

lpd_ext.accelerate(model)  # replaces model.sample_tokens; lpd_ext.restore(model) puts it back

torch.manual_seed(0)  # as in the published code, random numbers follow torch's generator
num_tokens = model.pos_embed.shape[1] - 1
side = int(num_tokens**0.5)
labels = torch.tensor([0, 1])
sizes = group_sizes(num_tokens, steps=20 if num_tokens >= 256 else 4)
orders = locality_order(sizes, (side, side), torch.arange(len(labels)))
tokens = model.sample_tokens(len(labels), cfg=4.0, labels=labels, group_sizes=sizes, orders=orders)
print(f"{len(tokens)} pictures of {tokens.shape[1]} tokens, the first: {tokens[0, :8].tolist()} ...")
