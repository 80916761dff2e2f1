"""Use the operators alone: one attention and one draw of a step in which two images are at different steps."""

import torch
import torch.nn.functional as F

from lpd_ext import ops

heads, head_dim, vocab_size = 8, 64, 1000
torch.manual_seed(0)

# Image 0 has 6 tokens in its cache and 2 new ones (context rows), and asks for 3 cells (query rows); image 1: 11, 1, 4.
# Columns: context_start, num_context, query_start, num_query, cache_length, cache_slot.
segments = torch.tensor([[0, 2, 3, 3, 6, 0], [2, 1, 6, 4, 11, 1]], dtype=torch.int32)
qkv = torch.randn(10, 3, heads, head_dim)  # all rows of the step: context rows 0 to 2, then query rows 3 to 9
k_cache, v_cache = torch.randn(2, 2, heads, 32, head_dim)  # [slots, heads, positions, head_dim] each

attended = ops.group_attention(qkv, k_cache, v_cache, segments, max_rows=5, max_keys=16)  # caches are written

# Image 0's query rows see its 6 + 2 cached positions and each other.
q, k, v = qkv[3:6].permute(1, 2, 0, 3)
k, v = torch.cat([k_cache[0, :, :8], k], dim=1), torch.cat([v_cache[0, :, :8], v], dim=1)
expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
print(f"group_attention differs from plain torch by at most {(attended[3:6] - expected).abs().max():.1e}")

# Draw the 7 cells that were asked for, with guidance: logits of conditional rows 0 to 6, unconditional rows 7 to 13.
logits = torch.randn(14, vocab_size)
rows = torch.arange(7, dtype=torch.int32)
tokens = ops.sample_tokens(
    logits,
    conditional_row=rows,
    unconditional_row=rows + 7,
    guidance=torch.full((7,), 4.0),
    temperature=torch.ones(7),
    top_k=torch.full((7,), 100, dtype=torch.int32),
    top_p=None,
    seed=torch.tensor([1, 1, 1, 2, 2, 2, 2]),  # of the image
    cell=torch.tensor([5, 9, 12, 5, 9, 12, 15]),  # in the image: the same seed and cell draw the same number
)
print(f"tokens: {tokens.tolist()}")
