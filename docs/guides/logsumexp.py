"""Attention whose log-sum-exp enters a loss: a z-loss, without the map, equal to dense autograd."""

import torch

import cellattn

torch.manual_seed(0)
q, k, v = (torch.randn(4, 300, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))  # [heads, tokens, head_dim]

out, lse = cellattn.attention(q, k, v)  # lse [4, 300], natural log, with a gradient
loss = out.square().mean() + 1e-3 * lse.square().mean()
gradients = torch.autograd.grad(loss, (q, k, v))

# The same in dense PyTorch, which makes the [4, 300, 300] map.
scores = q @ k.mT * 16**-0.5
dense_lse = scores.logsumexp(-1)
dense = (scores.softmax(-1) @ v).square().mean() + 1e-3 * dense_lse.square().mean()
for ours, theirs in zip(gradients, torch.autograd.grad(dense, (q, k, v)), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

# The log-sum-exp alone, over some of the keys.
known = torch.rand(300) > 0.2
lse = cellattn.attention_logsumexp(q, k, key_mask=known)
torch.testing.assert_close(lse, scores[..., known].logsumexp(-1))
