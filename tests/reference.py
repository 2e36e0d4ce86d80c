"""Plain implementations of what torch.optim lacks, to measure ours against: tensor by tensor, as the formulas read."""

import torch


class Plain(torch.optim.Optimizer):
    """An optimizer whose `update` takes one step; the closure is what frameworks hand to each optimizer."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss


class DecoupledSGD(Plain):
    """torch's SGD, the decay taken from the old parameter instead of added to the gradient (SGDW).

    d = g;  b = momentum b + (1 - dampening) d  (b = d the first time);  d = d + momentum b or b
    p = p - lr weight_decay p - lr d
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        *,
        maximize=False,
        decoupled_weight_decay=True,
    ):
        assert decoupled_weight_decay, "torch.optim.SGD is the reference for L2 regularisation"
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def update(self):
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = -p.grad if group["maximize"] else p.grad.clone()
                if momentum != 0:
                    state = self.state[p]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = direction.clone()
                    else:
                        old = state["momentum_buffer"]
                        state["momentum_buffer"] = momentum * old + (1 - group["dampening"]) * direction
                    buffer = state["momentum_buffer"]
                    direction = direction + momentum * buffer if group["nesterov"] else buffer
                p.copy_(p - lr * group["weight_decay"] * p - lr * direction)


class Momentum(Plain):
    """The lecture's momentum: d = beta d + (1 - beta) g from d = 0, then p = p - lr d.

    Decay: p - lr weight_decay p beside the update (decoupled), or g + weight_decay p in place of g (L2).
    """

    def __init__(self, params, lr, beta=0.9, weight_decay=0.0, *, decoupled_weight_decay=True, maximize=False):
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self):
        for group in self.param_groups:
            lr, beta, weight_decay = float(group["lr"]), group["beta"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = -p.grad if group["maximize"] else p.grad.clone()
                if not group["decoupled_weight_decay"]:
                    gradient = gradient + weight_decay * p
                state = self.state[p]
                old = state.get("momentum_buffer", torch.zeros_like(p))
                state["momentum_buffer"] = beta * old + (1 - beta) * gradient
                decay = lr * weight_decay * p if group["decoupled_weight_decay"] else torch.zeros_like(p)
                p.copy_(p - decay - lr * state["momentum_buffer"])


class Lion(Plain):
    """Steps of one length along the sign of an average of gradients; the decay is decoupled.

    c = beta1 m + (1 - beta1) g;  p = p - lr weight_decay p - lr sign(c);  m = beta2 m + (1 - beta2) g from m = 0
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False, decoupled_weight_decay=True):
        assert decoupled_weight_decay, "the paper has no other"
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = -p.grad if group["maximize"] else p.grad.clone()
                state = self.state[p]
                old = state.get("exp_avg", torch.zeros_like(p))
                direction = beta1 * old + (1 - beta1) * gradient
                # torch's sign of NaN is 0.
                direction = torch.where(direction.isnan(), direction, direction.sign())
                p.copy_(p - lr * group["weight_decay"] * p - lr * direction)
                state["exp_avg"] = beta2 * old + (1 - beta2) * gradient
