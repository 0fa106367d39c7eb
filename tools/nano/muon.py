"""Muon: momentum whose update of a matrix is made orthogonal (Jordan et al. 2024), here for the transformer's blocks."""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are updated together; products in bfloat16."""

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(list(matrices), dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), same in shapes.items():
                grads = [p.grad for p in same]
                running = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(running, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, running, group["momentum"])).bfloat16()
                x = x.mT.contiguous() if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                a, b, c = NEWTON_SCHULZ
                for _ in range(5):
                    y = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(y, y, y, beta=b, alpha=c), x, beta=a)
                x = (x.mT if rows > columns else x).float()
                torch._foreach_add_(same, list(x * -group["lr"] * max(1, rows / columns) ** 0.5))
