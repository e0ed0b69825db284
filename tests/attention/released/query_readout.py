"""The token-to-image attention of SAM with all tokens projected and the matrix of weights."""

from collections.abc import Callable

from torch import Tensor

from attention.query_readout import QueryReadout


def released(module: QueryReadout) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2)

        tokens = module.norm_kv(kv)
        wanted, k, v = (
            heads(module.q_proj(module.norm_q(q))),
            heads(module.k_proj(tokens)),
            heads(module.v_proj(tokens)),
        )
        weights = (wanted @ k.transpose(-2, -1) / wanted.shape[-1] ** 0.5).softmax(-1)
        out = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
        out = module.norm(q + out if module.residual else out)
        if module.mlp is None:
            return out
        return module.norm_mlp(out + module.mlp(out) if module.residual else module.mlp(out))

    return run
