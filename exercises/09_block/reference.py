import nanophi
from nanophi.model.attention import plan_attention
from nanophi.model.phi import Block, rotary_tables


def config(weights, prefix, heads, rotary_dim, **more):
    intermediate, width = weights[f"{prefix}mlp.fc1.weight"].shape
    return nanophi.PhiConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        partial_rotary_factor=rotary_dim / (width // heads),
        **more,
    )


def block(x, weights, heads, rotary_dim):
    cfg = config(weights, "", heads, rotary_dim)
    module = Block(cfg).to(x.dtype)
    module.load_state_dict(weights)
    positions, plan = plan_attention("manual", x[:, :, 0])
    rotary = rotary_tables(positions, cfg.rotary_dim, cfg.rope_theta)
    return module(x, rotary, 0, None, plan)


def logits(ids, weights, layers, heads, rotary_dim):
    head = weights["lm_head.weight"]
    more = {"num_hidden_layers": layers, "vocab_size": len(head)}
    cfg = config(weights, "model.layers.0.", heads, rotary_dim, **more)
    model = nanophi.Phi(cfg).to(head.dtype)
    model.load_state_dict(weights)
    return model(ids)
