"""Trains the same network with torch.optim.RMSprop and with RMSpropAsync, from the same start."""

import torch

from hogstream.optim import RMSpropAsync

STEPS = 200


def make_model() -> torch.nn.Module:
    """Always the same network: the seed says so."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Learns to add eight numbers; returns the last loss."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(64, 8, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), x.sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Prints the last loss of each."""
    model = make_model()
    print(
        f"torch.optim.RMSprop         {train(model, torch.optim.RMSprop(model.parameters())):.4f}"
    )
    model = make_model()
    print(f"RMSpropAsync                {train(model, RMSpropAsync(model.parameters())):.4f}")
    model = make_model()
    outside = RMSpropAsync(model.parameters(), eps_inside_sqrt=False)
    print(f"RMSpropAsync, eps as torch  {train(model, outside):.4f}")


if __name__ == "__main__":
    main()
